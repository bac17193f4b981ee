"""What systems leave in folders, and no program reads: Finder's and Explorer's own files.

macOS keeps a file's further attributes in a second one, ._NAME, where the volume has no place for
them (exFAT, network shares); it looks like a shard by its name's end.
"""

from __future__ import annotations

NAMES = {
    ".DS_Store", ".localized", ".Spotlight-V100", ".Trashes", ".TemporaryItems", ".fseventsd",
    ".apdisk", "Icon\r", "Thumbs.db", "desktop.ini", "System Volume Information",
}  # fmt: skip


def is_system_file(name: str) -> bool:
    """True for a relative path that is a system's own, or lies in such a folder.

    >>> is_junk("encoding/._encoding_dsv4.py"), is_junk("config.json")
    (True, False)
    """
    return any(part in NAMES or part.startswith("._") for part in name.split("/"))
