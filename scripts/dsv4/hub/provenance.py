"""The record of a download, SOURCE/.download.json: where it came from, and what is verified.

The record is written before the first byte is fetched, so that a download goes on at the commit
at which it began, and again after each file that was verified, so that a reboot costs nothing.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.hub.repository import HubFile, Listing
from dsv4.storage import json_types, safe_paths
from dsv4.storage.atomic import TEMPORARY_SUFFIX, write_json
from dsv4.storage.checkpoint import read_json
from dsv4.storage.locks import LOCK
from dsv4.storage.safe_paths import FILE, NOTHING
from dsv4.text import short_repr

RECORD = ".download.json"
HEADERS = ".headers"  # with --low-disk: each shard's header, from which the bundle is planned
OWN = {RECORD, HEADERS, LOCK}
TODO = "delete it; download then hashes what is there"
ENTRY = {"size": int, "sha256?": str, "git_sha1?": str, "verified_mtime_ns?": int, "low_disk?": str}
FORM = {"repo": str, "revision": str, "commit": str, "files": {str: ENTRY}}


@dataclass
class Record:
    """One pinned download: what the hub listed at `commit`, and which files were verified.

    `revision` is what was asked for when it was pinned. `verified` maps a name to the modification
    time (ns) that its file had when its hash was right. `low_disk` maps a shard to "fetched" when a
    conversion with LOW_DISK=1 fetched it, which may then delete it, and to "freed" when it did.
    """

    repo: str
    revision: str
    commit: str
    files: dict[str, HubFile]
    verified: dict[str, int] = field(default_factory=dict)
    low_disk: dict[str, str] = field(default_factory=dict)

    @classmethod
    def pinned(cls, repo: str, revision: str, listing: Listing) -> Record:
        """Return a new record: nothing verified yet."""
        return cls(repo, revision, listing.commit, {file.name: file for file in listing.files})

    @property
    def shards(self) -> list[str]:
        """The names of the shards."""
        return [name for name in self.files if name.endswith(".safetensors")]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def is_verified(self, source: Path, name: str) -> bool:
        """True when the file was verified and has not been touched since."""
        path = source / name
        if name not in self.verified or not path.is_file():
            return False
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (self.files[name].size, self.verified[name])

    def is_complete(self, source: Path) -> bool:
        """True when every file was verified and none has been touched since."""
        return all(self.is_verified(source, name) for name in self.files)

    def was_complete(self, source: Path) -> bool:
        """True when every file was verified, and is untouched or was used and freed."""
        freed = {name for name, state in self.low_disk.items() if state == "freed"}
        return all(name in freed or self.is_verified(source, name) for name in self.files)

    def set_verified(self, source: Path, name: str) -> None:
        self.verified[name] = (source / name).stat().st_mtime_ns
        if self.low_disk.get(name) == "freed":  # fetched once more, by download
            del self.low_disk[name]

    def keep_shards(self, names: set[str]) -> None:
        """Drop every shard that is not in `names`, wherever it was listed."""
        for name in [n for n in self.files if n.endswith(".safetensors") and n not in names]:
            for entries in (self.files, self.verified, self.low_disk):
                entries.pop(name, None)

    def write(self, source: Path) -> None:
        write_json(source / RECORD, self.to_json())

    def to_json(self) -> dict[str, Any]:
        files = {}
        for name, file in sorted(self.files.items()):
            kind = "sha256" if file.sha256 else "git_sha1"
            files[name] = {"size": file.size, kind: file.digest}
            if name in self.verified:
                files[name]["verified_mtime_ns"] = self.verified[name]
            if name in self.low_disk:
                files[name]["low_disk"] = self.low_disk[name]
        head = {"repo": self.repo, "revision": self.revision, "commit": self.commit}
        return head | {"files": files}


def read_record(source: Path) -> Record | None:
    """Read the record of `source`; None when it has none.

    Raises UserError when it cannot be read. The record may have come with the folder, so every
    name and every type in it is validated.
    """
    path = source / RECORD
    if not source.is_dir() or safe_paths.expect_type(source, RECORD, FILE, NOTHING) == NOTHING:
        return None
    value = json_types.validate(path, read_json(path), FORM, TODO)
    entries = value["files"]
    for name, entry in entries.items():
        check_entry(path, name, entry)
    files = {
        name: HubFile(name, entry["size"], entry.get("sha256"), entry.get("git_sha1"))
        for name, entry in entries.items()
    }
    verified, low_disk = (
        {name: entry[key] for name, entry in entries.items() if key in entry}
        for key in ("verified_mtime_ns", "low_disk")
    )
    head = (value["repo"], value["revision"], value["commit"])
    return Record(*head, files, verified, low_disk)


def check_entry(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Raise UserError unless a record's entry has the form that `Record.to_json` gives it.

    Reserved names must not be listed; only shards may be marked as fetched or freed.
    """
    safe_paths.check_name(f"{path}", name)
    if name.split("/")[0] in OWN or name.endswith(TEMPORARY_SUFFIX):
        raise malformed(path, f"the file {short_repr(name)}, which is this recipe's own")
    hashes = [re.fullmatch(f"[0-9a-f]{{{digits}}}", entry.get(key, ""))
              for key, digits in (("sha256", 64), ("git_sha1", 40))]  # fmt: skip
    state = entry.get("low_disk", "fetched")
    if not any(hashes) or entry["size"] < 0 or state not in ("fetched", "freed"):
        raise malformed(path, f"another form of {short_repr(name)}")
    if "low_disk" in entry and ("/" in name or not name.endswith(".safetensors")):
        raise malformed(path, f"{short_repr(name)} as one that comes and goes")


def malformed(path: Path, found: str) -> UserError:
    return UserError(f"{path}", found, "a record of a download", TODO)


def is_published(path: Path) -> bool:
    """Return True for a file whose hash was that of the hub, and that is unchanged since."""
    with contextlib.suppress(UserError):
        record = read_record(path.parent)
        return record is not None and record.is_verified(path.parent, path.name)
    return False


def provenance(source: Path) -> dict[str, Any] | None:
    """Return what is published of where `source` came from: repo, commit, files' hashes.

    None when it did not come through download, or not wholly.
    """
    record = read_record(source)
    if record is None or not record.was_complete(source):
        return None
    hashes = {
        name: {"sha256": file.sha256} if file.sha256 else {"git_sha1": file.git_sha1}
        for name, file in sorted(record.files.items())
    }
    return {"repo": record.repo, "commit": record.commit, "files": hashes}


def source_name(source: Path) -> str:
    """Return REPO@COMMIT of a source that came through download, else the folder's name."""
    with contextlib.suppress(UserError):
        if record := read_record(source):
            return f"{record.repo}@{record.commit}"
    return source.resolve().name
