"""Make and remove work folders without risk to a user's files.

Each folder gets a marker file before anything else. Only a folder with the marker is removed with
its content; a link to one is not.
"""

from __future__ import annotations

import os
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage import safe_paths
from dsv4.text import short_repr

MARK = ".made-by-dsv4"


def make_own(folder: Path) -> Path:
    """Make a folder with the marker, or accept one that has it or is empty; return the folder.

    Raises UserError for a link, a file, and a folder with content and no marker.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    allowed = safe_paths.DIRECTORY, safe_paths.NOTHING
    if safe_paths.expect_type(folder.parent, folder.name, *allowed) == safe_paths.NOTHING:
        folder.mkdir()
    if not is_own(folder):
        if strangers := sorted(path.name for path in folder.iterdir()):
            found = f"{short_repr(strangers[0])} in a folder that was not made here"
            raise UserError(f"{folder}", found, "no folder, or an empty one", safe_paths.AWAY)
        os.close(safe_paths.open_regular(folder, MARK, os.O_RDWR))
    return folder


def is_own(folder: Path) -> bool:
    """Return True for a folder with the marker, False for a link to one."""
    is_folder = folder.is_dir() and not folder.is_symlink()
    return is_folder and safe_paths.file_type(folder, MARK) == safe_paths.FILE


def remove_own(folder: Path) -> bool:
    """Remove a folder with its content. Without the marker, return False and change nothing."""
    if not is_own(folder):
        return False
    # The marker goes last, so that what a killed run leaves can still be removed.
    safe_paths.clear_folder(folder, {MARK})
    safe_paths.remove(folder, MARK)
    folder.rmdir()
    return True
