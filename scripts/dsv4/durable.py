"""Files that are never half-written under their final name.

A file is written beside its target under a temporary name, fsynced, renamed with `os.replace`, and
the folder is fsynced, so that after a crash the name holds either the old bytes or all of the new.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".partial"


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_for(path: Path) -> Path:
    """The name under which `path` is written until it is complete: hidden, in the same folder."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary sibling of `path` for writing; on success it takes `path`'s name.

    When the body raises, the temporary is removed and `path` keeps its old bytes. A temporary that
    a killed run left behind is overwritten.
    """
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> bool:
    """Give `path` the content `data`; False when it has it already and nothing was written."""
    if path.is_file() and path.read_bytes() == data:
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
    if target.is_file() and target.stat().st_size == source.stat().st_size:
        return write_bytes(target, source.read_bytes())
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
