"""Back up the files that repair changes, in a hidden folder of the bundle, and restore them.

BUNDLE/.before-repair/files/NAME is the original of NAME under a second name (a hard link), so that
it costs nothing until the first name gets other bytes. The original is there, durably, before the
new file takes its place; the first original is kept, whatever is repaired later. repair.json beside
them says which files were new, and which work was begun and must be ended.

The folder may have come with the bundle, from anywhere: its record is checked when it is read, and
nothing is put back or removed outside the bundle (dsv4/storage/safe_paths.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.storage import filesystem, safe_paths
from dsv4.storage.atomic import TEMPORARY_SUFFIX, copy_file, fsync_folder, write_json
from dsv4.storage.checkpoint import read_json
from dsv4.storage.safe_paths import DIRECTORY, FILE, LINK, NOTHING
from dsv4.storage.system_files import is_system_file
from dsv4.text import short_repr

FOLDER = ".before-repair"
FILES = f"{FOLDER}/files"
RECORD = f"{FOLDER}/repair.json"
TODO = f"do not use {FOLDER}: nothing was touched"


class Backup:
    """The originals of one bundle. Nothing is written before `keep`, `take` or `begin` is called.

    Raises UserError for a folder or a record that was not written here: a link, a name that leads
    out of the bundle, another type.
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        self.folder = bundle / FOLDER
        self.files = bundle / FILES
        safe_paths.expect_type(bundle, FOLDER, DIRECTORY, NOTHING)
        safe_paths.expect_type(bundle, FILES, DIRECTORY, NOTHING)
        there = safe_paths.expect_type(bundle, RECORD, FILE, NOTHING) == FILE
        self._record = validate_record(bundle / RECORD, read_json(bundle / RECORD)) if there else {}

    @property
    def created(self) -> list[str]:
        """Names of the files that repair made where none was."""
        return self._record.get("created", [])

    @property
    def unfinished(self) -> dict[str, Any]:
        """Work that `begin` recorded and `finish` has not ended; {} for none."""
        return self._record.get("unfinished", {})

    @property
    def originals(self) -> list[str]:
        """Names of the originals that are kept."""
        found = safe_paths.files_below(self.bundle, FILES)
        return [
            check_visible_name(self.files / n, n)
            for n in found
            if not is_leftover(n) and not is_system_file(n)
        ]

    @property
    def nbytes(self) -> int:
        """Disk bytes of the originals: those that have no second name."""
        stats = [(self.files / name).lstat() for name in self.originals]
        return sum(stat.st_size for stat in stats if stat.st_nlink <= 1)

    def cost(self, names: list[str]) -> int:
        """Return the disk bytes for keeping `names`: 0 with hard links, else those of copies."""
        new = [name for name in names if not self._has(name) and (self.bundle / name).is_file()]
        if not new or filesystem.supports_hard_links(self.bundle):
            return 0
        return sum((self.bundle / name).stat().st_size for name in new)

    def begin(self, work: dict[str, Any]) -> None:
        """Record work that the next run must end if this one is killed."""
        self._write({"unfinished": work})

    def finish(self) -> None:
        """Record that the work of `begin` is done."""
        if self.unfinished:
            self._write({"unfinished": {}})

    def keep(self, names: list[str]) -> None:
        """Make the originals of `names` durable; note those that are not there as created.

        Raises UserError for a name that leads out of the bundle, and for what is no file.
        """
        kinds = {
            name: safe_paths.expect_type(self.bundle, name, FILE, LINK, NOTHING) for name in names
        }
        new = {n for n in names if kinds[n] == NOTHING and not self._has(n)}
        if new - set(self.created):
            self._write({"created": sorted({*self.created, *new})})
        for name in names:
            if kinds[name] != NOTHING and name not in self.created and not self._has(name):
                link_or_copy(self.bundle, name, f"{FILES}/{name}")
                self._make_durable(name)

    def take(self, name: str) -> None:
        """Move a file that is no part of the bundle to the originals; undo brings it back.

        Raises UserError for what is no file, and when an original of that name is kept already.
        """
        if self._has(name):
            raise UserError(f"{self.bundle / name}", f"another {name} in {self.files}", "none",
                       safe_paths.AWAY)  # fmt: skip
        safe_paths.move(self.bundle, name, f"{FILES}/{name}", make=True)
        self._make_durable(name)

    def _has(self, name: str) -> bool:
        return safe_paths.file_type(self.bundle, f"{FILES}/{name}") != NOTHING

    def _make_durable(self, name: str) -> None:
        for folder in Path(f"{FILES}/{name}").parents:
            fsync_folder(self.bundle / folder)

    def undo(self) -> tuple[int, int]:
        """Put every original back and remove what was created: (files put back, removed).

        Raises UserError before anything is touched when a name leads elsewhere. What else lies in
        .before-repair, and a folder that holds more, stays.
        """
        originals, created = self.originals, self.created
        for name in (*originals, *created):
            safe_paths.expect_type(self.bundle, name, FILE, LINK, NOTHING)
        for name in originals:
            safe_paths.move(self.bundle, f"{FILES}/{name}", name, make=True)
            fsync_folder((self.bundle / name).parent)
        for name in created:
            safe_paths.remove(self.bundle, name)
            if "/" in name:
                safe_paths.remove_folder(self.bundle, name.rpartition("/")[0])
        fsync_folder(self.bundle)
        self._remove()
        return len(originals), len(created)

    def _remove(self) -> None:
        """Remove the record, temporaries and folders; never what somebody else put there."""
        for name in safe_paths.files_below(self.bundle, FOLDER):
            if f"{FOLDER}/{name}" == RECORD or is_leftover(name) or is_system_file(name):
                safe_paths.remove(self.bundle, f"{FOLDER}/{name}")
        for folder, _, _ in os.walk(self.folder, topdown=False):
            safe_paths.remove_folder(self.bundle, Path(folder).relative_to(self.bundle).as_posix())

    def _write(self, part: dict[str, Any]) -> None:
        self._record = {**self._record, **part}
        write_json(self.bundle / RECORD, self._record, self.bundle)
        fsync_folder(self.bundle)


def is_leftover(name: str) -> bool:
    """Return True for a temporary file that a killed run left among the originals."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(TEMPORARY_SUFFIX)


def check_visible_name(where: Path, name: str) -> str:
    """Return `name`. Raises UserError when it leads out of the bundle or is hidden."""
    if safe_paths.check_name(f"{where}", name).startswith("."):
        raise UserError(
            f"{where}", f"the hidden name {short_repr(name)}", "a file of the bundle", TODO
        )
    return name


def validate_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the validated record. Raises UserError for what repair never writes."""
    created, unfinished = record.get("created", []), record.get("unfinished", {})
    if not isinstance(created, list) or not isinstance(unfinished, dict):
        raise UserError(f"{path}", "another form", "what repair writes", TODO)
    for name in created:
        if check_visible_name(path, name).endswith(".safetensors"):
            raise UserError(f"{path}", f"{short_repr(name)} as created by repair", "no shard", TODO)
    if not is_work(unfinished.get("experts", []), unfinished.get("mark", {})):
        raise UserError(f"{path}: unfinished", "another form", "what repair writes", TODO)
    return {"created": created, "unfinished": unfinished}


def is_work(experts: Any, mark: Any) -> bool:
    """Return True for a list of names and a map of strings."""
    right = isinstance(experts, list) and isinstance(mark, dict)
    return right and all(isinstance(text, str) for text in (*experts, *mark.values()))


def link_or_copy(root: Path, name: str, target: str) -> None:
    """Hard-link a file as `target`. Recreate a symbolic link; copy where links are unsupported."""
    with (
        safe_paths.open_parent(root, name) as (old, first),
        safe_paths.open_parent(root, target, make=True) as (new, last),
    ):
        if safe_paths.file_type_at(old, first) == LINK:  # as the hub's cache has them
            os.symlink(os.readlink(first, dir_fd=old), last, dir_fd=new)
            return
        if filesystem.link(root / target, first, last, old, new):
            return
    copy_file(root / name, root / target, root)
