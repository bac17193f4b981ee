"""Folders that are made here under names that a user chose or could have chosen, and removed later.

Each gets a mark before anything else lies in it. Only a folder with the mark is ever removed whole;
a link to one is not, and neither is a folder that somebody put in its place.
"""

from __future__ import annotations

import os
from pathlib import Path

from dsv4.stop import UserError
from dsv4.storage import inside
from dsv4.words import short_repr

MARK = ".made-by-dsv4"


def make_own(folder: Path) -> Path:
    """Make a folder and mark it, or take one that is marked or empty; returns it.

    Raises Stop for a link, a file, and a folder in which something lies and no mark.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (
        inside.expect_type(folder.parent, folder.name, inside.DIRECTORY, inside.NOTHING)
        == inside.NOTHING
    ):
        folder.mkdir()
    if not is_own(folder):
        if strangers := sorted(path.name for path in folder.iterdir()):
            raise UserError(f"{folder}", f"{short_repr(strangers[0])} in a folder that was not made here",
                       "no folder, or an empty one", inside.AWAY)  # fmt: skip
        os.close(inside.open_regular(folder, MARK, os.O_RDWR))
    return folder


def is_own(folder: Path) -> bool:
    """True for a folder itself, no link to one, that has the mark."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and inside.file_type(folder, MARK) == inside.FILE


def remove_own(folder: Path) -> bool:
    """Remove a folder with all that it holds; False, and nothing is touched, without the mark."""
    if not is_own(folder):
        return False
    inside.clear_folder(folder, {MARK})  # the mark goes last: what a killed run leaves is still ours
    inside.remove(folder, MARK)
    folder.rmdir()
    return True
