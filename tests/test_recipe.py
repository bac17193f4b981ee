"""The Makefile: order, stamps, and what makes a stage stale.

Runs the real recipe on a small source, in a copy of the repository with the same .venv. Catches: a
stage that is skipped or redone, a stamp that outlives its bundle, a failed stage that leaves one.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = [
    "check", "patch_loader", "download", "plan", "convert", "requantize", "finalize", "patch",
    "verify",
]  # fmt: skip


class Recipe:
    """A copy of the recipe, with a source and a bundle of its own; `make` runs in it."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder / "repository with a space"
        self.folder.mkdir()
        for name in ("scripts", "patches"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignore)
        for name in ("Makefile", "requirements.txt"):
            shutil.copy2(ROOT / name, self.folder / name)
        link_venv(self.folder / ".venv")
        self.source = shutil.copytree(source, folder / "the source")
        self.bundle = folder / "the bundle"

    def make(self, *arguments: str) -> subprocess.CompletedProcess:
        settings = [f"SOURCE={self.source}", f"BUNDLE={self.bundle}", "REPO="]
        settings.append("TOOLCHAIN_PYTHON=.venv/bin/python")  # the old stack
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        return subprocess.run(
            ["make", *arguments, *settings],
            cwd=self.folder,
            env=clean,
            capture_output=True,
            text=True,
        )

    def stages(self, *arguments: str) -> list[str]:
        """Run make, which must succeed; the stages that it ran, in order."""
        result = self.make(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return re.findall(
            r"^(?:\w+= )?\.venv/bin/python scripts/(\w+)\.py", result.stdout, re.MULTILINE
        )

    def edit(self, name: str) -> None:
        """Change a script, later than every stamp."""
        path = self.folder / "scripts" / name
        path.write_text(path.read_text() + "\n# edited\n")


def link_venv(folder: Path) -> None:
    """The .venv of this process, with a stamp of its own: make must not touch the real one."""
    folder.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != "installed":
            (folder / path.name).symlink_to(path)
    shutil.copy2(ROOT / "requirements.txt", folder / "installed")


@pytest.fixture(scope="module")
def recipe(source, tmp_path_factory) -> Recipe:
    made = Recipe(tmp_path_factory.mktemp("recipe"), source)
    assert made.stages("all") == STAGES
    return made


def test_a_second_run_redoes_no_stage(recipe):
    assert recipe.stages("all") == []


def test_an_edited_script_redoes_its_stage_and_those_after_it(recipe):
    recipe.edit("finalize.py")
    assert recipe.stages("all") == ["finalize", "patch", "verify"]


@pytest.mark.full
def test_an_edited_module_redoes_the_first_stage_that_uses_it(recipe):
    recipe.edit("dsv4/verification/numbers/tasks.py")
    assert recipe.stages("all") == ["verify"]


# A module of each room → the first stage that can reach it; None: none can.
REACHED = {
    "errors.py": "check",
    "settings.py": "check",
    "text.py": "check",
    "storage/locks.py": "check",
    "storage/backup.py": None,
    "model/configs.py": "check",
    "model/expected_tensors.py": "check",
    "model/bundle_tensors.py": "check",
    "model/chat_template.jinja": "check",
    "hub/file_transfer.py": "check",
    "toolchain/upstream_converter.py": "convert",
    "toolchain/server.py": None,
    "toolchain/server_memory.py": None,
    "toolchain/child_process.py": "check",
    "quantization/least_squares.py": "check",
    "conversion/convert.py": "convert",
    "conversion/requantize.py": "convert",
    "conversion/runtime_documents.py": "patch",
    "verification/checks/loader_replay.py": "verify",
    "verification/report/verify_page.html.j2": None,
    "acceptance/smoke_questions.py": None,
    "repair/engine.py": None,
    "evaluation/driver.py": None,
}


def test_an_edited_module_redoes_the_stages_that_can_reach_it_and_no_other(recipe):
    """By build/needs.mk; make is asked for one module of each stage."""
    lines = (recipe.folder / "build" / "needs.mk").read_text().splitlines()
    needs = {name: files.split() for name, _, files in (line.partition(" := ") for line in lines)}
    for name, first in REACHED.items():
        reached = [s for s in STAGES if f"scripts/dsv4/{name}" in needs[f"needs_{s}"]]
        assert reached[:1] == ([first] if first else []), name
    settings = next(recipe.folder.glob("build/*/settings")).relative_to(recipe.folder)
    kept = [settings, *map(settings.with_name, ("no_SOURCE", "no_BUNDLE", "no_PLAN", "plan"))]
    dry = ("all", "--dry-run", *(f"--old-file={file}" for file in kept))  # else taken for rewritten
    assert recipe.stages(*dry) == []
    for name, first in {first: name for name, first in REACHED.items()}.items():
        path = recipe.folder / "scripts" / "dsv4" / first
        stat = path.stat()
        path.touch()
        wanted = STAGES[STAGES.index(name) :] if name else []
        assert recipe.stages(*dry) == wanted, first
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    packages = {
        p.name for p in (ROOT / "scripts" / "dsv4").iterdir() if (p / "__init__.py").is_file()
    }
    assert packages <= {name.partition("/")[0] for name in REACHED}


@pytest.mark.full
def test_a_changed_setting_redoes_the_stages_and_loses_nothing(recipe):
    shards = {path: path.read_bytes() for path in recipe.bundle.glob("*.safetensors")}
    assert recipe.stages("all", "REFERENCE=" + str(recipe.bundle)) == STAGES
    assert shards == {path: path.read_bytes() for path in recipe.bundle.glob("*.safetensors")}
    assert recipe.stages("all") == STAGES


def test_a_deleted_shard_makes_verify_name_it(recipe):
    shard = next(iter(recipe.bundle.glob("*.safetensors")))
    kept = shard.rename(shard.with_name("kept"))
    result = recipe.make("verify")
    assert result.returncode != 0
    assert shard.name in result.stderr
    kept.rename(shard)
    assert recipe.stages("verify") == ["verify"]


@pytest.mark.full
def test_a_deleted_bundle_is_built_again(recipe):
    shutil.rmtree(recipe.bundle)
    assert recipe.stages("all") == STAGES[STAGES.index("convert") :]


def test_a_failed_stage_leaves_no_stamp(recipe):
    encoding = recipe.source / "encoding"
    hidden = encoding.rename(recipe.source / "hidden")
    shutil.rmtree(recipe.bundle)
    assert recipe.make("all").returncode != 0
    hidden.rename(encoding)
    assert recipe.stages("all") == ["finalize", "patch", "verify"]


def test_clean_touches_neither_bundle_nor_source(recipe):
    def files(folder):
        return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    inside = shutil.copytree(recipe.bundle, recipe.folder / "build" / "mine")
    folders = (recipe.bundle, recipe.source, inside)
    before = [files(folder) for folder in folders]
    recipe.stages("clean")
    assert before == [files(folder) for folder in folders]
    assert not list((recipe.folder / "build").rglob("*.stamp"))


@pytest.mark.full
def test_requantize_mends_a_bundle_that_was_converted_elsewhere(recipe, stock, tmp_path):
    recipe.bundle = shutil.copytree(stock, tmp_path / "from elsewhere")
    assert recipe.stages("requantize") == STAGES[: STAGES.index("requantize") + 1]
    assert recipe.stages("all") == STAGES[STAGES.index("finalize") :]


def test_help_lists_every_target(recipe):
    shown = recipe.make("help").stdout
    names = re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in set(names):
        assert f"make {name} " in shown, name


@pytest.mark.full
def test_repair_mends_and_unrepair_puts_back(recipe):
    config = recipe.bundle / "generation_config.json"
    right = config.read_bytes()
    config.write_text("{}")
    assert "would be set" in recipe.make("repair", "DRY_RUN=1").stdout
    assert config.read_text() == "{}"
    result = recipe.make("repair")
    assert "level 1 holds" in result.stdout, result.stderr
    assert recipe.make("unrepair").returncode == 0
    assert config.read_text() == "{}"
    config.write_bytes(right)


def test_no_setting_asks_for_the_download_of_a_missing_source(recipe, tmp_path):
    recipe.source = tmp_path / "nowhere"
    result = recipe.make("check")
    assert result.returncode != 0
    assert "set SOURCE, or REPO to fetch it" in result.stdout
