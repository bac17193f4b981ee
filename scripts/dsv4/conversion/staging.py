"""The staging folder: a hidden folder beside the bundle, renamed to the bundle when complete.

A run continues in the staging folder that a killed run left. A foreign folder is never emptied. A
staging folder has the file .converting, or holds only files that a converter makes: shards of the
native converter (recognized by their metadata), unfinished shards of upstream's, temporary files
and locks.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import TEMPORARY_SUFFIX, fsync_folder
from dsv4.storage.disk_space import MARK, check_not_volume_root, staging_folder
from dsv4.storage.system_files import is_system_file
from dsv4.text import short_repr
from dsv4.toolchain import upstream_converter

UPSTREAMS = re.compile(r"model-\d{5}-of-XXXXX\.safetensors")  # names before their number is known


@contextlib.contextmanager
def staging(bundle: Path, part: tuple[int, int, str] | None = None) -> Iterator[Path]:
    """Yield the bundle's staging folder, made and locked. A `part` shares it with other parts.

    Raises UserError when another run holds it, and when a link or a foreign folder has its name.
    """
    check_not_volume_root(bundle)
    bundle.parent.mkdir(parents=True, exist_ok=True)
    folder = staging_folder(bundle)
    check_own_folder(folder)
    folder.mkdir(exist_ok=True)
    try:
        with locks.locked(folder, part):
            yield folder
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or holds unfinished work
            if [path.name for path in folder.iterdir()] == [MARK]:
                safe_paths.remove(folder, MARK)
            folder.rmdir()


def check_own_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is missing or a staging folder."""
    kind = safe_paths.expect_type(
        folder.parent, folder.name, safe_paths.DIRECTORY, safe_paths.NOTHING
    )
    if kind == safe_paths.NOTHING or safe_paths.file_type(folder, MARK) == safe_paths.FILE:
        return
    strangers = sorted(p.name for p in folder.iterdir() if not is_converter_file(folder, p.name))
    if strangers:
        raise UserError(
            f"{folder}", f"{short_repr(strangers[0])} in a folder that no convert left",
            "no folder, or a killed run's", "move it away: bundles are made under that name",
        )  # fmt: skip


def is_converter_file(folder: Path, name: str) -> bool:
    """Return True for a regular file that only a converter makes."""
    if safe_paths.file_type(folder, name) != safe_paths.FILE:
        return False
    temporary = name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)
    if temporary or is_system_file(name) or locks.is_lock(name) or UPSTREAMS.fullmatch(name):
        return True
    return name.endswith(".safetensors") and upstream_converter.is_native(folder / name)


def mark(folder: Path) -> None:
    """Write the file .converting, before the first byte of a bundle is written."""
    os.close(safe_paths.open_regular(folder, MARK, os.O_RDWR))
    fsync_folder(folder)


def move_into_place(folder: Path, bundle: Path) -> None:
    """Rename the finished staging folder to the bundle, and unmark it."""
    locks.lock_for(folder).unlink()
    fsync_folder(folder)
    folder.replace(bundle)
    fsync_folder(bundle.parent)
    unmark(bundle)


def unmark(bundle: Path) -> None:
    """Remove the file .converting, which a killed run may have left in a finished bundle."""
    if safe_paths.file_type(bundle, MARK) == safe_paths.FILE and not (bundle / MARK).stat().st_size:
        safe_paths.remove(bundle, MARK)
