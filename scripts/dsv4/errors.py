"""UserError: an error that the user can act on. `run` prints it as one line and returns 1.

A script ends with `raise SystemExit(run(main))`. Any other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv4.text import LINE, escape_line, with_path

FOUND, ELSE = 700, 400  # characters of what was found, and of each other part of a message
DESCRIPTORS = 10240  # open files; macOS refuses a larger limit, even below its hard limit


class UserError(Exception):
    """An error that the user can act on: what was found, what was expected, what to do.

    Its text is one escaped line. `parts` holds the unescaped arguments, so that another process
    can raise it again.
    """

    def __init__(self, what: str, found: str, expected: str, todo: str) -> None:
        self.parts = what, found, expected, todo
        parts = (
            escape_line(what, ELSE),
            escape_line(found, FOUND),
            escape_line(expected, ELSE),
            escape_line(todo, ELSE),
        )
        super().__init__("{}: found {}, expected {}; {}".format(*parts))


@contextlib.contextmanager
def renamed_path(folder: Path, name: str) -> Iterator[None]:
    """Raise a UserError of the body with `name` in place of a temporary folder's path."""
    try:
        yield
    except UserError as stop:
        parts = [part.replace(f"{folder}", name) for part in stop.parts]
        UserError.__init__(stop, *parts)  # of a subclass too, which keeps what else it has
        raise


def run(main: Callable[[], int]) -> int:
    """Call `main` and turn a `UserError`, a Ctrl-C or an I/O error into one line and an exit
    status.

    Returns `main`'s own status, 1 after a `UserError` or an operating-system error, 130 after
    Ctrl-C.
    """
    _reopen_closed_streams()
    _raise_file_limit()
    try:
        status = main()
        with with_path("standard output"):
            sys.stdout.flush()
        return status
    except UserError as stop:
        return _print_error(stop)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _print_error(_os_error_message(error))
    except KeyboardInterrupt:
        _print_error("interrupted; run the same command again to go on")
        return 130


def _reopen_closed_streams() -> None:
    """Open the null device for each of stdin, stdout and stderr that is closed (`>&-`).

    Otherwise the next file opened would get that descriptor, and the output of children with it.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: fd
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "w" if fd else "r", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # for a terminal with ASCII only
            stream.reconfigure(errors="backslashreplace")


def _raise_file_limit() -> None:
    """Raise the soft limit of open files: macOS begins with 256, some shells with 64.

    A refusal is ignored; dsv4/settings.py then uses fewer threads.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _print_error(what: object) -> int:
    """Flush stdout, print one line on stderr; return the exit status 1."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        print(f"error: {escape_line(what, LINE)}", file=sys.stderr, flush=True)
    return 1


def _os_error_message(error: OSError) -> str:
    """Return one line for an OSError, with the usual remedy if there is one."""
    todo = {
        errno.ENOSPC: "free space on that volume, then run the same command again",
        errno.EDQUOT: "free some of your quota there, then run the same command again",
        errno.EFBIG: "files of that size cannot be there: raise `ulimit -f`, or with FAT32 set "
        "SHARD_BYTES=4e9, then run the same command again",
        errno.EACCES: "check the permissions of that path",
        errno.EMFILE: "raise `ulimit -n`, then run the same command again",
        errno.EXDEV: "let that folder lie on one volume with the folder it is in",
        errno.EROFS: "choose a path on a writable volume",
        errno.EIO: "check the disk, then run the same command again",
    }.get(error.errno or 0, "check that path, then run the same command again")
    where = f"{escape_line(error.filename, ELSE)}: " if error.filename else ""
    return f"{where}{error.strerror or error}; {todo}"
