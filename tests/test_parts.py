"""convert --part: several processes on one folder, any of them killed, and the bytes of one run.

Catches: a part that clears another's work away, two divisions that overlap, parts with different
settings, a bundle that appears before it is whole.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS, script
from here import here, must, refusal
from test_repair import digests

BYTES = ("--shard-bytes", 40_000)


@pytest.fixture(scope="module")
def single(source, tmp_path_factory) -> dict[str, str]:
    """What one run makes."""
    bundle = tmp_path_factory.mktemp("single") / "bundle"
    must("convert", "--source", source, "--bundle", bundle, *BYTES)
    return digests(bundle)


def start(source: Path, bundle: Path, part: str) -> subprocess.Popen:
    folders = ["--source", source, "--bundle", bundle, *BYTES, "--part", part, "--jobs", 1]
    command = [sys.executable, SCRIPTS / "convert.py", *folders]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)


def test_three_parts_at_once_one_of_them_killed_make_the_bytes_of_one_run(source, single, tmp_path):
    bundle, work = tmp_path / "bundle", tmp_path / ".bundle.converting"
    parts = [start(source, bundle, f"{k}/3") for k in (1, 2)]
    third = ("--source", source, "--bundle", bundle, *BYTES, "--part", "3/3", "--jobs", 1)
    killed = script("convert", *third, kill=("os", "rename", 1, signal.SIGKILL))
    for part in parts:
        assert "run once without --part" in part.communicate(timeout=120)[0]
        assert part.returncode == 0
    assert killed.returncode == -signal.SIGKILL
    assert not bundle.exists()
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("model-*")}
    must("convert", "--source", source, "--bundle", bundle, *BYTES, "--part", "3/3")
    assert {f for f in single if f.startswith("model-0")} == {p.name for p in work.glob("model-*")}
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in work.glob("model-*")}.items()
    said = must("convert", "--source", source, "--bundle", bundle, *BYTES)
    assert " 0 of " in said
    assert digests(bundle) == single
    again = must("convert", "--source", source, "--bundle", bundle, *BYTES, "--part", "1/3")
    assert "already" in again


def test_a_last_run_makes_what_a_part_left_out(source, single, tmp_path):
    bundle = tmp_path / "bundle"
    must("convert", "--source", source, "--bundle", bundle, *BYTES, "--part", "2/3")
    must("convert", "--source", source, "--bundle", bundle, *BYTES)
    assert digests(bundle) == single


def test_parts_that_do_not_belong_together_are_refused(source, tmp_path):
    job = ("convert", "--source", source, "--bundle", tmp_path / "bundle", *BYTES)
    must(*job, "--part", "2/3")
    before = digests(tmp_path)
    assert "a part of 3 begun" in refusal(*job, "--part", "2/4")
    for other in (("--quantizer", "mxfp4"), ("--shard-bytes", 50_000)):
        line = refusal(*job, *other, "--part", "1/3")
        assert "with other settings begun" in line
        assert f"{tmp_path / '.bundle.converting'}: " in line
    assert digests(tmp_path) == before


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "/3", "1/", "-1/3", "1/3/3", "1/0", "", "a/b"])
def test_a_part_that_is_none_is_refused_in_one_line(part, source, tmp_path):
    run = here("convert", "--source", source, "--bundle", tmp_path / "bundle", "--part", part)
    assert run[0] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [("--low-disk", "--repo", "a/b"), ("--converter", "jang")])
def test_a_part_goes_with_neither_little_disk_nor_upstream(other, source, tmp_path):
    where = ("--source", source, "--bundle", tmp_path / "b")
    assert here("convert", *where, "--part", "1/2", *other)[0] == 2
    assert not list(tmp_path.iterdir())
