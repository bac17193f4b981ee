"""Write new shards in the place of old ones with several threads.

A shard's header is known before its data, so its bytes can be written in any order. Each shard is a
list of pieces. Every worker takes the next piece, which reads or computes blocks of bytes, and
writes each block at its offset. Reads and writes are positioned (`preadv`, `pwrite`) and use
buffers that each worker keeps. Bytes that were read or written are dropped from the page cache, so
memory use does not grow with the size of the shards. A finished shard is flushed to disk and then
renamed, by one more thread, while the workers go on. At most `jobs` + 1 shards are open at one
time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dsv4.errors import UserError, with_path
from dsv4.storage import filesystem
from dsv4.storage.atomic import AtomicFile
from dsv4.storage.safetensors_file import REDO

COPY_BYTES = 4 << 20  # of one copied piece, and of one range dropped from the page cache
BLOCK_BYTES = 256 << 10  # read and then written at once: fits into the cache of a core


class WorkerBuffers:
    """Per-thread state: one open source file and reusable buffers."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1
        self._buffers: dict[str, np.ndarray] = {}

    def buffer(self, use: str, nbytes: int) -> np.ndarray:
        """Return `nbytes` bytes of scratch space, uint8. Each `use` has one buffer."""
        if use not in self._buffers or len(self._buffers[use]) < nbytes:
            self._buffers[use] = np.empty(nbytes, np.uint8)
        return self._buffers[use][:nbytes]

    def read(self, path: Path, offset: int, target: np.ndarray) -> None:
        """Fill `target` from byte `offset` of `path`.

        Raises UserError when the file is too short.
        """
        view = memoryview(target).cast("B")
        self._open(path)
        done = 0
        while done < len(view):
            with with_path(path):
                n = os.preadv(self._fd, [view[done:]], offset + done)
            if n == 0:
                raise UserError(f"{path}", f"its end at byte {offset + done:,}", "more bytes", REDO)
            done += n
        drop_finished_ranges(self._fd, offset, done)

    def _open(self, path: Path) -> None:
        if self._path != path:
            self.close()
            self._fd = os.open(path, os.O_RDONLY)
            self._path = path
            bypass_cache(self._fd)

    def close(self) -> None:
        """Close the source file."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._path = -1, None


class ShardWriter:
    """A shard that is being written. `write` may be called from any thread."""

    def __init__(self, shard: NewShard) -> None:
        self.pieces = shard.pieces()[::-1]  # not taken yet; the next one is last
        self.unfinished = len(self.pieces)
        self._replacement = AtomicFile(shard.path)
        self._fd = self._replacement.file.fileno()
        bypass_cache(self._fd)
        try:
            with with_path(shard.path):
                preallocate(self._fd, shard.size)
            self.write(0, np.frombuffer(shard.header, np.uint8))
        except OSError:
            self.discard()
            raise

    def write(self, offset: int, data: np.ndarray) -> None:
        """Write contiguous `data` at byte `offset`."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            with with_path(self._replacement.path):
                done += os.pwrite(self._fd, view[done:], offset + done)
        drop_finished_ranges(self._fd, offset, done)

    def commit(self) -> None:
        """Flush the file to disk and rename it to the shard's name."""
        self._replacement.commit()

    def discard(self) -> None:
        """Remove the temporary file."""
        self._replacement.discard()


def preallocate(fd: int, size: int) -> None:
    """Set the size of a new file and reserve its blocks, so that a full disk fails early."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in filesystem.UNKNOWN:
                raise
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in {*filesystem.UNKNOWN, errno.EPERM}:  # then it grows with each write
            raise


def bypass_cache(fd: int) -> None:
    """Keep a file out of the page cache on macOS. Elsewhere `drop_page_cache` does it."""
    if hasattr(fcntl, "F_NOCACHE"):
        with contextlib.suppress(OSError):  # only a hint to the system
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def drop_page_cache(fd: int, offset: int, nbytes: int) -> None:
    """Drop these bytes from the page cache. Linux starts to write those that are dirty."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only a hint to the system
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def drop_finished_ranges(fd: int, offset: int, nbytes: int) -> None:
    """Drop each COPY_BYTES-aligned range from the page cache when its end is reached."""
    first, last = (at // COPY_BYTES * COPY_BYTES for at in (offset, offset + nbytes))
    if first < last:
        drop_page_cache(fd, first, last - first)


Blocks = Iterator[tuple[int, np.ndarray]]  # (offset in the shard, contiguous data)


class Piece(Protocol):
    """Some bytes of a new shard, `nbytes` in number."""

    nbytes: int

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield all of the bytes. A block may lie in `buffers` and is valid until the next one."""


@dataclass(frozen=True)
class CopyPiece:
    """A copy of `nbytes` bytes from byte `offset` of another file to byte `place` of the shard."""

    path: Path
    offset: int
    place: int
    nbytes: int

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield blocks of at most BLOCK_BYTES."""
        for done in range(0, self.nbytes, BLOCK_BYTES):
            data = buffers.buffer("copy", min(BLOCK_BYTES, self.nbytes - done))
            buffers.read(self.path, self.offset + done, data)
            yield self.place + done, data


def copy_pieces(path: Path, offset: int, place: int, nbytes: int) -> list[CopyPiece]:
    """Return a copy of any size as pieces of at most COPY_BYTES."""
    return [
        CopyPiece(path, offset + done, place + done, min(COPY_BYTES, nbytes - done))
        for done in range(0, nbytes, COPY_BYTES)
    ]


@dataclass(frozen=True)
class NewShard:
    """A shard to be written: path, header with length prefix, size in bytes.

    `pieces` is called when the shard is opened: the lists of all shards would take much memory.
    """

    path: Path
    header: bytes
    size: int
    pieces: Callable[[], list[Piece]]


def write_shards(shards: list[NewShard], jobs: int, progress: Callable[[int], object]) -> None:
    """Write the shards in order with `jobs` threads.

    `progress` is called with the bytes of each piece, by one thread at a time. Raises the first
    error of any thread after the temporary files have been removed. Finished shards stay.
    """
    _WriterPool(shards, jobs, progress).run()


class _WriterPool:
    """The state that the workers share. It is changed with the lock of `_changed` held.

    What may take long (reserving space, progress, flushing) is done without that lock.
    """

    def __init__(
        self, shards: list[NewShard], jobs: int, progress: Callable[[int], object]
    ) -> None:
        self._changed = threading.Condition()
        self._waiting = list(reversed(shards))
        self._current: ShardWriter | None = None
        self._open: set[ShardWriter] = set()
        self._jobs = jobs
        self._opening = False
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._jobs)]
        self._flusher = ThreadPoolExecutor(1)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: each worker finishes its piece
            self._fail(error)
        finally:
            for thread in threads:
                if thread.is_alive():
                    thread.join()
            self._flusher.shutdown()
            for target in self._open:
                target.discard()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        buffers = WorkerBuffers()
        with contextlib.closing(buffers):
            try:
                while (task := self._next()) is not None:
                    target, piece = task
                    for offset, data in piece.blocks(buffers):
                        target.write(offset, data)
                    self._finish(target, piece)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self) -> tuple[ShardWriter, Piece] | None:
        """Return the next piece and its shard, or None after the last one or an error."""
        while True:
            with self._changed:
                self._changed.wait_for(self._is_ready)
                if self._error is not None:
                    return None
                if self._current and self._current.pieces:
                    return self._current, self._current.pieces.pop()
                if not self._waiting:
                    return None
                self._opening = True
                shard = self._waiting.pop()
            self._open_next(shard)

    def _is_ready(self) -> bool:
        """True when a worker can take a piece, open a shard, or end."""
        if self._error is not None or (self._current and self._current.pieces):
            return True
        return not self._opening and (not self._waiting or len(self._open) <= self._jobs)

    def _open_next(self, shard: NewShard) -> None:
        """Open a shard whose pieces are the next ones. One without pieces is complete already."""
        writer = ShardWriter(shard)
        with self._changed:
            self._open.add(writer)
            self._current = writer
            self._opening = False
            if not writer.unfinished:
                self._flusher.submit(self._commit, writer)
            self._changed.notify_all()

    def _finish(self, target: ShardWriter, piece: Piece) -> None:
        """Count a piece as written. After the last one of a shard, flush and rename the shard."""
        with self._progress_lock:
            self._progress(piece.nbytes)
        with self._changed:
            target.unfinished -= 1
            if not target.unfinished:
                self._flusher.submit(self._commit, target)

    def _commit(self, target: ShardWriter) -> None:
        """Flush and rename a shard. After an error do nothing: `run` removes the temporary file."""
        if self._error is not None:
            return
        try:
            target.commit()
        except BaseException as error:
            self._fail(error)
            return
        with self._changed:
            self._open.discard(target)
            self._changed.notify_all()
