"""Return the memory of the process that listens on a port of this machine.

Uses /proc on Linux, elsewhere lsof and ps, which macOS has. Processes of other users and
children of a server are not counted.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

LOCAL = ("127.0.0.1", "localhost")
LISTENS = "0A"  # in /proc/net/tcp


def resident_bytes(url: str) -> int | None:
    """Return resident bytes of the server at a URL; None when it is elsewhere or unknown."""
    parts = urlsplit(url)
    if parts.hostname not in LOCAL:
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        return _by_proc(port) if sys.platform == "linux" else _by_ps(port)
    return None


def _by_proc(port: int) -> int | None:
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{one[9]}]" for one in lines
               if one[3] == LISTENS and int(one[1].split(":")[1], 16) == port}  # fmt: skip
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(str(fd.readlink()) in sockets for fd in (process / "fd").iterdir()):
                status = (process / "status").read_text()
                return int(re.search(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)[1]) * 1024
    return None


def _by_ps(port: int) -> int | None:
    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout

    listening = output("lsof", "-nP", "-t", f"-iTCP:{port}", "-sTCP:LISTEN").split()
    return int(output("ps", "-o", "rss=", "-p", listening[0])) * 1024 if listening else None
