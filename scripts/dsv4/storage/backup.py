"""The files of a bundle as they were before it was repaired, in a hidden folder inside it.

BUNDLE/.before-repair/files/NAME is the original of NAME under a second name (a hard link), so that
it costs nothing until the first name gets other bytes. The original is there, durably, before the
new file takes its place; the first original is kept, whatever is repaired later. repair.json beside
them says which files were new, and which work was begun and must be ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

from dsv4.storage.checkpoint import read_json
from dsv4.storage.durable import copy_file, fsync_folder, write_json

FOLDER = ".before-repair"


class Backup:
    """The originals of one bundle. Nothing is written before `keep` or `begin` is called."""

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.folder = bundle / FOLDER
        self.files = self.folder / "files"
        self._path = self.folder / "repair.json"
        self._record = read_json(self._path) if self._path.is_file() else {}

    @property
    def created(self) -> list[str]:
        """Names of the files that repair made where none was."""
        return self._record.get("created", [])

    @property
    def unfinished(self) -> dict[str, Any]:
        """What `begin` was told and `finish` not yet; {} when nothing is under way."""
        return self._record.get("unfinished", {})

    @property
    def originals(self) -> list[str]:
        """Names of the originals that are kept."""
        found = [path for path in self.files.rglob("*") if path.is_symlink() or path.is_file()]
        return sorted(path.relative_to(self.files).as_posix() for path in found)

    @property
    def nbytes(self) -> int:
        """Bytes of the disk that the originals cost: those that have no other name."""
        stats = [(self.files / name).lstat() for name in self.originals]
        return sum(stat.st_size for stat in stats if stat.st_nlink == 1)

    def begin(self, work: dict[str, Any]) -> None:
        """Note work that a killed run must find again."""
        self._write({"unfinished": work})

    def finish(self) -> None:
        """The work that was begun is done."""
        if self.unfinished:
            self._write({"unfinished": {}})

    def keep(self, names: list[str]) -> None:
        """Make the originals of `names` durable; note those that are not there as created."""
        new = [n for n in names if not lies_at(self.bundle / n) and not lies_at(self.files / n)]
        if set(new) - set(self.created):
            self._write({"created": sorted({*self.created, *new})})
        for name in names:
            if lies_at(self.bundle / name) and name not in self.created:
                self._keep(name)

    def _keep(self, name: str) -> None:
        target = self.files / name
        if lies_at(target):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        link(self.bundle / name, target)
        for folder in (target.parent, *target.parent.relative_to(self.bundle).parents):
            fsync_folder(self.bundle / folder)

    def undo(self) -> tuple[int, int]:
        """Put every original back and remove what was created: (files put back, removed)."""
        originals, created = self.originals, self.created
        for name in originals:
            source, target = self.files / name, self.bundle / name
            source.replace(target)
            source.unlink(missing_ok=True)  # two names of one file: replacing does nothing
            fsync_folder(target.parent)
        for name in created:
            (self.bundle / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that holds more
                if "/" in name:
                    (self.bundle / name).parent.rmdir()
        fsync_folder(self.bundle)
        shutil.rmtree(self.folder, ignore_errors=True)
        return len(originals), len(created)

    def _write(self, part: dict[str, Any]) -> None:
        self._record = {**self._record, **part}
        self.folder.mkdir(exist_ok=True)
        write_json(self._path, self._record)
        fsync_folder(self.bundle)


def lies_at(path: Path) -> bool:
    """True when something has that name, a symbolic link that leads nowhere too."""
    return os.path.lexists(path)


def link(path: Path, target: Path) -> None:
    """Give a file a second name; a symbolic link is made again, and where none can be, a copy."""
    if path.is_symlink():  # as the hub's cache has them
        target.symlink_to(path.readlink())
        return
    try:
        target.hardlink_to(path)
    except OSError:
        copy_file(path, target)
