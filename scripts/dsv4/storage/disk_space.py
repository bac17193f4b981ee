"""Volumes and folders: how much there is, how much is free, and where a bundle is made."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage.atomic import format_bytes

MARK = ".converting"  # in a workplace: a converter made this folder, and may empty it


def staging_folder(bundle: Path) -> Path:
    """The hidden sibling in which a bundle is made."""
    return bundle.with_name(f".{bundle.name}.converting")


def existing_parent(path: Path) -> Path:
    """The nearest folder of `path` that exists: where its volume is mounted."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int | None:
    """Bytes that a user may still write on the volume of `path`; None where it does not say."""
    try:
        stat = os.statvfs(existing_parent(path))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else None  # some FUSE: all is 0


def check_not_volume_root(bundle: Path) -> None:
    """Raise UserError for the root of a volume: what is made beside it would lie on another one,
    and could not take its name."""
    if bundle.is_mount():
        raise UserError(
            f"{bundle}", "a volume's own root", "a folder on it", f"BUNDLE={bundle}/NAME"
        )


def check_free_space(path: Path, need: int, why: str, todo: str) -> None:
    """Raise UserError when the volume of `path` says that it lacks room for `need` bytes."""
    there = free_bytes(path)
    if there is not None and need > there:
        raise UserError(
            f"{path}", f"{format_bytes(there)} free", f"{format_bytes(need)}{why}", todo
        )


def same_volume(a: Path, b: Path) -> bool:
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 when it is not there."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
