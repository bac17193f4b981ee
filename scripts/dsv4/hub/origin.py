"""Where a source came from, and what is proven of it: the record in SOURCE/.download.json.

The record is written before the first byte is fetched, so that a download goes on at the commit
at which it began, and again after each file that was verified, so that a reboot costs nothing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.hub.client import HubFile, Listing
from dsv4.stop import Stop
from dsv4.storage.checkpoint import read_json
from dsv4.storage.durable import write_json

RECORD = ".download.json"


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
        """A new record: nothing verified yet."""
        return cls(repo, revision, listing.commit, {file.name: file for file in listing.files})

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
    """The record of `source`, None when it has none. Raises Stop when it cannot be read."""
    path = source / RECORD
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        files = {
            name: HubFile(name, int(f["size"]), f.get("sha256"), f.get("git_sha1"))
            for name, f in value["files"].items()
        }
        verified = {n: f["verified_mtime_ns"] for n, f in value["files"].items()
                    if "verified_mtime_ns" in f}  # fmt: skip
        low_disk = {n: f["low_disk"] for n, f in value["files"].items() if "low_disk" in f}
        return Record(value["repo"], value["revision"], value["commit"], files, verified, low_disk)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Stop(
            f"{path}", "no record of a download", "one",
            "delete it; download then hashes what is there",
        ) from error  # fmt: skip


def provenance(source: Path) -> dict[str, Any] | None:
    """What may be said in public of where `source` came from: repo, commit, files' hashes.

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
    """REPO@COMMIT of a source that came through download, else the folder's name."""
    with contextlib.suppress(Stop):
        if record := read_record(source):
            return f"{record.repo}@{record.commit}"
    return source.resolve().name
