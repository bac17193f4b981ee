"""The house: an import goes down the stairs only, and a command imports no command.

Catches: an import that the rules forbid and `make lint` lets pass; a command that no rule names; a
bar that is drawn into a log file.
"""

import ast
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS

UP = "dsv4.{} is not allowed to import dsv4.{}"
LINTERS = (
    [str(ROOT / ".venv" / "bin" / "lint-imports"), "--no-cache", "--no-logo"],
    [sys.executable, "-m", "ruff", "check", "scripts"],
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The scripts and the linters' settings, to be changed."""
    folder = tmp_path_factory.mktemp("lint")
    ignore = shutil.ignore_patterns("__pycache__", "checkpoint")
    shutil.copytree(SCRIPTS, folder / "scripts", ignore=ignore)
    for name in (".ruff.toml", ".importlinter"):
        shutil.copy2(ROOT / name, folder)
    return folder


def lint(folder) -> str:
    """What the linters say; '' when they have nothing against it."""
    said = ""
    for command in LINTERS:
        done = subprocess.run(command, cwd=folder, env={"PYTHONPATH": "scripts"},
                              capture_output=True, text=True)  # fmt: skip
        said += done.stdout + done.stderr if done.returncode else ""
    return said


def test_the_house_as_it_is_passes(copy):
    assert lint(copy) == ""


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        (
            "dsv4/storage/atomic.py",
            "import dsv4.model.names",
            UP.format("storage", "model"),
        ),
        (
            "dsv4/model/names.py",
            "import dsv4.hub.repository",
            UP.format("model", "hub"),
        ),
        (
            "dsv4/conversion/shard_metadata.py",
            "import dsv4.verification.scan",
            UP.format("conversion", "verification"),
        ),
        (
            "dsv4/verification/scan.py",
            "import dsv4.conversion.shard_metadata",
            UP.format("verification", "conversion"),
        ),
        (
            "dsv4/errors.py",
            "import dsv4.storage.atomic",
            UP.format("errors", "storage"),
        ),
        ("dsv4/strays.py", "", "dsv4.strays"),
        ("convert.py", "import requantize", "a command imports no command"),
        ("lab/bench.py", "import matrix", "a command imports no command"),
        ("lab/bench.py", "from verify import main", "a command imports no command"),
    ],
)
def test_an_import_against_the_rule_is_refused(copy, file, line, words):
    path = copy / "scripts" / file
    before = path.read_text() if path.is_file() else None
    path.write_text((before or "") + f"\n{line}\n")
    try:
        assert words in lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)


def test_the_rule_names_every_command():
    settings = tomllib.loads((ROOT / ".ruff.toml").read_text())
    banned = settings["lint"]["flake8-tidy-imports"]["banned-api"]
    commands = [
        path.stem
        for folder in (SCRIPTS, SCRIPTS / "lab")
        for path in folder.glob("*.py")
        if "\ndef main(" in path.read_text()
    ]
    assert sorted(commands) == sorted(banned)


def test_commands_are_short():
    for path in (*SCRIPTS.glob("*.py"), *SCRIPTS.glob("lab/*.py")):
        assert len(path.read_text().splitlines()) <= 300, path


def test_every_bar_is_asked_whether_there_is_a_terminal():
    for path in SCRIPTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm":
                assert "disable" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"
