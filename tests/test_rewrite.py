"""The shard writer alone: a thread that meets an error, a flush beside the work."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from dsv4.errors import UserError
from dsv4.storage import filesystem, shard_writer
from dsv4.storage.safetensors_file import TensorSpec, header_bytes, read_array, read_shard
from dsv4.storage.shard_writer import (
    COPY_BYTES,
    Blocks,
    NewShard,
    WorkerBuffers,
    copy_pieces,
    write_shards,
)


def copying(path: Path, origin: Path, nbytes: int) -> NewShard:
    """A shard with one tensor, copied from byte 3 of `origin`."""
    header = header_bytes([TensorSpec("a", "U8", (nbytes,))], {})
    pieces = copy_pieces(origin, 3, len(header), nbytes)
    return NewShard(path, header, len(header) + nbytes, lambda: pieces)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_a_copy_larger_than_a_buffer_arrives_whole(tmp_path: Path, jobs: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 9_500_000, np.uint8)
    (tmp_path / "origin").write_bytes(b"xyz" + data.tobytes())
    shards = [copying(tmp_path / f"{i}", tmp_path / "origin", len(data)) for i in range(3)]
    seen: list[int] = []
    write_shards(shards, jobs, seen.append)
    assert sum(seen) == 3 * len(data)
    for shard in shards:
        assert np.array_equal(read_array(read_shard(shard.path).tensors["a"]), data)


def test_a_source_that_ends_early_keeps_the_old_shard(tmp_path: Path) -> None:
    """Shards before it are new, it and those after it as they were; nothing else is left."""
    (tmp_path / "origin").write_bytes(bytes(1000))
    (tmp_path / "cut").write_bytes(bytes(500))
    for name in "abc":
        (tmp_path / name).write_bytes(b"old")
    origins = {"a": "origin", "b": "cut", "c": "origin"}
    shards = [copying(tmp_path / name, tmp_path / of, 900) for name, of in origins.items()]
    with pytest.raises(UserError, match="cut: found its end at byte 500"):
        write_shards(shards, 1, lambda _: None)
    assert read_shard(tmp_path / "a").size > 900
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "cut", "origin"}


def test_a_read_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()  # reading a folder is an error of the system's, as EIO is
    with pytest.raises(OSError, match="folder"):
        write_shards([copying(tmp_path / "a", tmp_path / "folder", 10)], 2, lambda _: None)
    assert not list(tmp_path.glob(".*"))


def test_no_more_shards_are_open_than_workers_and_one(tmp_path: Path) -> None:
    """Extra disk stays below one shard a worker, and the one that is flushed."""
    (tmp_path / "origin").write_bytes(bytes(2000))
    most = 0
    lock = threading.Lock()

    class Watching:
        nbytes = 1

        def blocks(self, buffers: WorkerBuffers) -> Blocks:
            nonlocal most
            with lock:
                most = max(most, len(list(tmp_path.glob(".*.partial"))))
            yield from ()

    shards = []
    for i in range(20):
        plain = copying(tmp_path / f"{i}", tmp_path / "origin", 1000)
        pieces = [*plain.pieces(), Watching(), Watching()]
        shards.append(NewShard(plain.path, plain.header, plain.size, lambda p=pieces: p))
    write_shards(shards, 3, lambda _: None)
    assert 1 <= most <= 4


def test_workers_go_on_while_a_shard_is_flushed(tmp_path: Path, monkeypatch) -> None:
    """And it has no name before that is done."""
    (tmp_path / "origin").write_bytes(bytes(range(256)) * 4)
    shards = [copying(tmp_path / name, tmp_path / "origin", 1000) for name in "ab"]
    named, done, written, begun = [], [], threading.Event(), threading.Event()

    def flush(fd: int, path: Path) -> None:
        begun.set()
        assert written.wait(5), "the worker waits for the flush"
        named.append(sorted(path.name for path in tmp_path.glob("[ab]")))

    def progress(_: int) -> None:
        done.append(1)
        if len(done) == 2 and begun.wait(5):
            written.set()

    monkeypatch.setattr(filesystem, "flush", flush)
    write_shards(shards, 1, progress)
    assert named == [[], ["a"]]


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_shard_without_pieces_is_written(tmp_path: Path, jobs: int) -> None:
    """More of them than may be open at one time, before and after one with data."""
    (tmp_path / "origin").write_bytes(bytes(2000))
    header = header_bytes([], {})
    empty = [NewShard(tmp_path / f"e{i}", header, len(header), list) for i in range(6)]
    shards = [*empty[:5], copying(tmp_path / "a", tmp_path / "origin", 1000), empty[5]]
    done = threading.Event()
    worker = threading.Thread(
        target=lambda: (write_shards(shards, jobs, lambda _: None), done.set()), daemon=True
    )
    worker.start()
    assert done.wait(20)
    for shard in shards:
        assert read_shard(shard.path).size == shard.size


def test_no_thread_waits_while_another_reserves_space_or_reports(
    tmp_path: Path, monkeypatch
) -> None:
    """The second shard's space is reserved until the first shard has its last piece counted, and
    the first piece's progress is reported until that space is being reserved."""
    (tmp_path / "origin").write_bytes(bytes(COPY_BYTES + 2000))
    shards = [copying(tmp_path / name, tmp_path / "origin", COPY_BYTES + 1000) for name in "ab"]
    reserving, named, stuck = threading.Event(), threading.Event(), []
    reserve, flush = shard_writer.preallocate, filesystem.flush

    def preallocate(fd: int, size: int) -> None:
        if reserve_calls:
            reserving.set()
            stuck.extend([] if named.wait(5) else ["space is reserved with the lock held"])
        reserve_calls.append(fd)
        reserve(fd, size)

    def flushed(fd: int, path: Path) -> None:
        named.set()
        flush(fd, path)

    def progress(_: int) -> None:
        if not reserving.wait(5):
            stuck.append("progress is reported with the lock held")

    reserve_calls: list[int] = []
    monkeypatch.setattr(shard_writer, "preallocate", preallocate)
    monkeypatch.setattr(filesystem, "flush", flushed)
    write_shards(shards, 3, progress)
    assert not stuck


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_flush_that_fails_names_nothing_and_can_be_done_again(
    tmp_path: Path, monkeypatch, error: int
) -> None:
    (tmp_path / "origin").write_bytes(bytes(range(256)) * 4)
    shards = [copying(tmp_path / name, tmp_path / "origin", 1000) for name in "abcd"]
    flushed = []

    def flush(fd: int, path: Path) -> None:
        flushed.append(fd)
        if len(flushed) == 2:
            raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(filesystem, "flush", flush)
        with pytest.raises(OSError, match=os.strerror(error)) as raised:
            write_shards(shards, 1, lambda _: None)
    assert raised.value.filename == str(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "origin"}
    write_shards(shards[1:], 1, lambda _: None)
    assert {path.name for path in tmp_path.iterdir()} == {*"abcd", "origin"}
    for shard in shards:
        assert read_shard(shard.path).size == shard.size


def test_a_kill_during_a_flush_leaves_no_name(tmp_path: Path) -> None:
    (tmp_path / "origin").write_bytes(bytes(2000))
    child = os.fork()
    if not child:
        filesystem.flush = lambda fd, path: os.kill(os.getpid(), signal.SIGKILL)
        write_shards(
            [copying(tmp_path / name, tmp_path / "origin", 900) for name in "ab"], 1, print
        )
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not list(tmp_path.glob("[ab]"))
    write_shards(
        [copying(tmp_path / name, tmp_path / "origin", 900) for name in "ab"], 1, lambda _: None
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "origin"}
