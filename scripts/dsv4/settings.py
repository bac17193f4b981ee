"""Define the options of commands, with the Makefile's settings as their defaults.

make passes each setting in the environment as RECIPE_NAME, so that no shell parses its value. It is
the default of one option (RECIPE_SHARD_BYTES of --shard-bytes); an option on the command line wins.
The prefix keeps a command that is run alone from reading an unrelated variable such as SOURCE.

Each `parse_…` is an argparse `type`: it raises InvalidValue for a text that is not valid.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.text import escape_line, short_repr

PREFIX = "RECIPE_"
JOBS = 1024  # maximum number of threads
OPEN, EACH = 24, 5  # maximum open files: of a process, and of each thread
ON, OFF = ("1", "yes", "true", "on"), ("0", "no", "false", "off")


class InvalidValue(argparse.ArgumentTypeError):
    """A text that is not what was expected."""

    def __init__(self, text: str, expected: str) -> None:
        super().__init__(f"found {short_repr(text)}, expected {expected}")
        self.expected = expected


def parse_jobs(text: str) -> int:
    """Read a number of threads: 1 to JOBS; fewer where the system lets few files be open."""
    return min(_between(text, 1, JOBS, "a number of threads"), _threads_by_file_limit())


def whole_number(least: int, most: int, what: str) -> Callable[[str], int]:
    """Return a function that reads a whole number within these limits."""
    return lambda text: _between(text, least, most, what)


def _between(text: str, least: int, most: int, what: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise InvalidValue(text, f"{what}, {least} to {most}")
    return int(text)


def parse_bytes(text: str) -> int:
    """Read a number of bytes: 5000000000 or 5e9."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= 1:
            return int(value)
    raise InvalidValue(text, "a number of bytes, such as 5e9")


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
        raise InvalidValue(text, "a Mac's memory, such as 96GB")
    return int(found[1]) << 30


def parse_context(text: str) -> int:
    """Read how many tokens a context or a prompt has: 100 to 10 million; 32k is 32768."""
    many = re.fullmatch("([1-9][0-9]{0,3})k", text)
    return _between(str(1024 * int(many[1])) if many else text, 100, 10_000_000,
                    "a number of tokens")  # fmt: skip


def parse_url(text: str) -> str:
    """Read a server's address, http or https, without the /v1 at its end."""
    if not re.fullmatch(r"https?://[\w.\-]+(:[0-9]{1,5})?(/[\w.\-]+)*/?", text, re.ASCII):
        raise InvalidValue(text, "a server's address, such as http://127.0.0.1:8010")
    return text.removesuffix("/").removesuffix("/v1")


def parse_seconds(text: str) -> float:
    """Read a time in seconds, 0 to a day."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 86_400:
            return float(text)
    raise InvalidValue(text, "seconds, 0 to 86400")


def parse_mtp(text: str) -> str:
    """Read how MTP is stored (model/mtp.py)."""
    if text not in ("source", "as-experts"):
        raise InvalidValue(text, "source or as-experts")
    return text


def parse_switch(text: str) -> bool:
    """Read 1 or 0, or a word for one of them."""
    if text.lower() not in ON + OFF:
        raise InvalidValue(text, f"{', '.join(ON)}, or {', '.join(OFF)} or nothing")
    return text.lower() in ON


def parse_path(text: str) -> Path:
    """Read a path; ~ is a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise InvalidValue(text, "a path; nobody's home folder is known by that name") from None


def parse_paths(text: str) -> list[Path]:
    """Read paths with blanks between them."""
    return [parse_path(part) for part in text.split()]


# Every setting of the Makefile that a command takes, and how its value is read.
TYPES: dict[str, Callable[[str], Any]] = {
    "SOURCE": parse_path, "BUNDLE": parse_path, "REFERENCE": parse_path, "IMATRIX": parse_path,
    "TOOLCHAIN_PYTHON": parse_path, "SOURCE2": parse_path,
    "REPO": str, "BASE": str, "RELEASE": str, "REVISION": str, "AGAINST": str, "TO": str,
    "CONVERTER": str, "QUANTIZER": str,
    "JOBS": parse_jobs, "PORT": whole_number(1, 65535, "a port"),
    "LEVEL": whole_number(1, 2, "a level"), "SHARD_BYTES": parse_bytes,
    "MTP": parse_mtp, "DROP_MTP": parse_switch,
    "LOW_DISK": parse_switch, "VERIFY_HASHES": parse_switch, "PRIVATE": parse_switch,
    "DRY_RUN": parse_switch, "BUNDLES": parse_paths, "TEXT": parse_path,
    "TOKENS": whole_number(3, 1 << 20, "a number of tokens"),  # 3: BOS and two more
    "DEVICE": str, "RUNTIME": str, "FLOAT32": parse_switch,
    "ANY_SHAPE": parse_switch, "PLAN": parse_path,
    # Names that other people's environments have too: read by the command that takes them.
    "URL": str, "MODEL_NAME": str, "AGAINST_NAME": str, "CONTEXT": str, "FIT": str,
    "SIZE": str,
}  # fmt: skip


def add_setting(parser: argparse.ArgumentParser, name: str, *, option: str = "",
                if_there: bool = False, **how: Any) -> None:  # fmt: skip
    """Add the option of one of make's settings; `how` is as for add_argument, type that of TYPES.

    if_there: a path from make is left out, with a note, when nothing lies there, or a source whose
    shards LOW_DISK=1 has freed.
    Raises UserError for a value from make that the option does not take, and for any that no
    command could: what a later stage would refuse is refused by the first.
    """
    for each in TYPES:
        if text := os.environ.get(PREFIX + each):
            parse_setting(each, text)
    parse = how.pop("type", TYPES[name])
    how |= {"action": "store_true"} if parse is parse_switch else {"type": parse}
    action = parser.add_argument(option or "--" + name.lower().replace("_", "-"), **how)
    text = os.environ.get(PREFIX + name)
    if text is None or (not text and not action.required):
        return
    parse_setting(name, text)
    value = parse_as(name, text, parse)
    if action.choices and value not in action.choices:
        raise _setting_error(name, text, f"one of {', '.join(map(str, action.choices))}")
    if if_there and not is_there(value):
        print(
            f"note: {name}: nothing lies at {escape_line(value)}; goes on without", file=sys.stderr
        )
        return
    action.default, action.required = [value] if action.nargs else value, False


def is_there(path: Path) -> bool:
    """Return whether the path exists and is not a source with headers only (low_disk.py)."""
    freed = (path / ".headers").is_dir() and not any(path.glob("*.safetensors"))
    return path.exists() and not freed


def parse_setting(name: str, text: str) -> Any:
    """Return the value of the setting `name`. Raises UserError if it is invalid."""
    if not text:
        raise _setting_error(name, text, "a value")
    if text != text.strip():
        todo = "in config.mk put comments on lines of their own: blanks before them are kept"
        raise UserError(name, short_repr(text), "no blanks at its ends", todo)
    if "\n" in text or "\r" in text:
        raise _setting_error(name, text, "one line")
    if "$(" in text or "${" in text:
        raise _setting_error(name, text, "the value itself: make expands only what config.mk says")
    return parse_as(name, text, TYPES[name])


def parse_as(name: str, text: str, parse: Callable[[str], Any]) -> Any:
    """Return a setting's text, parsed. Raises UserError when `parse` refuses it."""
    try:
        return parse(text)
    except InvalidValue as unfit:
        raise _setting_error(name, text, unfit.expected) from None


def _setting_error(name: str, text: str, expected: str) -> UserError:
    return UserError(
        name, short_repr(text), expected, f"make … {name}=VALUE, or a line of config.mk"
    )


def environment_without_settings() -> dict[str, str]:
    """Return the environment for another program, without make's settings."""
    return {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}


def available_cores() -> int:
    """Return how many cores this process may use; fewer under a low limit of open files."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _threads_by_file_limit())
    return min(os.cpu_count() or 1, _threads_by_file_limit())


def _threads_by_file_limit() -> int:
    """Return how many threads fit into the limit of open files (`ulimit -n`), at least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return JOBS if soft == resource.RLIM_INFINITY else max(1, (soft - OPEN) // EACH)
