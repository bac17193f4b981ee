"""A module imports from lower layers only, and a command imports no command.

Catches: an import that the rules forbid and `make lint` lets pass; a command that imports another;
a progress bar that is drawn into a log file.
"""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

HIGHER = "dsv4.{} is not allowed to import dsv4.{}"
LINT_IMPORTS = [str(ROOT / ".venv" / "bin" / "lint-imports"), "--no-cache", "--no-logo"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Copy the scripts and the settings of lint-imports, so that a test can change them."""
    folder = tmp_path_factory.mktemp("lint")
    ignore = shutil.ignore_patterns("__pycache__", "checkpoint")
    shutil.copytree(SCRIPTS, folder / "scripts", ignore=ignore)
    shutil.copy2(ROOT / ".importlinter", folder)
    return folder


def lint(folder: Path) -> str:
    """Return the output of lint-imports; "" when it passes."""
    done = subprocess.run(LINT_IMPORTS, cwd=folder, env={"PYTHONPATH": "scripts"},
                          capture_output=True, text=True)  # fmt: skip
    return done.stdout + done.stderr if done.returncode else ""


def imports_of_commands(scripts: Path) -> list[str]:
    """Return "FILE imports COMMAND" for every import of a command, at any depth of the code.

    A command is a file of scripts/ or scripts/lab/ with a `main`.
    """
    files = [*scripts.glob("*.py"), *scripts.glob("lab/*.py")]
    commands = {path.stem for path in files if "\ndef main(" in path.read_text()}
    assert len(commands) > 30
    found = []
    for path in scripts.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            found += [f"{path.name} imports {name}" for name in names if name in commands]
    return found


def test_the_repository_passes(copy):
    assert lint(copy) == ""
    assert imports_of_commands(SCRIPTS) == []


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        (
            "dsv4/storage/atomic.py",
            "import dsv4.model.names",
            HIGHER.format("storage", "model"),
        ),
        (
            "dsv4/model/names.py",
            "import dsv4.hub.repository",
            HIGHER.format("model", "hub"),
        ),
        (
            "dsv4/conversion/shard_metadata.py",
            "import dsv4.verification.scan",
            HIGHER.format("conversion", "verification"),
        ),
        (
            "dsv4/verification/scan.py",
            "import dsv4.conversion.shard_metadata",
            HIGHER.format("verification", "conversion"),
        ),
        (
            "dsv4/errors.py",
            "import dsv4.storage.atomic",
            HIGHER.format("errors", "storage"),
        ),
        ("dsv4/strays.py", "", "dsv4.strays"),
    ],
)
def test_an_import_of_a_higher_layer_is_refused(copy, file, line, words):
    path = copy / "scripts" / file
    before = path.read_text() if path.is_file() else None
    path.write_text((before or "") + f"\n{line}\n")
    try:
        assert words in lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)


@pytest.mark.parametrize(
    ("file", "line", "command"),
    [
        ("convert.py", "import requantize", "requantize"),
        ("lab/bench.py", "import matrix", "matrix"),
        ("lab/bench.py", "from verify import main", "verify"),
        ("dsv4/text.py", "def late():\n    import check", "check"),
    ],
)
def test_an_import_of_a_command_is_found(copy, file, line, command):
    path = copy / "scripts" / file
    before = path.read_text()
    path.write_text(f"{before}\n{line}\n")
    try:
        assert f"{path.name} imports {command}" in imports_of_commands(copy / "scripts")
    finally:
        path.write_text(before)


def test_commands_are_short():
    for path in (*SCRIPTS.glob("*.py"), *SCRIPTS.glob("lab/*.py")):
        assert len(path.read_text().splitlines()) <= 300, path


def test_every_progress_bar_is_disabled_without_a_terminal():
    for path in SCRIPTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm":
                assert "disable" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"
