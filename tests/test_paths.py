"""Nothing leads out of a folder: names in records, links and somebody's folders are left alone.

Catches: a record that deletes, renames or moves a file beside the bundle; a link through which a
stage writes; a folder of somebody's that is emptied because of its name; a lock that two commands
do not share.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import NANO
from here import here, must, refusal

from dsv4.conversion import low_disk
from dsv4.conversion.staging import MARK, mark, staging
from dsv4.errors import UserError
from dsv4.hub.provenance import HEADERS, RECORD, Record, read_record
from dsv4.hub.repository import HubFile
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import write_bytes
from dsv4.storage.backup import FOLDER, Backup

FAST = ("--without-loader", "--jobs", 1)


@pytest.fixture
def bundle(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "bundle")


@pytest.fixture
def outside(tmp_path) -> Path:
    """Somebody's folder beside the bundle, which nothing may change."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "x").write_text("precious")
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "y").write_text("precious too")
    return folder


def state(folder: Path) -> dict[str, str]:
    """Every name below a folder: a link's target, a file's hash and time."""
    return {
        str(path): f"-> {path.readlink()}" if path.is_symlink()
        else f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        if path.is_file() else "not a file"
        for path in sorted(folder.rglob("*"))
    }  # fmt: skip


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "a/", "a\\b", "a\0b", 5, None, ["x"], {}],
)
def test_a_name_that_leads_out_is_no_name(name, tmp_path):
    with pytest.raises(UserError):
        safe_paths.check_name("record", name)


def test_no_link_on_the_way_is_followed(outside, tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    (root / "real" / "x").symlink_to(outside / "x")
    before = state(outside)
    for name in ("link/x", "link/new", "link/deep/y"):
        for step in (
            lambda n: safe_paths.remove(root, n),
            lambda n: safe_paths.file_type(root, n),
            lambda n: safe_paths.move(root, n, "taken"),
            lambda n: safe_paths.move(root, "real/x", n),
            lambda n: os.close(safe_paths.open_regular(root, n, os.O_RDWR)),
            lambda n: write_bytes(root / n, b"new", root),
        ):
            with pytest.raises(UserError, match="a symbolic link"):
                step(name)
    with pytest.raises(UserError, match="a symbolic link"):
        safe_paths.open_regular(root, "real/x", os.O_RDWR)
    write_bytes(root / "real" / "x", b"ours", root)  # a link gets its own bytes, as in the cache
    assert (root / "real" / "x").read_bytes() == b"ours"
    assert state(outside) == before


def test_a_second_name_of_a_foreign_file_is_not_written_on(outside, tmp_path):
    """A partial or a temporary can be a hard link: as dangerous as a symbolic one."""
    (tmp_path / ".config.json.partial").hardlink_to(outside / "x")
    write_bytes(tmp_path / "config.json", b"new")
    (tmp_path / "part").hardlink_to(outside / "x")
    with pytest.raises(UserError, match="another name"):
        safe_paths.open_regular(tmp_path, "part", os.O_WRONLY | os.O_APPEND)
    assert (outside / "x").read_text() == "precious"


# ------------------------------------------------------------------------------ unrepair


def plant(bundle: Path, record: object) -> None:
    (bundle / FOLDER / "files").mkdir(parents=True, exist_ok=True)
    (bundle / FOLDER / "files" / "config.json").write_text("{}")
    (bundle / FOLDER / "repair.json").write_text(json.dumps(record))


RECORDS = {
    "up": {"created": ["../outside/x"]},
    "up in the middle": {"created": ["encoding/../../outside/x"]},
    "absolute": {"created": ["ABSOLUTE"]},
    "through a link": {"created": ["link/x"]},
    "a lock": {"created": [".lock"]},
    "a shard": {"created": ["model-00001-of-00001.safetensors"]},
    "a folder": {"created": ["encoding"]},
    "no list": {"created": "config.json"},
    "no names": {"created": [5, None]},
    "no work": {"unfinished": [1]},
    "no experts": {"unfinished": {"experts": 5}},
    "no mark": {"unfinished": {"experts": [], "mark": {"a": {}}}},
    "no object": [],
}


@pytest.mark.parametrize("kind", RECORDS)
def test_undo_believes_no_record_that_repair_does_not_write(kind, bundle, outside, tmp_path):
    (bundle / "link").symlink_to(outside)
    text = json.dumps(RECORDS[kind]).replace("ABSOLUTE", str(outside / "x"))
    plant(bundle, json.loads(text))
    before = state(tmp_path)
    refusal("repair", "--bundle", bundle, "--undo")
    assert state(tmp_path) == before


@pytest.mark.parametrize("place", [FOLDER, f"{FOLDER}/files", f"{FOLDER}/files/encoding",
                                   f"{FOLDER}/repair.json", "encoding", ".lock"])  # fmt: skip
def test_undo_follows_no_link(place, bundle, outside, tmp_path):
    plant(bundle, {})
    (bundle / FOLDER / "files" / "encoding").mkdir()
    (bundle / FOLDER / "files" / "encoding" / "a.py").write_text("original")
    path = bundle / place
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "x" if path.suffix == ".json" else outside)
    before = state(tmp_path)
    assert (
        "a symbolic link" in refusal("repair", "--bundle", bundle, "--undo")
        or place.count("/") == 2
    )
    assert state(tmp_path) == before


def test_what_else_lies_among_the_originals_stays(bundle):
    config = (bundle / "config.json").read_bytes()
    Backup(bundle).keep(["config.json"])
    write_bytes(bundle / "config.json", b"{}")
    (bundle / FOLDER / "mine.txt").write_text("mine")
    (bundle / FOLDER / "files" / ".x.partial").write_text("half")
    (bundle / FOLDER / "files" / "._config.json").write_text("Finder's")
    assert "left alone" in must("repair", "--bundle", bundle, "--undo")
    assert (bundle / "config.json").read_bytes() == config
    assert [path.name for path in (bundle / FOLDER).iterdir()] == ["mine.txt"]
    assert not (bundle / ".x.partial").exists()


def test_repair_begins_nothing_beside_a_foreign_record(bundle, tmp_path):
    plant(bundle, {"created": ["../x"]})
    before = state(tmp_path)
    refusal("repair", "--bundle", bundle, *FAST)
    assert state(tmp_path) == before


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "jang_config.json",
                                  "tokenizer_config.json"])  # fmt: skip
def test_patch_writes_through_no_temporary(name, bundle, outside):
    (bundle / name).write_text((bundle / name).read_text().replace("eos", "old"))
    (bundle / f".{name}.partial").symlink_to(outside / "x")
    edited = json.loads((bundle / "config.json").read_text()) | {"eos_token_id": 5}
    (bundle / "config.json").write_text(json.dumps(edited))
    content, before = (bundle / name).read_bytes(), state(outside)
    status, _, err = here("patch", "--bundle", bundle)
    assert state(outside) == before
    assert (bundle / f".{name}.partial").is_symlink()
    if (bundle / name).read_bytes() == content and name != "jang_config.json":
        assert status == 1
        assert "a symbolic link" in err


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "fifo"])
def test_finalize_and_repair_write_into_no_link_in_the_place_of_encoding(what, bundle, outside):
    shutil.rmtree(bundle / "encoding")
    path = bundle / "encoding"
    if what == "file":
        path.write_text("mine")
    elif what == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if what == "link" else outside / "no" / "such")
    before = state(outside)
    refusal("finalize", "--source", NANO, "--bundle", bundle)
    status, _, err = here("repair", "--bundle", bundle, "--reference", NANO, *FAST)
    assert status == 1
    assert "encoding" in err
    assert state(outside) == before
    assert not (outside / "no").exists()


def test_finalize_copies_files_of_a_cache_and_no_junk(bundle, source_copy, tmp_path):
    """Reading through a link works: a hub's cache has nothing else."""
    shutil.copytree(NANO / "encoding", source_copy / "encoding", dirs_exist_ok=True)
    for path in [*source_copy.glob("*.json"), *(source_copy / "encoding").glob("*.py")]:
        blob = tmp_path / f"blob-{path.name}"
        path.rename(blob)
        path.symlink_to(blob)
    (source_copy / "encoding" / "._encoding_dsv4.py").write_bytes(b"\0\5\x16\7")
    must("finalize", "--source", source_copy, "--bundle", bundle)
    assert not list(bundle.rglob("._*"))
    assert not any(path.is_symlink() for path in bundle.rglob("*"))


def test_a_folder_in_the_place_of_a_file_is_named(bundle):
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    (bundle / "tokenizer.json" / "mine").write_text("mine")
    line = refusal("finalize", "--source", NANO, "--bundle", bundle)
    assert "tokenizer.json: found a folder" in line
    assert (bundle / "tokenizer.json" / "mine").read_text() == "mine"


def test_a_link_named_like_a_leftover_is_not_ours(bundle, outside):
    (bundle / ".config.json.partial").symlink_to(outside / "x")
    (bundle / ".folder.partial").mkdir()
    (bundle / ".half.partial").write_text("half")
    must("repair", "--bundle", bundle, *FAST)
    assert (bundle / ".config.json.partial").is_symlink()
    assert (bundle / ".folder.partial").is_dir()
    assert not (bundle / ".half.partial").exists()


# ------------------------------------------------------------------------------ locks

WRITERS = {
    "patch": (),
    "finalize": ("--source", NANO),
    "repair": FAST,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_takes_the_lock(name, bundle):
    with locks.locked(bundle):
        assert "another run" in refusal(name, "--bundle", bundle, *WRITERS[name])
    here(name, "--bundle", bundle, *WRITERS[name])
    assert not (bundle / ".lock").exists()


@pytest.mark.parametrize("what", ["fifo", "link", "folder", "somebody's", "second name"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_lock_that_is_none_is_named(name, what, bundle, outside):
    lock = bundle / ".lock"
    if what == "fifo":
        os.mkfifo(lock)
    elif what == "link":
        lock.symlink_to(outside / "new")
    elif what == "folder":
        lock.mkdir()
    elif what == "somebody's":
        lock.write_text("poetry's")
    else:
        lock.hardlink_to(outside / "x")
    before = state(outside), state(bundle)
    assert f"{lock}: found" in refusal(name, "--bundle", bundle, *WRITERS[name])
    assert (state(outside), state(bundle)) == before


def test_somebodys_lock_files_are_not_removed(tmp_path):
    (tmp_path / ".poetry.lock").write_text("mine")
    (tmp_path / ".empty.lock").touch()
    work = "0123456789ab"
    (tmp_path / f".part-1-of-4-{work}.lock").write_text("mine")
    (tmp_path / f".part-2-of-4-{work}.lock").mkdir()
    (tmp_path / f".part-3-of-4-{work}.lock").touch()
    with locks.locked(tmp_path):
        pass
    left = {path.name for path in tmp_path.iterdir()}
    mine = {f".part-{n}-of-4-{work}.lock" for n in (1, 2)}
    assert left == {".poetry.lock", ".empty.lock", *mine}


# ------------------------------------------------------------------------------ the workplace


@pytest.mark.parametrize("converter", ["native", "jang"])
@pytest.mark.parametrize("what", ["folder", "config", "link", "dangling", "file", "linked file"])
def test_a_workplace_that_is_somebodys_is_not_emptied(what, converter, source, outside, tmp_path):
    work = tmp_path / ".made.converting"
    if what == "folder":
        shutil.copytree(outside, work)
    elif what == "config":
        work.mkdir()
        (work / "config.json").write_text("{}")
    elif what == "file":
        work.write_text("mine")
    elif what == "linked file":
        work.mkdir()
        (work / "model-00001-of-XXXXX.safetensors").symlink_to(outside / "x")
    else:
        work.symlink_to(outside if what == "link" else outside / "no")
    before = state(tmp_path)
    line = refusal("convert", "--source", source, "--bundle", tmp_path / "made",
                   "--converter", converter)  # fmt: skip
    assert str(work) in line
    assert state(tmp_path) == before


def test_our_workplace_is_gone_on_with_whatever_a_link_in_it_leads_to(source, outside, tmp_path):
    work = tmp_path / ".made.converting"
    work.mkdir()
    (work / MARK).touch()
    (work / "config.json").write_text("half")
    (work / "encoding").symlink_to(outside)
    before = state(outside)
    must("convert", "--source", source, "--bundle", tmp_path / "made")
    assert state(outside) == before
    assert not work.exists()
    assert not (tmp_path / "made" / MARK).exists()


def test_a_mark_that_a_killed_run_left_in_the_bundle_goes(source, native, tmp_path):
    bundle = shutil.copytree(native, tmp_path / "bundle")
    (bundle / MARK).touch()
    assert "already" in must("convert", "--source", source, "--bundle", bundle)
    assert not (bundle / MARK).exists()


def test_a_workplace_without_work_leaves_nothing(tmp_path):
    with staging(tmp_path / "b") as folder:
        mark(folder)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the source's record


def record_with(source: Path, **entries: dict) -> None:
    head = {"repo": "a/b", "revision": "main", "commit": "0" * 40}
    (source / RECORD).write_text(json.dumps(head | {"files": entries}))


def entry(path: Path | None = None, **more: object) -> dict:
    """A record's entry; of a file as if it had been verified."""
    known = {"size": 1, "sha256": "0" * 64}
    if path is not None:
        known |= {"size": path.stat().st_size, "verified_mtime_ns": path.stat().st_mtime_ns}
    return known | more


@pytest.mark.parametrize("name", ["../outside/x", "ABSOLUTE", "a/../../outside/x", RECORD, ".lock",
                                  f"{HEADERS}/x", ".x.partial", "a\\b"])  # fmt: skip
@pytest.mark.parametrize("command", ["download", "convert", "check"])
def test_a_record_of_other_names_is_refused(name, command, source_copy, outside, tmp_path):
    name = name.replace("ABSOLUTE", str(outside / "x"))
    record_with(source_copy, **{name: entry(outside / "x")})
    before = state(tmp_path)
    more = {
        "download": ["--repo", "a/b"],
        "convert": ["--bundle", tmp_path / "made", "--low-disk", "--repo", "a/b"],
        "check": ["--bundle", tmp_path / "made", "--low-disk", "--repo", "a/b"],
    }
    status, out, err = here(command, "--source", source_copy, *more[command])
    assert status == 1
    assert f"{source_copy / RECORD}: found" in out + err
    assert state(tmp_path) == before


ENTRIES = [
    5, None, [], {}, entry(size="1"), entry(size=True), entry(size=-1), entry(size=float("inf")),
    entry(size=None), entry(sha256=5), entry(sha256="../x"), entry(sha256="A" * 64),
    entry(verified_mtime_ns="now"), entry(low_disk="deleted"), entry(low_disk=["fetched"]),
]  # fmt: skip


@pytest.mark.parametrize("value", ENTRIES, ids=repr)
def test_a_record_of_other_types_is_one_line(value, tmp_path):
    record_with(tmp_path, **{"model-1.safetensors": value})
    with pytest.raises(UserError, match=RECORD):
        read_record(tmp_path)


FORMS = ("[]", "5", '{"repo": 1, "revision": "", "commit": "", "files": {}}',
         '{"repo": "", "revision": "", "commit": "", "files": []}')  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_a_record_of_another_form_is_one_line(text, tmp_path):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(UserError, match=RECORD):
        read_record(tmp_path)


def test_only_shards_come_and_go(source_copy):
    """A record that calls config.json fetched would have it deleted."""
    record_with(source_copy, **{"config.json": entry(source_copy / "config.json",
                                                     low_disk="fetched")})  # fmt: skip
    with pytest.raises(UserError, match="comes and goes"):
        read_record(source_copy)


def test_download_renames_nothing_behind_a_link(source_copy, outside, tmp_path):
    shutil.rmtree(source_copy / "encoding", ignore_errors=True)
    (source_copy / "encoding").symlink_to(outside)
    record_with(source_copy, **{"encoding/x": entry()})
    before = state(tmp_path)
    from dsv4.hub.download import hash_present

    with pytest.raises(UserError, match="a symbolic link"):
        hash_present(source_copy, read_record(source_copy), ["encoding/x"], again=True)
    assert state(tmp_path) == before


def test_a_transfer_writes_through_no_link(outside, tmp_path):
    from dsv4.hub.file_transfer import Transfer, partial_for

    source = tmp_path / "source"
    source.mkdir()
    file = HubFile("encoding/x", 8, "0" * 64)
    transfer = Transfer("a/b", "0" * 40, source, 0, lambda n: None)
    (source / "encoding").symlink_to(outside)
    before = state(outside)
    with pytest.raises(UserError, match="a symbolic link"):
        transfer.fetch(file)
    (source / "encoding").unlink()
    (source / "encoding").mkdir()
    partial_for(source / file.name, file).symlink_to(outside / "x")
    with pytest.raises(UserError, match="a symbolic link"):
        transfer.fetch(file)
    partial_for(source / file.name, file).unlink()
    partial_for(source / file.name, file).hardlink_to(outside / "x")
    with pytest.raises(UserError, match="another name"):
        transfer.fetch(file)
    assert state(outside) == before


def test_headers_go_into_no_link(source_copy, outside):
    (source_copy / HEADERS).symlink_to(outside)
    record = Record("a/b", "main", "0" * 40, {})
    before = state(outside)
    with pytest.raises(UserError, match="a symbolic link"):
        low_disk.fetch_headers(source_copy, record, 0)
    with (
        pytest.raises(UserError, match="a symbolic link"),
        low_disk.header_checkpoint(source_copy, record),
    ):
        pass
    assert state(outside) == before


def test_an_error_of_the_system_names_the_whole_path(tmp_path, monkeypatch):
    """Relative to an open folder the system knows the last part only."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x.json")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match=str(tmp_path / "x.json")):
        write_bytes(tmp_path / "x.json", b"x")
    assert not list(tmp_path.iterdir())
