"""What commands are told: numbers that are checked where they enter.

Each function is an argparse `type`: it raises ArgumentTypeError for a text that it cannot take.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re

from dsv4.words import shown

JOBS = 1024  # threads, beyond which no machine gains


def parse_jobs(text: str) -> int:
    """Read a number of threads: 1 to JOBS."""
    return _between(text, 1, JOBS, "a number of threads")


def parse_port(text: str) -> int:
    """Read a port of TCP: 1 to 65535."""
    return _between(text, 1, 65535, "a port")


def parse_tokens(text: str) -> int:
    """Read a number of tokens: 3, which is BOS and two more, to a million."""
    return _between(text, 3, 1 << 20, "a number of tokens")


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
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
