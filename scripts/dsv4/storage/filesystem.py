"""What a volume can do: locks, flushing, hard links, modes are not everywhere.

SMB, NFS, FUSE and exFAT each lack something, and answer the call with an errno that says so. Where
that only weakens durability or exclusion, the work goes on and a note says so once; what could lose
bytes is raised, and so is every error of a disk: EIO, ENOSPC, EDQUOT. Each OSError that leaves this
module names the whole path, which the system does not know of an open file.

`lacks` tries it all in a temporary folder, so that check can tell beforehand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from dsv4.errors import UserError
from dsv4.text import escape_line, print_escaped, with_path

LOCKS = "no locks here: one run at a time is up to you"
BYTES = "files cannot be flushed here: after a power cut, check the result with make verify"
NAMES = "folders cannot be flushed here: after a power cut, run the last command again"
LINKS = "no hard links here: repair copies the originals, which costs their size"

UNKNOWN = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY}
NO_LOCK = UNKNOWN | {errno.ENOLCK}
NO_FOLDER = UNKNOWN | {errno.EBADF, errno.EISDIR}  # what takes a folder's descriptor for no file's
NO_LINK = UNKNOWN | {errno.EPERM, errno.EMLINK, errno.EXDEV}
NO_MODE = UNKNOWN | {errno.EPERM, errno.EACCES}

_noted: set[tuple[str, int]] = set()


def lock_file(fd: int, path: Path, alone: bool) -> None:
    """Lock an open file, for this process alone or shared, without waiting.

    Raises portalocker.AlreadyLocked when another one has it.
    """
    _attempt(lambda: _lock(fd, alone), path, NO_LOCK, LOCKS)


def flush(fd: int, path: Path) -> None:
    """Put a file's bytes on the disk; on macOS past the drive's own cache, where fsync stops."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None or not _attempt(lambda: fcntl.fcntl(fd, full), path, UNKNOWN):
        _attempt(lambda: os.fsync(fd), path, UNKNOWN, BYTES)


def flush_folder(fd: int, path: Path) -> None:
    """Make the names in an open folder durable.

    By fsync on macOS too: a journal keeps changes of names in their order, and a name that is lost
    in a drive's cache leaves the old one, which is whole.
    """
    _attempt(lambda: os.fsync(fd), path, NO_FOLDER, NAMES)


def set_mode(fd: int, path: Path, mode: int) -> None:
    """Give a file its mode, where the volume has modes; elsewhere all files have the same."""
    _attempt(lambda: os.fchmod(fd, mode), path, NO_MODE)


def link(path: Path, name: str, target: str, old: int, new: int) -> bool:
    """Give `name` in the open folder `old` a second name in `new`; False where there are none."""

    def call() -> None:
        os.link(name, target, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)

    return _attempt(call, path, NO_LINK, LINKS)


def supports_hard_links(folder: Path) -> bool:
    """May a file in this folder have two names? Tried, and nothing is left."""
    return LINKS not in missing_features(folder)


def missing_features(folder: Path) -> list[str]:
    """What the volume of a folder that can be written to lacks, as the notes say it."""
    with with_path(folder), tempfile.TemporaryDirectory(prefix=".trying-", dir=folder) as made:
        place = Path(made)
        with (place / "file").open("wb") as file:
            file.write(b"some")
            file.flush()
            here = os.open(place, os.O_RDONLY)
            try:
                trials = [
                    (LOCKS, NO_LOCK, lambda: _lock(file.fileno(), alone=True)),
                    (BYTES, UNKNOWN, lambda: os.fsync(file.fileno())),
                    (NAMES, NO_FOLDER, lambda: os.fsync(here)),
                    (LINKS, NO_LINK, lambda: os.link(place / "file", place / "second")),
                ]
                return [what for what, errnos, call in trials if not _attempt(call, place, errnos)]
            finally:
                os.close(here)


def check_case(where: str, names: Iterable[str], folder: Path) -> None:
    """Raise UserError when two names are one to the volume of `folder`, which need not tell A from
    a."""
    for first, second in itertools.pairwise(sorted(names, key=case_fold_key)):
        if case_fold_key(first) == case_fold_key(second) and is_case_insensitive(folder):
            found = f"the files '{escape_line(first)}' and '{escape_line(second)}'"
            expected = f"names that the volume of {folder} tells apart"
            raise UserError(where, found, expected, "use another volume")


def case_fold_key(name: str) -> str:
    """What a volume that tells neither A from a nor one spelling of ä from another makes of it."""
    return unicodedata.normalize("NFD", name).casefold()


def is_case_insensitive(folder: Path) -> bool:
    """True when the volume of `folder` does not tell A from a."""
    with tempfile.NamedTemporaryFile(prefix=".Aa", dir=folder) as probe:
        path = Path(probe.name)
        return path.with_name(path.name.swapcase()).exists()


def _lock(fd: int, alone: bool) -> None:
    """portalocker's flock, with the system's own error when it is no matter of who has the lock."""
    import portalocker  # not in a toolchain's Python, which writes but never locks

    how = portalocker.LOCK_EX if alone else portalocker.LOCK_SH
    try:
        portalocker.lock(fd, how | portalocker.LOCK_NB)
    except portalocker.AlreadyLocked:
        raise
    except portalocker.LockException as error:
        raise error.__cause__ or error from None


def _attempt(call: Callable[[], object], path: Path, errnos: set[int], what: str = "") -> bool:
    """True when the call did its work; False where the volume lacks it, after a note of `what`."""
    try:
        call()
        return True
    except OSError as error:
        if error.errno not in errnos:
            raise OSError(error.errno, error.strerror, f"{path}") from error
    if what:
        _print_note_once(path, what)
    return False


def _print_note_once(path: Path, what: str) -> None:
    """Say once for each volume what is weaker on it."""
    parent = path if path.is_dir() else path.parent
    with contextlib.suppress(OSError):
        seen = (what, parent.stat().st_dev)
        if seen in _noted:
            return
        _noted.add(seen)
    print_escaped(f"note: {escape_line(parent)}: {what}", file=sys.stderr)
