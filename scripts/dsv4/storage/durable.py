"""Files that are never half-written under their final name.

A file is written beside its target under a temporary name, fsynced, renamed with `os.replace`, and
the folder is fsynced, so that after a crash the name holds either the old bytes or all of the new.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dsv4.stop import naming

TEMPORARY_SUFFIX = ".partial"


def fsync(fd: int) -> None:
    """Put a file's bytes on the disk; on macOS past the drive's own cache, where fsync stops."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # file systems without it still have fsync
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def temporary_for(path: Path) -> Path:
    """The name under which `path` is written until it is complete: hidden, in the same folder."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


class Replacement:
    """A file being written under a temporary name; `commit` gives it its own, `discard` drops it.

    A temporary that a killed run left behind is overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_for(path)
        self.file = self.temporary.open("w+b")

    def commit(self) -> None:
        """Make the bytes durable, then the name; `path` never names anything but whole files."""
        with naming(self.path):
            self.file.flush()
            fsync(self.file.fileno())
        if self.path.exists():
            shutil.copymode(self.path, self.temporary)
        self.temporary.replace(self.path)
        fsync_folder(self.path.parent)
        self.file.close()

    def discard(self) -> None:
        """Remove the temporary; `path` keeps its old bytes. Does nothing after `commit`."""
        if not self.file.closed:
            self.temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a full disk: what is lost was to be dropped
                self.file.close()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary sibling of `path` for writing; on success it takes `path`'s name.

    When the body raises, the temporary is removed and `path` keeps its old bytes.
    """
    replacement = Replacement(path)
    try:
        with naming(path):
            yield replacement.file
        replacement.commit()
    finally:
        replacement.discard()


def write_bytes(path: Path, data: bytes) -> bool:
    """Give `path` the content `data`; False when it has it already and nothing was written."""
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return False
    with replacing(path) as file:
        file.write(data)
    return True


def write_json(path: Path, value: Any) -> bool:
    """Give `path` the JSON text of `value` (indent 2, UTF-8); False when nothing changed."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return write_bytes(path, text.encode())


def copy_file(source: Path, target: Path) -> bool:
    """Copy one file durably; False when `target` has the same bytes already."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return False
    with source.open("rb") as reader, replacing(target) as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
    return True


def human(size: int) -> str:
    """A byte count as people read it: `human(160_000_000_000)` is '160.0 GB (149.0 GiB)'."""
    if size < 1 << 20:
        return f"{size:,} bytes"
    if size < 1e9:
        return f"{size / 1e6:.1f} MB ({size / 2**20:.1f} MiB)"
    return f"{size / 1e9:.1f} GB ({size / 2**30:.1f} GiB)"
