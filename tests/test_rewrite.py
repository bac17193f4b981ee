"""The shard writer alone: what happens when a thread meets an error."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from dsv4.stop import Stop
from dsv4.storage.rewrite import Desk, NewShard, Target, copy_pieces, rewrite
from dsv4.storage.shard import Slot, header_bytes, read_array, read_shard


def copying(path: Path, origin: Path, nbytes: int) -> NewShard:
    """A shard with one tensor, copied from byte 3 of `origin`."""
    header = header_bytes([Slot("a", "U8", (nbytes,))], {})
    pieces = copy_pieces(origin, 3, len(header), nbytes)
    return NewShard(path, header, len(header) + nbytes, lambda: pieces)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_a_copy_larger_than_a_buffer_arrives_whole(tmp_path: Path, jobs: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 9_500_000, np.uint8)
    (tmp_path / "origin").write_bytes(b"xyz" + data.tobytes())
    shards = [copying(tmp_path / f"{i}", tmp_path / "origin", len(data)) for i in range(3)]
    seen: list[int] = []
    rewrite(shards, jobs, seen.append)
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
    with pytest.raises(Stop, match="cut: found its end at byte 500"):
        rewrite(shards, 1, lambda _: None)
    assert read_shard(tmp_path / "a").size > 900
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "cut", "origin"}


def test_a_read_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()  # reading a folder is an error of the system's, as EIO is
    with pytest.raises(OSError, match="folder"):
        rewrite([copying(tmp_path / "a", tmp_path / "folder", 10)], 2, lambda _: None)
    assert not list(tmp_path.glob(".*"))


def test_no_more_shards_are_open_than_workers(tmp_path: Path) -> None:
    """Extra disk stays below one shard a worker."""
    (tmp_path / "origin").write_bytes(bytes(2000))
    most = 0
    lock = threading.Lock()

    class Watching:
        nbytes = 1

        def write(self, target: Target, desk: Desk) -> None:
            nonlocal most
            with lock:
                most = max(most, len(list(tmp_path.glob(".*.partial"))))

    shards = []
    for i in range(20):
        plain = copying(tmp_path / f"{i}", tmp_path / "origin", 1000)
        pieces = [*plain.pieces(), Watching(), Watching()]
        shards.append(NewShard(plain.path, plain.header, plain.size, lambda p=pieces: p))
    rewrite(shards, 3, lambda _: None)
    assert 1 <= most <= 3
