"""A published checkpoint's JSON and headers, written as a folder, without its tensors.

Each shard becomes a sparse file of the right length with the header's bytes, so that the code that
reads a local folder's headers reads a published one's. A bundle of 180 GB costs some 30 MB of
transfer: index, labels, and a hundred thousand header entries. huggingface_hub's
get_safetensors_metadata returns a parsed header; offsets and faults are in the bytes of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.hub import http, repository
from dsv4.hub.file_transfer import Transfer
from dsv4.hub.hub_errors import translated
from dsv4.hub.repository import HubFile
from dsv4.hub.retry import with_retries
from dsv4.storage import filesystem
from dsv4.storage.safetensors_file import MAX_HEADER

FIRST = 64 << 10  # bytes of a shard that are asked for at once; upstream's headers have 60 kB
WHOLE = (".json", ".jinja", ".py")
WORKERS = 8


@dataclass
class Skeleton:
    """A repository's commit, its files with their sizes, and how many bytes were read."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    read: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def nbytes(self) -> int:
        """Bytes of all files on the hub."""
        return sum(file.size for file in self.files)

    def count(self, nbytes: int) -> None:
        """Add to what was read."""
        with self.lock:
            self.read += nbytes


def fetch_skeleton(
    repo: str,
    revision: str,
    folder: Path,
    patience: float,
    wanted: Callable[[str], bool] = repository.is_any_file,
) -> Skeleton:
    """Make `folder` look like `repo` at `revision` to everything that reads JSON and headers.

    Raises UserError when the hub does not give them.
    """
    listing = repository.listing(repo, revision, patience, wanted)
    skeleton = Skeleton(repo, listing.commit, listing.files)
    folder.mkdir(parents=True, exist_ok=True)
    filesystem.check_case(f"hub: {repo}", (file.name for file in listing.files), folder)
    transfer = Transfer(repo, listing.commit, folder, patience, lambda count: None)
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(write_sparse, skeleton, transfer, file) for file in listing.files]
        try:
            for done in running:
                done.result()
        except BaseException:
            transfer.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return skeleton


def write_sparse(skeleton: Skeleton, transfer: Transfer, file: HubFile) -> None:
    """Write one file of the skeleton: full content, header plus sparse data, or fully sparse."""
    path = transfer.folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(WHOLE):
        skeleton.count(file.size)
        transfer.fetch(file)
        return
    head = b""
    if file.name.endswith(".safetensors"):
        head = read_header(skeleton.repo, skeleton.commit, file, transfer.patience)
        skeleton.count(len(head))
        head = head[: 8 + int.from_bytes(head[:8], "little")]
    with path.open("wb") as out:
        out.write(head)
        out.truncate(file.size)


def read_header(repo: str, commit: str, file: HubFile, patience: float) -> bytes:
    """Return the first bytes of a shard, at least its header unless its length is impossible."""
    head = read_range(repo, commit, file, 0, min(FIRST, file.size), patience)
    needed = 8 + int.from_bytes(head[:8], "little")
    if len(head) < needed <= min(file.size, MAX_HEADER):
        head += read_range(repo, commit, file, len(head), needed, patience)
    return head


def read_range(
    repo: str, commit: str, file: HubFile, begin: int, end: int, patience: float
) -> bytes:
    """Return bytes `begin` to `end` of a published file. Raises UserError when the hub does not."""
    if begin == end:
        return b""
    with translated(repo):
        return with_retries(lambda: http.read_range(repo, file.name, commit, begin, end), patience)
