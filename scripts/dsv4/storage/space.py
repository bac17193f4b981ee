"""Volumes and folders: how much there is, how much is free, and where a bundle is made."""

from __future__ import annotations

import os
from pathlib import Path

MARK = ".converting"  # in a workplace: a converter made this folder, and may empty it


def workplace_of(bundle: Path) -> Path:
    """The hidden sibling in which a bundle is made."""
    return bundle.with_name(f".{bundle.name}.converting")


def existing_parent(path: Path) -> Path:
    """The nearest folder of `path` that exists: where its volume is mounted."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free(path: Path) -> int:
    """Bytes that a user may still write on the volume of `path`."""
    stat = os.statvfs(existing_parent(path))
    return stat.f_bavail * stat.f_frsize


def same_volume(a: Path, b: Path) -> bool:
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 when it is not there."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
