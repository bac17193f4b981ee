"""Every command takes a path as people write it: relative, with `..`, a slash at its end, a link.

Catches: a path that is joined to one which begins with it, a folder that is made beside the one
that was meant, a default that lies where nobody looks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import NANO, ROOT, made_once, script
from here import here, must
from hub_server import Hub
from test_default_stack import SMALLEST
from test_repair import digests

from dsv4.storage.checkpoint import INDEX
from dsv4.toolchain.server import free_port

PYTHON = ROOT / ".toolchain" / "new" / "bin" / "python"
FAST = ("--without-loader", "--jobs", 1)
# Where the command is run, below the place of all files, and how a name there is written.
FORMS = {
    "relative": (".", "{}"),
    "from elsewhere, dots, a slash": ("other/deep", "../../other/../{}/"),
    "through a link": ("other", "../by-link/{}"),
    "a link": (".", "link-to-{}"),
}


@pytest.fixture(scope="session")
def least(tmp_path_factory) -> Path:
    """A source of one layer with two experts."""

    def make(folder: Path) -> None:
        options = ("--shards", 1, "--sizes", json.dumps(SMALLEST))
        must("make_source", "--source", folder, *options)

    return made_once(tmp_path_factory, "least", make)


@pytest.fixture(params=FORMS)
def place(request, least, tmp_path, monkeypatch):
    """(the folder with `source`, how a name in it is written from where the command is run)."""
    where, how = FORMS[request.param]
    real = tmp_path / "real"
    (real / "other" / "deep").mkdir(parents=True)
    (real / "by-link").symlink_to(real)
    for name in ("source", "bundle"):
        (real / f"link-to-{name}").symlink_to(name)
    shutil.copytree(least, real / "source")
    monkeypatch.chdir(real / where)
    return real, how


class Started(Exception):
    """In place of a server."""


def test_the_stages_and_repair_take_a_path_however_it_is_written(place, monkeypatch):
    real, how = place
    plan = Path(how.format("source")).with_name("a plan.json")  # files beside the folders
    report, page = plan.with_name("verify.json"), plan.with_name("verify.html")
    source, bundle = ("--source", how.format("source")), ("--bundle", how.format("bundle"))
    both = (*source, *bundle)
    if "link-to" in how:
        (real / "bundle").mkdir()
    must("check", *both, "--python", PYTHON)
    must("download", *source)
    must("plan", *source, "--plan", plan, "--size", "5MB", "--jobs", 1)
    must("convert", *both, "--jobs", 1)
    must("requantize", *both, "--jobs", 1)
    must("finalize", *both)
    must("patch", *both)
    must("verify", *both, "--json", report, *FAST)
    must("report", "--json", report, "--out", page)
    said = must("publish", *both, "--to", "user/x", "--report", report, "--page", page, "--dry-run")
    assert "model.safetensors.index.json" in said
    assert {path.name for path in real.iterdir()} == {
        "source", "bundle", "other", "by-link", "link-to-source", "link-to-bundle",
        "a plan.json", "verify.json", "verify.html",
    }  # fmt: skip

    words = []
    monkeypatch.setattr(os, "execvpe", lambda _, argv, env: words.extend(argv) or start())
    with contextlib.suppress(Started):
        here("serve", *bundle, "--python", PYTHON, "--port", free_port())
    assert f"{real / 'bundle'}" in words

    damage(real / "bundle")
    before = digests(real / "bundle")
    must("repair", *both, "--dry-run", *FAST)
    assert digests(real / "bundle") == before
    assert "level 1 holds" in must("repair", *both, *FAST)
    must("repair", *bundle, "--undo")
    assert digests(real / "bundle") == before
    assert not (real / "bundle" / ".before-repair").exists()


def start() -> None:
    raise Started


def damage(bundle: Path) -> None:
    """Faults for every way in which repair keeps an original: a document, the index, a file in a
    folder, one that is missing, a shard that is none."""
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (bundle / INDEX).write_text("{")
    (bundle / "encoding" / "encoding_dsv4.py").write_text("# another")
    (bundle / "tokenizer.json").unlink()
    shard = next(bundle.glob("*.safetensors"))
    shutil.copy2(shard, bundle / "stranger-00001-of-00002.safetensors")


@pytest.mark.full
def test_measuring_takes_a_path_however_it_is_written(least, tmp_path, monkeypatch):
    where, how = FORMS["from elsewhere, dots, a slash"]
    (tmp_path / where).mkdir(parents=True)
    shutil.copytree(least, tmp_path / "source")
    monkeypatch.chdir(tmp_path / where)
    source, bundle = ("--source", how.format("source")), ("--bundle", how.format("bundle"))
    must("convert", *source, *bundle)
    must("finalize", *source, *bundle)
    how = ("--tokens", 8, "--device", "cpu", "--python", PYTHON)
    must("evaluate", *source, *bundle, *how, "--out", "../evaluate")
    must("imatrix", *source, *how, "--out", "../im.dat")
    made = {path.name for path in (tmp_path / "other").iterdir()}
    assert {"evaluate.json", "evaluate.html", "im.dat"} <= made


def test_a_download_comes_to_a_relative_folder(tmp_path):
    files = {p.relative_to(NANO).as_posix(): p.read_bytes() for p in NANO.rglob("*.*")}
    (tmp_path / "other").mkdir()
    with Hub() as hub:
        hub.add("a/b", files)
        known = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        known |= {"HF_ENDPOINT": hub.url, "HF_HOME": f"{tmp_path}/home", "NO_PROXY": "127.0.0.1"}
        done = script("download", "--source", "../other/../made/here/", "--repo", "a/b",
                      env=known, cwd=tmp_path / "other")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    there = tmp_path / "made" / "here"
    assert {name: (there / name).read_bytes() for name in files} == files


# ----------------------------------------------------------------------------------------- make


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.parametrize("bundle", ["build/x", "/a folder/x"])
def test_a_slash_at_the_end_names_the_same_stamps_and_plan(bundle):
    rule = r'--eval=.PHONY: told\ntold: ; @printf "%s\n" "$$RECIPE_PLAN" "$(KEY)"'
    told = [
        make(rule.replace("\\n", "\n", 1), "told", "SIZE=9GB", f"BUNDLE={bundle}{end}").stdout
        for end in ("", "/")
    ]
    assert told[0].startswith(f"{bundle}.plan.json\n")
    assert told[0] == told[1]


def test_make_from_another_folder_says_where_the_repository_is(tmp_path):
    done = make("-f", f"{ROOT}/Makefile", "help", cwd=tmp_path)
    assert done.returncode != 0
    assert f"make -C {ROOT}/" in done.stderr
    assert not any(tmp_path.iterdir())
