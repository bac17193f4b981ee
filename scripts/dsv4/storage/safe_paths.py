"""Open, make, rename and remove names inside an untrusted folder, never outside it.

A name from a record is checked first. Then it is opened from the folder's descriptor, part by part,
without following symbolic links. Anything unexpected in the way is reported and left alone. The
folder itself may be reached through a link, because the user named it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage import filesystem
from dsv4.text import short_repr

FILE, DIRECTORY, LINK = "a file", "a folder", "a symbolic link"
OTHER, NOTHING = "neither file nor folder", "nothing"
AWAY = "look at it, and move it away"
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def check_name(where: str, name: object) -> str:
    """Return `name` if it is a path inside a folder. Raises UserError for any other value."""
    parts = name.split("/") if isinstance(name, str) else [""]
    if {"", ".", ".."} & set(parts) or any(mark in f"{name}" for mark in ("\\", "\0")):
        raise UserError(where, f"the name {short_repr(name)}", "a path inside the folder",
                   "do not use that file: nothing was touched")  # fmt: skip
    return str(name)


@contextlib.contextmanager
def open_parent(root: Path, name: str, make: bool = False) -> Iterator[tuple[int, str]]:
    """Open the parent folder of `name`; yield its descriptor and the last part of the name.

    make: make missing folders on the way. Raises UserError for a link or a file in the
    place of one, FileNotFoundError when one is missing.
    """
    *folders, last = check_name(f"{root}", name).split("/")
    handle = os.open(root, _FOLDER_FLAGS)
    try:
        for n, part in enumerate(folders, 1):
            handle = _open_subfolder(handle, part, root.joinpath(*folders[:n]), make)
        yield handle, last
    finally:
        os.close(handle)


def _open_subfolder(handle: int, part: str, path: Path, make: bool) -> int:
    """Open a folder in an open folder, and close that one."""
    if make and file_type_at(handle, part) == NOTHING:
        with contextlib.suppress(FileExistsError), with_full_path(path):
            os.mkdir(part, dir_fd=handle)
            filesystem.flush_folder(handle, path.parent)
    if (found := file_type_at(handle, part)) not in (DIRECTORY, NOTHING):
        raise UserError(f"{path}", found, f"a folder inside {path.parent}", AWAY)
    with with_full_path(path):
        below = os.open(part, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=handle)
    os.close(handle)
    return below


@contextlib.contextmanager
def with_full_path(path: Path) -> Iterator[None]:
    """Raise OSErrors with the whole path: calls relative to a descriptor know a part only."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{path}") from error


def file_type_at(handle: int, last: str) -> str:
    """Return the type of a name in an open folder: FILE, DIRECTORY, LINK, OTHER or NOTHING."""
    try:
        mode = os.stat(last, dir_fd=handle, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return NOTHING
    if stat.S_ISLNK(mode):
        return LINK
    return FILE if stat.S_ISREG(mode) else DIRECTORY if stat.S_ISDIR(mode) else OTHER


def file_type(root: Path, name: str) -> str:
    """Return the type of a name inside `root`. Raises UserError for a link on the way to it."""
    try:
        with open_parent(root, name) as (handle, last), with_full_path(root / name):
            return file_type_at(handle, last)
    except FileNotFoundError:
        return NOTHING


def expect_type(root: Path, name: str, *kinds: str) -> str:
    """Return the type of a name. Raises UserError when it is none of `kinds`."""
    if (found := file_type(root, name)) not in kinds:
        raise UserError(f"{root / name}", found, " or ".join(kinds), AWAY)
    return found


def open_regular(root: Path, name: str, flags: int) -> int:
    """Open a plain file without other hard links for writing; make it when missing.

    Raises UserError for anything else: a link, or a file that lies elsewhere too.
    """
    with open_parent(root, name, make=True) as (handle, last), with_full_path(root / name):
        if (found := file_type_at(handle, last)) in (FILE, NOTHING):
            how = flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(last, how, 0o666, dir_fd=handle)
            status = os.fstat(file)
            if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
                return file
            os.close(file)
            found = "a file that has another name too"
    raise UserError(f"{root / name}", found, "a file of this folder alone", AWAY)


def create_new(handle: int, last: str, path: Path) -> int:
    """Make a new file in an open folder and open it for reading and writing.

    A plain file that a killed run left there is removed first. Raises UserError for anything else.
    """
    found = file_type_at(handle, last)
    if found not in (FILE, NOTHING):
        raise UserError(f"{path}", found, "no file, or what a killed run left", AWAY)
    with with_full_path(path):
        if found == FILE:
            os.unlink(last, dir_fd=handle)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(last, flags, 0o666, dir_fd=handle)


def move(root: Path, name: str, target: str, make: bool = False) -> None:
    """Rename a file or a link inside `root` durably, and replace what has that name.

    Two names of one file become one. Raises UserError for a folder in either place.
    """
    expect_type(root, name, FILE, LINK)
    expect_type(root, target, FILE, LINK, NOTHING)
    with (
        open_parent(root, name) as (old, source),
        open_parent(root, target, make) as (new, last),
        with_full_path(root / target),
    ):
        replace_at(old, source, new, last)
        filesystem.flush_folder(new, (root / target).parent)
        if file_type_at(old, source) != NOTHING:  # replacing a file by itself does nothing
            os.unlink(source, dir_fd=old)
        filesystem.flush_folder(old, (root / name).parent)


def replace_at(old: int, source: str, new: int, last: str) -> None:
    """Rename a file from one open folder to another, and replace the target."""
    os.rename(source, last, src_dir_fd=old, dst_dir_fd=new)


def remove(root: Path, name: str) -> bool:
    """Remove a file or a link itself. Return False if there is none; UserError for a folder."""
    if expect_type(root, name, FILE, LINK, NOTHING) == NOTHING:
        return False
    with open_parent(root, name) as (handle, last), with_full_path(root / name):
        os.unlink(last, dir_fd=handle)
        filesystem.flush_folder(handle, (root / name).parent)
    return True


def remove_folder(root: Path, name: str) -> bool:
    """Remove an empty folder. Return False for anything else."""
    try:
        with open_parent(root, name) as (handle, last):
            os.rmdir(last, dir_fd=handle)
        return True
    except OSError:
        return False


def clear_folder(folder: Path, keep: set[str]) -> None:
    """Remove everything in a folder but `keep`. Links are removed, not their targets."""
    for path in folder.iterdir():
        if path.name not in keep:
            whole = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if whole else path.unlink()


def files_below(root: Path, name: str) -> list[str]:
    """Return the names of all files and links below a folder, relative to it; [] if it is missing.

    Raises UserError for a link to a folder, and for what is neither file nor folder.
    """
    if expect_type(root, name, DIRECTORY, NOTHING) == NOTHING:
        return []
    top, found = root / name, []
    for folder, folders, files in os.walk(top, followlinks=False):
        paths = [Path(folder) / entry for entry in sorted([*folders, *files])]
        for path in paths:
            below = path.relative_to(top).as_posix()
            if path.is_symlink() and path.is_dir():
                raise UserError(f"{path}", "a link to a folder", "files and folders", AWAY)
            if expect_type(top, below, FILE, LINK, DIRECTORY) != DIRECTORY:
                found.append(below)
    return sorted(found)
