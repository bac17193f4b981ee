"""Volumes that lack something, and few open files: what is gone on without, and what stops a run.

The calls are the real ones; lacking_volume.c, preloaded, refuses those that Linux always knows.
Catches: a run that stops because a share has no locks, a broken disk that is taken for such a
share, an error without a path, a check that promises what the volume cannot do.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Commands
from here import must, refusal
from small import save
from test_repair import digests

from dsv4.model.source import open_source
from dsv4.quantization import imatrix
from dsv4.settings import available_cores
from dsv4.storage import disk_space
from dsv4.storage.safetensors_file import read_array

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None,
    reason="LD_PRELOAD and a C compiler are needed",
)
ALL = {
    "flock": errno.ENOTSUP, "fsync_folder": errno.EINVAL, "fsync_file": errno.ENOTSUP,
    "fchmod": errno.EPERM, "link": errno.EPERM, "fallocate": errno.EOPNOTSUPP,
    "ftruncate": errno.EINVAL, "statvfs": 0, "mmap": errno.ENODEV,
}  # fmt: skip
NOTES = ("no locks here", "files cannot be flushed here", "folders cannot be flushed here")
COMMANDS = ("check", "convert", "requantize", "finalize", "patch", "repair", "verify")


class Trouble:
    """Runs commands while calls on files below a folder are refused."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    def said(self, under: Path, rules: dict[str, object], name: str, *arguments) -> tuple[int, str]:
        text = "".join(f" {call}={no}" for call, no in rules.items())
        env = os.environ | {"LACKING_UNDER": str(under), "LACKING": text}
        done = self._commands.run(name, *arguments, env=env)
        return done.returncode, done.stdout + done.stderr

    def must(self, under: Path, rules: dict[str, object], name: str, *arguments) -> str:
        status, said = self.said(under, rules, name, *arguments)
        assert status == 0, said
        return said

    def refusal(self, under: Path, rules: dict[str, object], name: str, *arguments) -> str:
        status, said = self.said(under, rules, name, *arguments)
        assert status == 1, said
        assert "Traceback" not in said
        last = said.splitlines()[-1]
        assert re.fullmatch(rf"error: {re.escape(str(under))}[^:]*: .+; .+", last), said
        return last


@pytest.fixture(scope="module")
def trouble(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    shim = folder / "lacking.so"
    code = ROOT / "tests" / "lacking_volume.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, code, "-ldl"], check=True)
    with Commands(os.environ | {"LD_PRELOAD": str(shim)}) as commands:
        yield Trouble(commands)


@pytest.fixture
def bundle(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "bundle")


# ------------------------------------------------------------------------------ what lacks


def test_a_volume_that_lacks_everything_takes_the_same_bundle(trouble, source, native, tmp_path):
    """Each weakness is said once, and no byte is another."""
    bundle = tmp_path / "bundle"
    folders = ("--source", source, "--bundle", bundle)
    said = trouble.must(tmp_path, ALL, "convert", *folders)
    assert [said.count(note) for note in NOTES] == [1, 1, 1], said
    assert digests(bundle) == digests(native)
    for name in ("requantize", "finalize", "patch"):
        arguments = folders if name != "patch" else ("--bundle", bundle)
        assert "no locks here" in trouble.must(tmp_path, ALL, name, *arguments)
    usual = shutil.copytree(native, tmp_path / "usual")
    must("finalize", "--source", source, "--bundle", usual)
    must("patch", "--bundle", usual)
    assert digests(bundle) == digests(usual)


def test_repair_without_links_copies_and_undo_puts_every_byte_back(
    trouble, source, stock_copy, tmp_path
):
    before = digests(stock_copy)
    job = ("repair", "--bundle", stock_copy, "--source", source, "--without-loader")
    said = trouble.must(tmp_path, ALL, *job)
    assert said.count("no hard links here: repair copies the originals") == 1
    kept = (stock_copy / ".before-repair" / "files").glob("*.safetensors")
    assert {path.stat().st_nlink for path in kept} == {1}
    trouble.must(tmp_path, ALL, "repair", "--bundle", stock_copy, "--undo")
    assert digests(stock_copy) == before


@pytest.mark.parametrize(
    ("call", "errnos"),
    {
        "flock": ("ENOTSUP", "ENOSYS", "ENOLCK", "EOPNOTSUPP"),
        "fsync_folder": ("EINVAL", "ENOTSUP", "EBADF"),
        "fsync_file": ("EINVAL", "ENOSYS"),
        "fchmod": ("EPERM", "ENOTSUP"),
    }.items(),
)
def test_each_way_to_say_so_is_understood(trouble, bundle, call, errnos):
    for name in errnos:
        (bundle / "config.json").write_text((bundle / "config.json").read_text() + " ")
        said = trouble.must(bundle, {call: getattr(errno, name)}, "patch", "--bundle", bundle)
        assert ("note: " in said) == (call != "fchmod"), (name, said)


def test_check_says_what_the_volume_lacks_and_leaves_nothing(trouble, source, tmp_path):
    job = ("check", "--source", source, "--bundle", tmp_path / "b", "--python", "/nowhere")
    lacking = trouble.said(tmp_path, ALL, *job)[1]
    for note in (*NOTES, "no hard links here"):
        assert f"??  bundle volume: {note}" in lacking
    assert "??  space: an unknown number of bytes free" in lacking
    assert "??" not in re.sub("runtime.*", "", trouble.said(tmp_path, {}, *job)[1])
    assert "Input/output error" in trouble.said(tmp_path, {"flock": errno.EIO}, *job)[1]
    assert not list(tmp_path.iterdir())


def test_an_imatrix_that_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    path = tmp_path / "some.dat"
    path.write_bytes(bytes(range(200)))
    mapped = imatrix.map_file(path)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(imatrix.np, "memmap", refused)
    assert (imatrix.map_file(path) == mapped).all()


def test_a_volume_that_does_not_say_what_is_free_is_not_full(tmp_path, monkeypatch):
    def refused(path: Path) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented", str(path))

    monkeypatch.setattr(os, "statvfs", refused)
    assert disk_space.free_bytes(tmp_path) is None
    disk_space.check_free_space(tmp_path, 1 << 60, "", "")


# ------------------------------------------------------------------------------ what stops


def test_a_volumes_root_is_no_bundle(source, tmp_path, monkeypatch):
    """Its workplace would lie beside the mount, on another volume: hours, and then EXDEV."""
    mount = tmp_path / "disk"
    mount.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mount)
    line = refusal("convert", "--source", source, "--bundle", mount)
    assert f"{mount}: found a volume's own root" in line
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


FAILURES = {
    "flock": ("EIO",),
    "fsync_folder": ("EIO",),
    "fsync_file": ("EIO", "ENOSPC", "EDQUOT"),
    "fchmod": ("EIO",),
    "rename": ("EIO", "EXDEV", "EROFS"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "EFBIG"),
    "read": ("EIO",),
}


@pytest.mark.parametrize("call", FAILURES)
def test_a_disk_that_fails_is_no_volume_that_lacks(trouble, bundle, call):
    """One line with the path; what was there stays, and the same command goes on."""
    (bundle / "config.json").write_text((bundle / "config.json").read_text() + " ")
    before = digests(bundle)
    for name in FAILURES[call]:
        trouble.refusal(bundle, {call: getattr(errno, name)}, "patch", "--bundle", bundle)
        if call != "fsync_folder":  # which comes after the name: all of it is new then
            left = digests(bundle)
            left.pop(".lock", None)  # empty, and the next run's
            assert left == before, name
    trouble.must(bundle, {}, "patch", "--bundle", bundle)


@pytest.mark.parametrize(
    ("call", "name", "todo"),
    [
        ("write", "EFBIG", "SHARD_BYTES=4e9"),
        ("fallocate", "EDQUOT", "your quota"),
        ("fsync_file", "EIO", "check the disk"),
    ],
)
def test_a_shard_that_cannot_be_written_is_named_and_the_next_run_goes_on(
    trouble, source, native, tmp_path, call, name, todo
):
    job = ("convert", "--source", source, "--bundle", tmp_path / "b")
    line = trouble.refusal(tmp_path / ".b.converting", {call: getattr(errno, name)}, *job)
    assert "model-00001-of-00001.safetensors: " in line
    assert todo in line
    must(*job)
    assert digests(tmp_path / "b") == digests(native)


def test_every_read_that_fails_names_its_file(trouble, source, bundle):
    """The first read fails, then the second one, and so on until the command needs no more."""
    job = ("finalize", "--source", source, "--bundle", bundle)
    for n in range(100):
        for path in bundle.glob("tokenizer*"):
            path.unlink()
        status, _ = trouble.said(source, {"read": f"{errno.EIO}:{n}"}, *job)
        if status == 0:
            break
        trouble.refusal(source, {"read": f"{errno.EIO}:{n}"}, *job)
    assert 5 < n < 99


def test_only_one_module_flushes_locks_and_links():
    """What it knows of volumes, and the path, would be missing elsewhere."""
    calls = re.compile(r"os\.(fsync|fdatasync|fchmod|link)\(|flock\(|lockf\(|portalocker\.lock\(")
    found = {
        path.name
        for path in (ROOT / "scripts").rglob("*.py")
        if calls.search(path.read_text(encoding="utf-8"))
    }
    # install.py runs before any package of ours can be imported
    assert found - {"install.py"} == {"filesystem.py"}


# ------------------------------------------------------------------------------ open files

FEW = 64


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, FEW))


@pytest.mark.full
def test_sixty_four_open_files_are_enough_for_any_number_of_shards(source, tmp_path):
    """Soft and hard limit alike, so that nothing can be raised; 16 threads are asked for."""
    many, bundle = tmp_path / "many", tmp_path / "bundle"
    shutil.copytree(source, many, ignore=shutil.ignore_patterns("model*"))
    opened = open_source(source)
    arrays = {n: (t.dtype, read_array(t)) for n, t in opened.tensors.items()}
    save(many, arrays, 3, opened.config)
    assert len(list(many.glob("*.safetensors"))) > 100
    folders = ("--source", many, "--bundle", bundle)
    jobs = ("--jobs", 16)
    with Commands(before=limit) as commands:
        for name, *arguments in (
            ("check", *folders, "--python", sys.executable),
            ("convert", *folders, *jobs, "--shard-bytes", 30_000),
            ("requantize", *folders, *jobs, "--quantizer", "affine4g32", "--part", "1/1"),
            ("requantize", *folders, *jobs, "--quantizer", "affine4g32"),
            ("finalize", *folders),
            ("patch", "--bundle", bundle),
            ("verify", *folders, *jobs, "--without-loader"),
            ("repair", *folders, *jobs, "--without-loader"),
        ):
            done = commands.run(name, *arguments)
            assert done.returncode == 0, (name, done.stderr)
    assert len(list(bundle.glob("*.safetensors"))) > 100


def test_the_soft_limit_is_raised_and_threads_fit_what_is_left(monkeypatch):
    from dsv4 import errors

    limits = {"now": (256, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    assert errors.run(lambda: 0) == 0
    assert limits["now"] == (10240, resource.RLIM_INFINITY)  # as macOS will have it
    limits["now"] = (24, 24)
    assert available_cores() == 1
