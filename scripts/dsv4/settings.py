"""What commands are told: numbers that are checked where they enter.

Each function is an argparse `type`: it raises ArgumentTypeError for a text that it cannot take.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import resource

from dsv4.words import shown

JOBS = 1024  # threads, beyond which no machine gains
OPEN, EACH = 24, 5  # files open in a process, and by each of its threads, at the most


def parse_jobs(text: str) -> int:
    """Read a number of threads: 1 to JOBS; fewer where the system lets few files be open."""
    return min(_between(text, 1, JOBS, "a number of threads"), _affordable())


def parse_port(text: str) -> int:
    """Read a port of TCP: 1 to 65535."""
    return _between(text, 1, 65535, "a port")


def _between(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {what}, {least} to {most}")
    return int(text)


def parse_bytes(text: str) -> int:
    """Read a number of bytes: 5000000000 or 5e9."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= 1:
            return int(value)
    raise argparse.ArgumentTypeError(f"{shown(text)} is not a number of bytes")


def cores() -> int:
    """The cores that this process may use; fewer where the system lets few files be open."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _affordable())
    return min(os.cpu_count() or 1, _affordable())


def _affordable() -> int:
    """The threads that can work within the limit of open files (`ulimit -n`); at least one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return JOBS if soft == resource.RLIM_INFINITY else max(1, (soft - OPEN) // EACH)
