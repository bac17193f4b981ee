"""Locks, fsync, hard links and modes on volumes that may lack them.

SMB, NFS, FUSE and exFAT each lack some of these calls, and answer with an errno that says so. If
that only weakens durability or exclusion, the work goes on after one note for each volume. Errors
of a disk (EIO, ENOSPC, EDQUOT) are raised. Each OSError from this module names the whole path,
which the system does not know for an open file.

`missing_features` tries every call in a temporary folder, so that `make check` can tell beforehand.
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
NO_FOLDER = UNKNOWN | {errno.EBADF, errno.EISDIR}  # a folder's descriptor is refused
NO_LINK = UNKNOWN | {errno.EPERM, errno.EMLINK, errno.EXDEV}
NO_MODE = UNKNOWN | {errno.EPERM, errno.EACCES}

_noted: set[tuple[str, int]] = set()


def lock_file(fd: int, path: Path, alone: bool) -> None:
    """Lock an open file, exclusive or shared, without waiting.

    Raises portalocker.AlreadyLocked when another process holds it.
    """
    _attempt(lambda: _lock(fd, alone), path, NO_LOCK, LOCKS)


def flush(fd: int, path: Path) -> None:
    """Flush a file's bytes to the disk. On macOS flush the drive's cache too, unlike fsync."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None or not _attempt(lambda: fcntl.fcntl(fd, full), path, UNKNOWN):
        _attempt(lambda: os.fsync(fd), path, UNKNOWN, BYTES)


def flush_folder(fd: int, path: Path) -> None:
    """Make the names in an open folder durable.

    fsync is enough on macOS too: the journal keeps renames in order, and if the last one is lost in
    the drive's cache, the old file is still complete.
    """
    _attempt(lambda: os.fsync(fd), path, NO_FOLDER, NAMES)


def set_mode(fd: int, path: Path, mode: int) -> None:
    """Set a file's mode. Do nothing on a volume without modes."""
    _attempt(lambda: os.fchmod(fd, mode), path, NO_MODE)


def link(path: Path, name: str, target: str, old: int, new: int) -> bool:
    """Hard-link `name` in folder `old` as `target` in folder `new`. False if unsupported."""

    def call() -> None:
        os.link(name, target, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)

    return _attempt(call, path, NO_LINK, LINKS)


def supports_hard_links(folder: Path) -> bool:
    """Return True when hard links work in this folder. Tries one and removes it."""
    return LINKS not in missing_features(folder)


def missing_features(folder: Path) -> list[str]:
    """Return the notes for what the volume of a writable folder lacks."""
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
                return [note for note, errnos, call in trials if not _attempt(call, place, errnos)]
            finally:
                os.close(here)


def check_case(where: str, names: Iterable[str], folder: Path) -> None:
    """Raise UserError when two names differ only in case and the volume ignores case."""
    for first, second in itertools.pairwise(sorted(names, key=case_fold_key)):
        if case_fold_key(first) == case_fold_key(second) and is_case_insensitive(folder):
            found = f"the files '{escape_line(first)}' and '{escape_line(second)}'"
            expected = f"names that the volume of {folder} tells apart"
            raise UserError(where, found, expected, "use another volume")


def case_fold_key(name: str) -> str:
    """Return the name as a case-insensitive, Unicode-normalizing volume compares it."""
    return unicodedata.normalize("NFD", name).casefold()


def is_case_insensitive(folder: Path) -> bool:
    """Return True when the volume of `folder` does not tell A from a."""
    with tempfile.NamedTemporaryFile(prefix=".Aa", dir=folder) as probe:
        path = Path(probe.name)
        return path.with_name(path.name.swapcase()).exists()


def _lock(fd: int, alone: bool) -> None:
    """Call portalocker's flock; raise the system's own error unless the file is locked."""
    import portalocker  # not in a toolchain's Python, which writes but never locks

    how = portalocker.LOCK_EX if alone else portalocker.LOCK_SH
    try:
        portalocker.lock(fd, how | portalocker.LOCK_NB)
    except portalocker.AlreadyLocked:
        raise
    except portalocker.LockException as error:
        raise error.__cause__ or error from None


def _attempt(call: Callable[[], object], path: Path, errnos: set[int], note: str = "") -> bool:
    """Return True after the call, False when the volume lacks it; print `note` once then."""
    try:
        call()
        return True
    except OSError as error:
        if error.errno not in errnos:
            raise OSError(error.errno, error.strerror, f"{path}") from error
    if note:
        _print_note_once(path, note)
    return False


def _print_note_once(path: Path, note: str) -> None:
    """Print a note once for each volume."""
    parent = path if path.is_dir() else path.parent
    with contextlib.suppress(OSError):
        volume = (note, parent.stat().st_dev)
        if volume in _noted:
            return
        _noted.add(volume)
    print_escaped(f"note: {escape_line(parent)}: {note}", file=sys.stderr)
