"""One writer at a time: the lock that every stage takes before it changes a folder.

A whole run holds FOLDER/.lock alone. Parts of one job hold it together, and each of the files that
it writes alone, so that parts exclude each other exactly where they overlap. The system drops the
locks of a process that dies. portalocker does the locking (flock).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import portalocker

from dsv4.stop import Stop
from dsv4.storage import inside

LOCK = ".lock"


def lock_for(folder: Path, file: str = "") -> Path:
    """The lock of a whole folder, or of one file in it: hidden."""
    return folder / f".{file}{LOCK}" if file else folder / LOCK


@contextlib.contextmanager
def held(folder: Path, part: Iterable[str] | None = None) -> Iterator[None]:
    """Hold `folder` while the body runs; with `part`, only the files of that name in it.

    A run that ends leaves no lock behind but FOLDER/.lock, when other parts may hold it too; a
    whole run leaves none.
    Raises Stop when another run holds what is asked for.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(lock_for(folder), alone=part is None))
        for file in part or ():
            stack.enter_context(_locked(lock_for(folder, file), alone=True))
        if part is None:
            remove_stale(folder)
        yield


def remove_stale(folder: Path) -> None:
    """Remove the locks of parts that were killed: empty plain files beside a shard's name."""
    for path in folder.glob(f".?*.safetensors{LOCK}"):
        if inside.kind(folder, path.name) == inside.FILE and not path.stat().st_size:
            path.unlink()


@contextlib.contextmanager
def _locked(path: Path, alone: bool) -> Iterator[None]:
    """Hold one lock file, and remove it in the end when it is held alone.

    A link in its place is not followed, and nothing is waited for. Raises Stop for a link, for
    what is no plain file, and for a file with content: that is somebody's, and no lock.
    """
    how = portalocker.LOCK_EX if alone else portalocker.LOCK_SH
    handle = inside.open_own(path.parent, path.name, os.O_RDWR)
    try:
        if os.fstat(handle).st_size:
            raise Stop(f"{path}", "a file with content", "an empty lock", inside.AWAY)
        try:
            portalocker.lock(handle, how | portalocker.LOCK_NB)
        except portalocker.AlreadyLocked as error:
            raise Stop(f"{path.parent}", "another run at work on it", "one run on each part",
                       "wait until it ends") from error  # fmt: skip
        if not path.exists() or path.stat().st_ino != os.fstat(handle).st_ino:
            todo = "start it again"
            raise Stop(f"{path.parent}", "another run that just ended", "one run", todo)
        try:
            yield
        finally:
            if alone:
                path.unlink(missing_ok=True)
    finally:
        os.close(handle)
