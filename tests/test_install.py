"""The environments: made alone, made anew when their Python is gone, tested before the stamp.

A wheel is made here, so that pip needs no network. Catches: packages that somebody's PIP_USER or
PIP_TARGET sends elsewhere while the stamp is touched, a dead .venv that make takes for installed,
another Python's PYTHONPATH or PYTHONHOME in a script, a traceback for a Python that will not do.
"""

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import install
import pytest
from conftest import SCRIPTS
from test_settings import Copy

SCRIPT = SCRIPTS / "lab" / "install.py"


@pytest.fixture
def copy(tmp_path) -> Copy:
    return Copy(tmp_path)


def test_no_other_pythons_variable_reaches_a_script(copy):
    stray = {"PYTHONPATH": "/evil", "PYTHONHOME": "/evil", "PYTHONSTARTUP": "/evil/x.py"}
    environ = copy.given("serve", **stray)[1]
    assert not stray.keys() & environ.keys()
    assert environ["PYTHONNOUSERSITE"] == "1"


@pytest.mark.parametrize("name", [".venv", ".toolchain/new"])
def test_an_environment_whose_python_is_gone_is_made_anew(copy, name):
    python = copy.folder / name / "bin" / "python"
    assert "install.py" not in copy.make("--dry-run", "venv").stdout
    python.unlink()
    python.symlink_to("/nonexistent/python3")
    assert f" {name}/installed " in copy.make("--dry-run", "venv").stdout


def test_an_environment_of_another_version_is_made_anew(copy):
    library = next((copy.folder / ".venv" / "lib").iterdir())
    library.rename(library.with_name("python3.9"))
    assert "scripts/lab/install.py .venv/installed" in copy.make("--dry-run", "venv").stdout


def test_a_python3_that_is_not_there_is_one_line(copy):
    (copy.folder / ".venv" / "installed").unlink()
    said = copy.make("venv", "PYTHON3=/no such/py'thon").stderr.splitlines()
    errors = {line for line in said if line.startswith("error: ")}
    assert len(errors) == 1
    assert "PYTHON3: found no program '/no such/py'thon', expected Python 3.11" in errors.pop()


def test_a_python_that_will_not_do_is_one_line(monkeypatch):
    for version in ((3, 10, 13), (3, 15, 0)):
        monkeypatch.setattr(sys, "version_info", version)
        with pytest.raises(
            SystemExit, match=r"PYTHON3: found Python 3\.1\d\.\d+, expected 3\.11 to"
        ):
            install.check_python()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"without venv or ensurepip.*apt install python3-venv"):
        install.check_python()


def wheel(folder: Path) -> None:
    """A wheel `tiny` with one module of that name."""
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as file:
        file.writestr("tiny.py", "")
        about = "tiny-1.0.dist-info"
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


@pytest.mark.full
def test_packages_come_where_they_belong_or_the_command_fails(tmp_path):
    wheel(tmp_path)
    pins = tmp_path / "pins.txt"
    pins.write_text("tiny==1.0\n")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    venv, elsewhere = tmp_path / "it's venv", tmp_path / "elsewhere"

    def run(*modules: str, **more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-I", SCRIPT, venv / "installed", pins, *modules]
        return subprocess.run(command, env=env | more, capture_output=True, text=True)

    odd = {"PIP_USER": "1", "PIP_TARGET": str(elsewhere), "PIP_DRY_RUN": "1", "PYTHONHOME": "/x"}
    assert run("tiny", PIP_REQUIRE_VIRTUALENV="1", **odd).returncode == 0
    assert not elsewhere.exists()
    assert list(venv.glob("lib/*/site-packages/tiny.py"))
    assert (venv / "installed").read_text() == "tiny==1.0\n"
    (venv / "installed").unlink()
    failed = run("tiny", "absent")
    assert failed.returncode == 1
    assert "error: " in failed.stderr.splitlines()[-1]
    assert "No module named 'absent'" in failed.stderr.splitlines()[-1]
    assert not (venv / "installed").exists()
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/nonexistent/python3")
    assert not install.is_alive(venv / "bin" / "python")
    assert run("tiny").returncode == 0
    assert importlib.util.find_spec("tiny") is None
