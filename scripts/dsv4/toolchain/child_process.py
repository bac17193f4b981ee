"""Run a child process with a time limit that ends when its parent ends.

The child's standard input is a pipe on which nothing is written. When the parent dies for any
reason the pipe closes, and `end_with_parent` in the child ends it and its own children. Only a
child started this way may use it: under cron, nohup or CI standard input is at its end as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage import own_folders

LOG_BYTES = 1 << 20  # of a log's end


def run_child(
    command: list[str], env: Mapping[str, str], log: Path, limit: float, what: str
) -> int:
    """Run `command` with its output in `log`; return its exit status.

    Raises UserError when it does not end within `limit` seconds, or cannot be started.
    """
    with log.open("wb") as output:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=env,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            words = error.strerror or str(error)
            raise UserError(what, words, "a program that runs", "check TOOLCHAIN_PYTHON") from error
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            raise UserError(
                what, f"no answer in {limit:.0f} s", "an answer", "see its input"
            ) from None
        finally:
            kill_group(child)
            child.wait()
            child.stdin.close()


def kill_group(child: subprocess.Popen) -> None:
    """Kill a child that has its own session, and its children, which may hold its pipes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def end_with_parent(folder: Path) -> None:
    """In the child: when the parent ends, remove `folder` if it has our mark, and exit.

    With a session of its own, as `run_child` gives it, the child's children end too.
    """

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the pipe closes
        with contextlib.suppress(OSError, UserError):
            own_folders.remove_own(folder)
        if os.getsid(0) == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def last_log_line(log: Path) -> str:
    """Return the last exception in a log, else its last line; 300 characters at most."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        text = file.read(LOG_BYTES).decode(errors="replace")
    lines = text.strip().splitlines() or ["no output"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (errors or lines)[-1][:300]
