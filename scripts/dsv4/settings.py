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


def parse_size(text: str) -> int:
    """Read a size in decimal units: 88GB, 500MB, or bytes."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)(GB|MB)", text)
    if found:
        return int(float(found[1]) * {"GB": 1e9, "MB": 1e6}[found[2]])
    return parse_bytes(text)


def parse_memory(text: str) -> int:
    """Read a Mac's memory, which is sold in GB and counted in GiB: 96GB."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})(GB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a Mac's memory, such as 96GB")
    return int(found[1]) << 30


def parse_tokens(text: str) -> int:
    """Read a number of tokens: 32768, or 32k."""
    many = re.fullmatch("([1-9][0-9]{0,3})k", text)
    return _between(str(1024 * int(many[1])) if many else text, 1, 1 << 24, "a number of tokens")


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
