"""Disk space: sizes of folders, free bytes of volumes, and the staging folder of a bundle."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage.atomic import format_bytes

MARK = ".converting"  # in a staging folder: a converter made it, and may empty it


def staging_folder(bundle: Path) -> Path:
    """Return the hidden sibling folder in which a bundle is made."""
    return bundle.with_name(f".{bundle.name}.converting")


def existing_parent(path: Path) -> Path:
    """Return `path` or its nearest parent that exists, to ask for its volume."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int | None:
    """Return the bytes a user may still write on the volume of `path`, None if unknown."""
    try:
        stat = os.statvfs(existing_parent(path))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else None  # some FUSE: all is 0


def check_not_volume_root(bundle: Path) -> None:
    """Raise UserError for the root of a volume.

    The staging folder beside it would be on another volume, and could not be renamed to it.
    """
    if bundle.is_mount():
        raise UserError(
            f"{bundle}", "a volume's own root", "a folder on it", f"BUNDLE={bundle}/NAME"
        )


def check_free_space(path: Path, need: int, why: str, todo: str) -> None:
    """Raise UserError when the volume of `path` has less than `need` free bytes."""
    free = free_bytes(path)
    if free is not None and need > free:
        raise UserError(f"{path}", f"{format_bytes(free)} free", f"{format_bytes(need)}{why}", todo)


def same_volume(a: Path, b: Path) -> bool:
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below `folder`, 0 when it does not exist."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
