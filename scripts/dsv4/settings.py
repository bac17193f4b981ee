"""What commands are told: numbers that are checked where they enter.

Each function is an argparse `type`: it raises ArgumentTypeError for a text that it cannot take.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os


def parse_jobs(text: str) -> int:
    """Read a number of threads: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads")
    return int(text)


def parse_bytes(text: str) -> int:
    """Read a number of bytes: 5000000000 or 5e9."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= 1:
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
