"""Folders that are made here under names that a user chose or could have chosen, and removed later.

Each gets a mark before anything else lies in it. Only a folder with the mark is ever removed whole;
a link to one is not, and neither is a folder that somebody put in its place.
"""

from __future__ import annotations

import os
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage import safe_paths
from dsv4.text import short_repr

MARK = ".made-by-dsv4"


def make_own(folder: Path) -> Path:
    """Make a folder and mark it, or take one that is marked or empty; returns it.

    Raises UserError for a link, a file, and a folder in which something lies and no mark.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (
        safe_paths.expect_type(folder.parent, folder.name, safe_paths.DIRECTORY, safe_paths.NOTHING)
        == safe_paths.NOTHING
    ):
        folder.mkdir()
    if not is_own(folder):
        if strangers := sorted(path.name for path in folder.iterdir()):
            raise UserError(f"{folder}", f"{short_repr(strangers[0])} in a folder that was not made here",
                       "no folder, or an empty one", safe_paths.AWAY)  # fmt: skip
        os.close(safe_paths.open_regular(folder, MARK, os.O_RDWR))
    return folder


def is_own(folder: Path) -> bool:
    """True for a folder itself, no link to one, that has the mark."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and safe_paths.file_type(folder, MARK) == safe_paths.FILE


def remove_own(folder: Path) -> bool:
    """Remove a folder with all that it holds; False, and nothing is touched, without the mark."""
    if not is_own(folder):
        return False
    safe_paths.clear_folder(
        folder, {MARK}
    )  # the mark goes last: what a killed run leaves is still ours
    safe_paths.remove(folder, MARK)
    folder.rmdir()
    return True
