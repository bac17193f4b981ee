"""How a stage stops: one exception of our own, one line on stderr, a non-zero exit.

A script ends with `raise SystemExit(run(main))`. A `Stop` becomes one line and exit 1; a bug keeps
its traceback, because a bug is ours and not the user's.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class Stop(Exception):
    """Something that the user can act on: what was found, what was expected, what to do."""

    def __init__(self, what: str, found: str, expected: str, todo: str) -> None:
        super().__init__(f"{what}: found {found}, expected {expected}; {todo}")


def run(main: Callable[[], int]) -> int:
    """Call `main` and turn a `Stop`, a Ctrl-C or an I/O error into one line and an exit status.

    Returns `main`'s own status, 1 after a `Stop` or an operating-system error, 130 after Ctrl-C.
    """
    try:
        return main()
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        print(f"error: {_io_message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _io_message(error: OSError) -> str:
    """One line for an operating-system error, with the way out where there is a usual one."""
    todo = {
        errno.ENOSPC: "free space on that volume, then run the same command again",
        errno.EFBIG: "raise the file-size limit, then run the same command again",
        errno.EACCES: "check the permissions of that path",
        errno.EROFS: "choose a path on a writable volume",
        errno.EIO: "check the disk, then run the same command again",
    }.get(error.errno or 0, "check that path, then run the same command again")
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; {todo}"
