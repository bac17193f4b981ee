"""Write new shards in the place of old ones, by several threads, at the speed of the disk.

A new shard's header is known before its first byte, so its bytes can be produced in any order:
each shard is a list of pieces, and every worker takes the next piece, wherever it lies, and writes
it to its place. Reading and writing are positioned (`preadv`, `pwrite`) through buffers that each
worker keeps, and what was read or written leaves the page cache, so memory stays flat whatever the
shards' sizes. A shard takes its name when it is whole and on the disk: one thread more waits for
that while the workers go on, so at most one shard a worker, and one more, is open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dsv4.errors import UserError, with_path
from dsv4.storage import filesystem
from dsv4.storage.atomic import AtomicFile
from dsv4.storage.safetensors_file import REDO

COPY_BYTES = 4 << 20  # a piece of what is copied, and what is forgotten at one time
BLOCK_BYTES = 256 << 10  # what is read and then written: small enough for a core's own cache


class WorkerBuffers:
    """What one worker has for itself: an open source file and buffers that it uses again."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1
        self._buffers: dict[str, np.ndarray] = {}

    def buffer(self, use: str, nbytes: int) -> np.ndarray:
        """`nbytes` bytes of scratch space, uint8; the same bytes each time for the same `use`."""
        if use not in self._buffers or len(self._buffers[use]) < nbytes:
            self._buffers[use] = np.empty(nbytes, np.uint8)
        return self._buffers[use][:nbytes]

    def read(self, path: Path, offset: int, target: np.ndarray) -> None:
        """Fill `target` from byte `offset` of `path`. Raises UserError when the file ends
        before."""
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
    """A shard being written: `write` puts bytes to their place, from any thread."""

    def __init__(self, shard: NewShard) -> None:
        self.pieces = shard.pieces()[::-1]  # those that no worker has taken yet, the next one last
        self.left = len(self.pieces)
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
        """Write contiguous `data` at byte `offset`, and let the disk begin with it."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            with with_path(self._replacement.path):
                done += os.pwrite(self._fd, view[done:], offset + done)
        drop_finished_ranges(self._fd, offset, done)

    def commit(self) -> None:
        """Give the whole, durable file its name."""
        self._replacement.commit()

    def discard(self) -> None:
        """Drop what was written."""
        self._replacement.discard()


def preallocate(fd: int, size: int) -> None:
    """Give a new file its size, and its blocks where the system can: a full disk shows at once."""
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
        if error.errno not in {*filesystem.UNKNOWN, errno.EPERM}:  # then it grows as it is written
            raise


def bypass_cache(fd: int) -> None:
    """On macOS keep a file's bytes out of the page cache; `forget` does it elsewhere."""
    if hasattr(fcntl, "F_NOCACHE"):
        with contextlib.suppress(OSError):  # advice, which need not be taken
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)


def drop_page_cache(fd: int, offset: int, nbytes: int) -> None:
    """Tell the system that these bytes are not needed again; Linux starts writing dirty ones."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice, which need not be taken
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def drop_finished_ranges(fd: int, offset: int, nbytes: int) -> None:
    """Forget whole stretches of COPY_BYTES, when a reader or writer comes to the end of one."""
    first, last = (at // COPY_BYTES * COPY_BYTES for at in (offset, offset + nbytes))
    if first < last:
        drop_page_cache(fd, first, last - first)


class Piece(Protocol):
    """Some bytes of a new shard: how many it writes, and how many it reads for that."""

    nbytes: int
    nbytes_read: int

    def write(self, target: ShardWriter, desk: WorkerBuffers) -> None:
        """Produce the bytes and put them to their places in `target`."""


@dataclass(frozen=True)
class CopyPiece:
    """`nbytes` bytes that are copied from `offset` of another file to `place`, both absolute."""

    path: Path
    offset: int
    place: int
    nbytes: int

    @property
    def nbytes_read(self) -> int:
        """The bytes that it reads."""
        return self.nbytes

    def write(self, target: ShardWriter, desk: WorkerBuffers) -> None:
        """Copy through a buffer of at most BLOCK_BYTES."""
        for done in range(0, self.nbytes, BLOCK_BYTES):
            data = desk.buffer("copy", min(BLOCK_BYTES, self.nbytes - done))
            desk.read(self.path, self.offset + done, data)
            target.write(self.place + done, data)


def copy_pieces(path: Path, offset: int, place: int, nbytes: int) -> list[CopyPiece]:
    """Cut a copy of any size into pieces of at most COPY_BYTES."""
    return [
        CopyPiece(path, offset + done, place + done, min(COPY_BYTES, nbytes - done))
        for done in range(0, nbytes, COPY_BYTES)
    ]


@dataclass(frozen=True)
class NewShard:
    """A shard to be written: path, header with length prefix, size in bytes.

    `pieces` lists what to do when the shard's turn comes: for all shards at once it would be long.
    """

    path: Path
    header: bytes
    size: int
    pieces: Callable[[], list[Piece]]


def write_shards(shards: list[NewShard], jobs: int, progress: Callable[[int], object]) -> None:
    """Write the shards in order with `jobs` threads; `progress` is told the bytes of each piece.

    Raises the first error of any thread, after every unfinished shard has been removed; shards
    that were finished stay.
    """
    _WriterPool(shards, jobs, progress).run()


class _WriterPool:
    """The workers' common state; everything in it is changed under `_changed`'s lock."""

    def __init__(
        self, shards: list[NewShard], jobs: int, progress: Callable[[int], object]
    ) -> None:
        self._changed = threading.Condition()
        self._waiting = list(reversed(shards))
        self._current: ShardWriter | None = None
        self._open: set[ShardWriter] = set()
        self._jobs = jobs
        self._progress = progress
        self._error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._jobs)]
        self._flusher = ThreadPoolExecutor(1)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: the workers stop after the piece in hand
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
        desk = WorkerBuffers()
        with contextlib.closing(desk):
            try:
                while (task := self._next()) is not None:
                    target, piece = task
                    piece.write(target, desk)
                    self._finish(target, piece)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _next(self) -> tuple[ShardWriter, Piece] | None:
        """The next piece and where it goes; None when there is none, or another worker failed."""
        with self._changed:
            while self._error is None:
                if self._current and self._current.pieces:
                    return self._current, self._current.pieces.pop()
                if not self._waiting:
                    return None
                if len(self._open) <= self._jobs:
                    self._current = ShardWriter(self._waiting.pop())
                    self._open.add(self._current)
                else:
                    self._changed.wait()
            return None

    def _finish(self, target: ShardWriter, piece: Piece) -> None:
        """Count a piece as written; after a shard's last one the shard is flushed and named."""
        with self._changed:
            self._progress(piece.nbytes)
            target.left -= 1
            if not target.left:
                self._flusher.submit(self._commit, target)

    def _commit(self, target: ShardWriter) -> None:
        """Flush and name a shard, unless a failure came first: then it is dropped in the end."""
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
