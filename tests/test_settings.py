"""What make hands over: each setting as it was written, read by no shell, checked where it enters.

The real make runs on a copy of the Makefile whose .venv holds a stub that writes down what it was
given; what scripts make of that is asked of the scripts' own functions. Catches: a quote or a
semicolon that runs, a value that make expands, a folder named ~, a number that no stage could use,
a variable of somebody's environment that a script obeys, another Python's packages.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS

from dsv4 import settings
from dsv4.errors import UserError
from dsv4.quantization.formats import add_quantizer_options
from dsv4.toolchain.python_env import toolchain_environment

STUB = """#!/bin/sh
case "$1" in -ISc) exec {python} "$@";; esac
exec {python} -ISc 'import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("given.json", "w"))' "$@"
"""
ODD = '/Volumes/Dave\'s "SSD"/a  b; touch ran; `touch ran` $(touch ran) $HOME #x|y&z\\'
TOUCH = "$(shell touch ran)"


class Copy:
    """The Makefile with a stub in .venv; what was given to the last script that make ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy2(ROOT / "Makefile", folder)
        for name in ("stacks", "lab"):
            files = shutil.ignore_patterns("__pycache__", "*.md")
            shutil.copytree(SCRIPTS / name, folder / "scripts" / name, ignore=files)
        library = "python{}.{}".format(*sys.version_info)
        for name in (".venv", ".toolchain/new", ".toolchain/old"):
            (folder / name / "bin").mkdir(parents=True)
            (folder / name / "lib" / library / "site-packages").mkdir(parents=True)
            python = folder / name / "bin" / "python"
            python.write_text(STUB.format(python=sys.executable))
            python.chmod(0o755)
        for name in ("patches/load_jangtq.patch", "patches/mlx_model.patch"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        shutil.copy2(ROOT / "requirements.txt", folder)
        shutil.copy2(folder / "requirements.txt", folder / ".venv" / "installed")
        for name in ("new", "old"):
            pins = folder / "scripts" / "stacks" / f"{name}.txt"
            shutil.copy2(pins, folder / ".toolchain" / name / "installed")

    def make(self, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        known = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))}
        (self.folder / "given.json").unlink(missing_ok=True)
        command = ["make", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=known | env, capture_output=True, text=True
        )
        assert not (self.folder / "ran").exists()
        return done

    def given(self, *arguments: str, **env: str) -> tuple[list[str], dict[str, str]]:
        """(command line, settings) of the script that `make …` runs."""
        done = self.make(*arguments, **env)
        assert done.returncode == 0, done.stderr
        words, environ = json.loads((self.folder / "given.json").read_text())
        return words, environ

    def refusal(self, *arguments: str, **env: str) -> str:
        """The one line that make or install.py ends with, before make's own."""
        done = self.make(*arguments, **env)
        assert done.returncode != 0
        assert not (self.folder / "given.json").exists()
        said = [line for line in done.stderr.splitlines() if ": *** [" not in line]
        assert len(said) == 1, done.stderr
        return said[0]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy of it's"))


# --------------------------------------------------------------------------------- what make gives

TARGETS = {
    "serve": ("BUNDLE", "PORT", "TOOLCHAIN_PYTHON"),
    "repair": ("BUNDLE", "SOURCE", "QUANTIZER", "IMATRIX", "JOBS", "REFERENCE", "DRY_RUN"),
    "inspect": ("REPO", "AGAINST", "REVISION"),
    "publish": ("TO", "PRIVATE", "BUNDLE"),
    "verify": ("LEVEL", "BUNDLE", "SOURCE", "REPO", "CONVERTER", "SHARD_BYTES", "VERIFY_HASHES"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_setting_arrives_as_it_was_written_and_nothing_of_it_runs(copy, target):
    for value in (ODD, TOUCH, "x'; touch ran; '", "a\ntouch ran\n"):
        said = dict.fromkeys(TARGETS[target], value)
        words, environ = copy.given(target, *(f"{name}={text}" for name, text in said.items()))
        option = [word.removeprefix("--source=") for word in words if word.startswith("--source=")]
        given = handed(environ) | ({"SOURCE": option[0]} if option else {})
        assert said.items() <= given.items()
        # REPO's origin tells inspect whether it was meant
        if target != "inspect":
            assert said.items() <= handed(copy.given(target, **said)[1]).items()


def handed(environ: dict[str, str]) -> dict[str, str]:
    prefix = settings.PREFIX
    return {k.removeprefix(prefix): v for k, v in environ.items() if k.startswith(prefix)}


def test_config_mk_is_expanded_and_keeps_the_blanks_before_a_comment(copy):
    config = copy.folder / "config.mk"
    config.write_text(
        "ROOM = /Volumes/Dave's SSD\nSOURCE = $(ROOM)/a \\# b $$c\nBUNDLE = /x   # note\n"
    )
    try:
        given = handed(copy.given("serve")[1])
    finally:
        config.unlink()
    assert given["SOURCE"] == "/Volumes/Dave's SSD/a # b $c"
    with pytest.raises(
        UserError, match=r"BUNDLE: found '/x   ', expected no blanks at its ends; in config"
    ):
        settings.parse_setting("BUNDLE", given["BUNDLE"])


def test_a_tilde_is_the_home_folder(copy, monkeypatch):
    given = handed(copy.given("serve", "BUNDLE=~/my models~/x", HOME="/home/d'oh")[1])
    assert given["BUNDLE"] == "/home/d'oh/my models~/x"
    assert handed(copy.given("serve", HOME="/h")[1])["BUNDLE"].startswith("/h/.cache/huggingface/")
    monkeypatch.setenv("HOME", "/h")
    assert settings.parse_path("~/x") == Path("/h/x")
    with pytest.raises(settings.InvalidValue, match="nobody's home"):
        settings.parse_path("~no-such-user/x")


REFUSED_BY_MAKE = {
    "MODEL": ("pro", "", "nano ", "flash nano", TOUCH, "no nano"),
    "STACK": ("../lab/x", "new/", "lm vlm", "", "%", TOUCH, "no new", "*"),
}


def test_an_unknown_model_or_stack_is_one_line(copy):
    for name, values in REFUSED_BY_MAKE.items():
        for value in values:
            line = copy.refusal("serve", f"{name}={value}")
            assert f"{name}: found '{value}', expected" in line


def test_the_toolchain_is_that_of_the_stack_and_no_path_becomes_a_target(copy):
    given = handed(copy.given("serve", "STACK=old")[1])
    assert given["TOOLCHAIN_PYTHON"] == ".toolchain/old/bin/python"
    for value in (".toolchain/x;touch ran/bin/python", ".toolchain/a b/bin/python"):
        given = handed(copy.given("serve", f"TOOLCHAIN_PYTHON={value}")[1])
        assert given["TOOLCHAIN_PYTHON"] == value


def test_a_source_of_the_command_line_must_be_there_and_any_other_may_be_gone(copy):
    words, environ = copy.given("repair", "SOURCE=/a 'b'")
    assert (words[1:], environ["RECIPE_SOURCE"]) == (["--source=/a 'b'"], "")
    assert copy.given("repair", SOURCE="/a 'b'")[0][1:] == []
    assert copy.given("verify", "LOW_DISK=1")[1]["RECIPE_SOURCE"] == ""
    for off in ("0", "no", "false", ""):
        assert copy.given("verify", f"LOW_DISK={off}")[1]["RECIPE_SOURCE"]


def test_inspect_wants_its_repository_from_the_command_line(copy):
    assert "REPO: found none on the command line" in copy.refusal("inspect")
    assert copy.given("inspect", "REPO=a/b", REVISION="mine")[0][1:] == ["--revision", "main"]


# ------------------------------------------------------------------------------ what scripts take

WRONG = {
    "PORT": ("99999", "0", "x", "8010; touch ran"),
    "JOBS": ("0", "-1", "1e3", "9999", "٣"),
    "LEVEL": ("7", "0", "two"),
    "SHARD_BYTES": ("5e9; touch x", "nan", "0", "-5", "5GB"),
    "LOW_DISK": ("maybe", "2", "-"),
    "MTP": ("dropped", "Source", "1"),
    "DROP_MTP": ("maybe", "source"),
    "BUNDLE": (" /x", "/x\t", "/x\ny", "~no-such-user/x", "$(HOME)/x", "${HOME}/x"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_no_command_could_take_is_one_line_that_names_the_setting(name, monkeypatch):
    for value in WRONG[name]:
        monkeypatch.setenv(settings.PREFIX + name, value)
        with pytest.raises(UserError, match=f"^{name}: found .*, expected ") as stopped:
            settings.add_setting(argparse.ArgumentParser(), name)
        assert "\n" not in str(stopped.value)
        with pytest.raises(UserError, match=f"^{name}: "):  # by each command, also one without it
            settings.add_setting(argparse.ArgumentParser(), "TO")


def test_a_quantizer_or_converter_that_nobody_knows_is_one_line(monkeypatch):
    monkeypatch.setenv("RECIPE_QUANTIZER", "int4")
    with pytest.raises(UserError, match="QUANTIZER: found 'int4', expected one of lossless, "):
        add_quantizer_options(argparse.ArgumentParser())
    monkeypatch.setenv("RECIPE_CONVERTER", "gguf")
    with pytest.raises(UserError, match="CONVERTER: found 'gguf', expected one of native, jang"):
        settings.add_setting(argparse.ArgumentParser(), "CONVERTER", choices=("native", "jang"))


def test_a_switch_has_words_for_on_and_off():
    assert [settings.parse_switch(word) for word in ("1", "yes", "TRUE")] == [True] * 3
    assert [settings.parse_switch(word) for word in ("0", "no", "False")] == [False] * 3


def test_an_option_wins_over_makes_setting_and_a_stray_variable_is_none(monkeypatch, tmp_path):
    def port(*words: str) -> int:
        parser = argparse.ArgumentParser()
        settings.add_setting(parser, "PORT", default=8010)
        return parser.parse_args(words).port

    monkeypatch.setenv("PORT", "1")
    assert port() == 8010
    monkeypatch.setenv("RECIPE_PORT", "2")
    assert (port(), port("--port", "3")) == (2, 3)
    monkeypatch.setenv("RECIPE_PORT", "")
    assert port() == 8010
    for name in ("PYTHONPATH", "PYTHONHOME"):
        monkeypatch.setenv(name, "/evil")
    children = toolchain_environment()
    assert not [
        name for name in children if name.startswith((settings.PREFIX, "PYTHONP", "PYTHONH"))
    ]


def test_a_source_that_make_names_and_that_is_gone_is_noted(monkeypatch, tmp_path, capsys):
    (tmp_path / "freed" / ".headers").mkdir(parents=True)  # as LOW_DISK=1 leaves it
    for name in ("gone", "freed"):
        monkeypatch.setenv("RECIPE_SOURCE", str(tmp_path / name))
        parser = argparse.ArgumentParser()
        settings.add_setting(parser, "SOURCE", if_there=True)
        assert parser.parse_args([]).source is None
        assert "SOURCE: nothing lies at" in capsys.readouterr().err
    (tmp_path / "freed" / "model.safetensors").touch()
    parser = argparse.ArgumentParser()
    settings.add_setting(parser, "SOURCE", if_there=True)
    assert parser.parse_args([]).source == tmp_path / "freed"


def test_a_make_within_make_is_told_the_same(copy):
    """demo and selftest run `make all`; what the command line or the environment says goes on."""
    within = copy.folder / "within.mk"
    within.write_text("include Makefile\nwithin: ; $(MAKE) -f within.mk serve\n")
    try:
        said = {"QUANTIZER": "opt'imal", "JOBS": "$(shell touch ran)2", "STACK": "old"}
        for way in ({"env": said}, {"line": [f"{k}={v}" for k, v in said.items()]}):
            line = ["-f", "within.mk", "within", *way.get("line", [])]
            given = handed(copy.given(*line, **way.get("env", {}))[1])
            assert given["TOOLCHAIN_PYTHON"] == ".toolchain/old/bin/python"
            assert {name: given[name] for name in ("QUANTIZER", "JOBS")}.items() <= said.items()
    finally:
        within.unlink()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("QUANTISER", "QUANTIZER"), ("BUNDEL", "BUNDLE"), ("WHATEVER", "one of those in the README")],
)
def test_a_setting_that_there_is_not_is_refused_with_the_nearest(copy, name, nearest):
    line = f"{name}: found no setting of that name, expected {nearest}.  Stop."
    assert copy.refusal("serve", f"{name}=x").endswith(line)
    config = copy.folder / "config.mk"
    config.write_text(f"{name} = x\n")
    try:
        if name != "WHATEVER":
            assert copy.refusal("serve").endswith(line)
        else:  # a variable that other lines of config.mk may use
            copy.given("serve")
    finally:
        config.unlink()
