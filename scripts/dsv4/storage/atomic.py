"""Write files atomically: a file never has its final name before it is complete.

A file is written beside its target under a temporary name, fsynced, renamed with `os.replace`, and
the folder is fsynced, so that after a crash the name holds either the old bytes or all of the new.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dsv4.errors import UserError, with_path
from dsv4.storage import filesystem, safe_paths

TEMPORARY_SUFFIX = ".partial"
REPLACEABLE = (
    safe_paths.FILE,
    safe_paths.LINK,
    safe_paths.NOTHING,
)  # a link itself goes, not what it leads to


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        filesystem.flush_folder(fd, folder)
    finally:
        os.close(fd)


def temporary_for(path: Path) -> Path:
    """Return the hidden name in the same folder under which `path` is written."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


class AtomicFile:
    """A file being written under a temporary name; `commit` gives it its own, `discard` drops it.

    The temporary is a new file in the folder itself: what a killed run left there is removed, and
    a link is not followed, neither in its place nor, below `root`, on the way to it.
    Raises UserError for a link or a folder in the temporary's place, and for a folder in `path`'s.
    """

    def __init__(self, path: Path, root: Path | None = None) -> None:
        self.path = path
        with contextlib.ExitStack() as opening:
            name = path.relative_to(root).as_posix() if root else path.name
            way = safe_paths.open_parent(root or path.parent, name, make=root is not None)
            self._folder, self._name = opening.enter_context(way)
            if safe_paths.file_type_at(self._folder, self._name) not in REPLACEABLE:
                raise UserError(f"{path}", "no plain file", "a file, or nothing", safe_paths.AWAY)
            temporary = temporary_for(path)
            self._temporary = temporary.name
            file = safe_paths.create_new(self._folder, self._temporary, temporary)
            self.file = os.fdopen(file, "w+b")
            self._open = opening.pop_all()
            self._done = False

    def commit(self) -> None:
        """Make the bytes durable, then rename the temporary to `path`."""
        with safe_paths.with_full_path(self.path):
            self.file.flush()
            filesystem.flush(self.file.fileno(), self.path)
            with contextlib.suppress(FileNotFoundError):
                mode = os.stat(self._name, dir_fd=self._folder).st_mode
                filesystem.set_mode(self.file.fileno(), self.path, mode & 0o777)
            self.file.close()  # some servers rename no file that is open
            safe_paths.replace_at(self._folder, self._temporary, self._folder, self._name)
            filesystem.flush_folder(self._folder, self.path.parent)
        self._open.close()
        self._done = True

    def discard(self) -> None:
        """Remove the temporary; `path` keeps its old bytes. Does nothing after `commit`."""
        if not self._done:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._folder)
            with contextlib.suppress(OSError):  # a full disk: what is lost was to be dropped
                self.file.close()
            self._open.close()
            self._done = True


@contextlib.contextmanager
def atomic_writer(path: Path, root: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a temporary sibling of `path` for writing; on success it takes `path`'s name.

    When the body raises, the temporary is removed and `path` keeps its old bytes. root: the folder
    that `path` must not lead out of; folders between them are made.
    """
    replacement = AtomicFile(path, root)
    try:
        with with_path(path):
            yield replacement.file
        replacement.commit()
    finally:
        replacement.discard()


def write_bytes(path: Path, data: bytes, root: Path | None = None) -> bool:
    """Write `data` to `path`. Return False, and write nothing, when it has that content."""
    with with_path(path):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return False
    with atomic_writer(path, root) as file:
        file.write(data)
    return True


def write_json(path: Path, value: Any, root: Path | None = None) -> bool:
    """Write `value` as JSON (indent 2, UTF-8). Return False when nothing changed.

    Raises ValueError for a NaN or an infinity, which JSON does not have.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_bytes(path, text.encode(), root)


def copy_file(source: Path, target: Path, root: Path | None = None) -> bool:
    """Copy one file durably. Return False when `target` has the same bytes."""
    with with_path(f"{source} or {target}"):  # a copy does not say which of the two it was
        if target.is_file() and filecmp.cmp(source, target, shallow=False):
            return False
    with source.open("rb") as reader, atomic_writer(target, root) as writer:
        while data := read_chunk(reader, source):
            writer.write(data)
    return True


def read_chunk(reader: IO[bytes], path: Path) -> bytes:
    """Read the next MiB of an open file. An OSError names `path`."""
    with with_path(path):
        return reader.read(1 << 20)


def format_bytes(size: int) -> str:
    """Return a size as text: `format_bytes(160_000_000_000)` is '160.0 GB (149.0 GiB)'."""
    if size < 1 << 20:
        return f"{size:,} bytes"
    if size < 1e9:
        return f"{size / 1e6:.1f} MB ({size / 2**20:.1f} MiB)"
    return f"{size / 1e9:.1f} GB ({size / 2**30:.1f} GiB)"
