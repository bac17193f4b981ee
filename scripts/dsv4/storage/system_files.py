"""Recognize the files that macOS and Windows put into folders: Finder's and Explorer's own.

On volumes without extended attributes (exFAT, network shares) macOS keeps those of NAME in ._NAME,
which ends as a shard's name does.
"""

from __future__ import annotations

NAMES = {
    ".DS_Store", ".localized", ".Spotlight-V100", ".Trashes", ".TemporaryItems", ".fseventsd",
    ".apdisk", "Icon\r", "Thumbs.db", "desktop.ini", "System Volume Information",
}  # fmt: skip


def is_system_file(name: str) -> bool:
    """Return True for a relative path that is such a file, or lies in such a folder.

    >>> is_system_file("encoding/._encoding_dsv4.py"), is_system_file("config.json")
    (True, False)
    """
    return any(part in NAMES or part.startswith("._") for part in name.split("/"))
