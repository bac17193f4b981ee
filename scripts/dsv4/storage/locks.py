"""Lock a folder before a stage changes it, so that one run writes at a time.

A whole run holds FOLDER/.lock exclusively. Parts of one job share it, and each holds a file of its
own, .part-K-of-N-WORK.lock. That file stays when the part ends, so that a part of another division
or of other work, which would overlap, is refused. A whole run removes them all. The system drops
the locks of a process that dies. portalocker does the locking (flock). On a volume without locks
the user must start one run at a time (dsv4/storage/filesystem.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import portalocker

from dsv4.errors import UserError, with_path
from dsv4.storage import filesystem, safe_paths

LOCK = ".lock"
OF_PART = re.compile(r"\.part-([0-9]+)-of-([0-9]+)-([0-9a-f]{12})\.lock")


def lock_for(folder: Path) -> Path:
    """Return the path of the lock of a whole folder."""
    return folder / LOCK


def is_lock(name: str) -> bool:
    """Return True for the name of a lock file of this module."""
    return name == LOCK or OF_PART.fullmatch(name) is not None


@contextlib.contextmanager
def locked(folder: Path, part: tuple[int, int, str] | None = None) -> Iterator[None]:
    """Hold `folder` while the body runs; with `part`, (k, n, work), the k-th of n parts of it.

    work: what all parts must agree on, any text. A whole run leaves no lock behind.
    Raises UserError when another run holds what is asked for, and for a part of another number or
    work.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            _hold_lock_file(lock_for(folder), alone=part is None, stays=part is not None)
        )
        if part is None:
            remove_stale(folder)
        else:
            k, n, work = part
            mine = f".part-{k}-of-{n}-{hashlib.sha256(work.encode()).hexdigest()[:12]}{LOCK}"
            stack.enter_context(_hold_lock_file(folder / mine, alone=True, stays=True))
            try:
                check_parts(folder, mine)
            except UserError:
                (folder / mine).unlink(missing_ok=True)
                raise
        yield


def check_parts(folder: Path, mine: str) -> None:
    """Raise UserError when a part of another number, or of other work, was here before this one."""
    _, n, work = OF_PART.fullmatch(mine).groups()
    for path in sorted(folder.glob(f".part-*{LOCK}")):
        if (of := OF_PART.fullmatch(path.name)) and of.group(2, 3) != (n, work):
            found = f"a part of {of[2]}" if of[2] != n else "a part with other settings"
            todo = f"go on as it was begun, or delete {folder}/.part-*{LOCK} when none runs"
            found = f"{found} begun ({path.name})"
            raise UserError(f"{folder}", found, f"parts of one job, --part K/{n}", todo)


def remove_stale(folder: Path) -> None:
    """Remove the lock files of parts, if they are empty plain files."""
    for path in folder.glob(f".part-*{LOCK}"):
        ours = is_lock(path.name) and safe_paths.file_type(folder, path.name) == safe_paths.FILE
        if ours and not path.stat().st_size:
            path.unlink()


@contextlib.contextmanager
def _hold_lock_file(path: Path, alone: bool, stays: bool) -> Iterator[None]:
    """Hold one lock file, and remove it in the end unless it `stays`.

    Does not wait and follows no link. Raises UserError for a link, for anything but a plain file,
    and for a file with content, which is no lock.
    """
    handle = _open_and_lock(path, alone)
    try:
        yield
    finally:
        if not stays:
            path.unlink(missing_ok=True)
        os.close(handle)


def _open_and_lock(path: Path, alone: bool) -> int:
    """Open and lock the file; return its descriptor.

    A run that ends removes its lock file. A file that was opened before and locked after that locks
    nothing, and is opened again. Some file systems return a new inode number at every stat; after
    the last attempt, that the name exists is taken as proof.
    """
    for last in (False, False, True):
        handle = safe_paths.open_regular(path.parent, path.name, os.O_RDWR)
        try:
            if _try_lock(handle, path, alone, last):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise UserError(f"{path.parent}", "another run that just ended", "one run", "start it again")


def _try_lock(handle: int, path: Path, alone: bool, last: bool) -> bool:
    """Lock an open file; return False when its name is another file's or, at `last`, gone."""
    with with_path(path):
        status = os.fstat(handle)
    if status.st_size:
        raise UserError(f"{path}", "a file with content", "an empty lock", safe_paths.AWAY)
    try:
        filesystem.lock_file(handle, path, alone)
    except portalocker.AlreadyLocked as error:
        raise UserError(f"{path.parent}", "another run at work on it", "one run on each part",
                   "wait until it ends") from error  # fmt: skip
    return path.exists() and (last or path.stat().st_ino == status.st_ino)
