"""Which names of files are taken from a hub: none that leads out, hides, or meets another one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from dsv4.hub.refusals import words
from dsv4.stop import Stop
from dsv4.storage.durable import TEMPORARY_SUFFIX

LONGEST = 255  # bytes of a part of a name, on every usual file system
DEEPEST = 16  # folders
REFUSED = "do not use this repository"


def is_hidden(name: str) -> bool:
    """True for a name of which a part begins with a dot, or that ends as a temporary's does.

    Such are our own: records, backups, locks and temporaries. None of them comes from a hub.
    """
    return name.endswith(TEMPORARY_SUFFIX) or any(
        part.startswith(".") and part != ".." for part in name.split("/")
    )


def check_name(repo: str, name: str) -> None:
    """Raise Stop for a file name that would lead out of the folder it is meant for, or is odd.

    What ends in a dot or a space is another name to FAT, exFAT and Windows' shares.
    """
    parts = name.split("/")
    bad = any(c in name for c in "\\:") or any(not part or part[-1] in ". " for part in parts)
    if bad or not name.isprintable():
        raise Stop(f"hub: {repo}", f"the file '{words(name)}'", "a path inside a folder", REFUSED)
    if len(parts) > DEEPEST or any(len(part.encode()) > LONGEST for part in parts):
        raise Stop(f"hub: {repo}", f"the file '{words(name)}'",
                   f"a name of at most {LONGEST} bytes", REFUSED)  # fmt: skip


def check_apart(repo: str, names: Iterable[str]) -> None:
    """Raise Stop when two files have one name, or one is the folder of another."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Stop(f"hub: {repo}", f"the file '{words(name)}' twice", "each once", REFUSED)
        seen.add(name)
    for name in seen:
        folders = (str(folder) for folder in PurePosixPath(name).parents)
        if (folder := next((f for f in folders if f in seen), None)) is not None:
            raise Stop(f"hub: {repo}", f"'{words(folder)}' as a file and as a folder", "one",
                       REFUSED)  # fmt: skip
