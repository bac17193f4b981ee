"""A published checkpoint's JSON and headers, laid out as a folder, without its tensors.

Each shard becomes a file of the right length that holds the header and then a hole, so that
whatever judges a local folder by headers judges a published one by the same code. A bundle of
180 GB costs some 30 MB of transfer: index, labels, and a hundred thousand header entries.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from dsv4.hub import client, wire
from dsv4.hub.client import HubFile
from dsv4.hub.patience import patiently
from dsv4.hub.refusals import Short, clear_words
from dsv4.hub.transfer import Transfer
from dsv4.stop import Stop
from dsv4.storage import volume
from dsv4.storage.shard import MAX_HEADER, Tensor, read_shard

FIRST = 64 << 10  # bytes of a shard that are asked for at once; upstream's headers have 60 kB
LARGEST = 200_000_000  # of a JSON file that is read whole
MOST = 10**9  # bytes in all that one skeleton may cost
WHOLE = (".json", ".jinja", ".py")
WORKERS = 8


@dataclass
class Skeleton:
    """What was found: the commit, the files with their sizes, and how many bytes were read."""

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
        """Add to what was read. Raises Stop when that is more than a bundle's JSON and headers."""
        with self.lock:
            self.read += nbytes
        if self.read > MOST:
            raise Stop(
                f"hub: {self.repo}", f"more than {MOST:,} bytes of JSON and headers",
                "some 30 MB of them", "do not use this bundle",
            )  # fmt: skip


def fetch_skeleton(
    repo: str, revision: str, folder: Path, patience: float, wanted: tuple[str, ...] = ("*",)
) -> Skeleton:
    """Make `folder` look like `repo` at `revision` to everything that reads JSON and headers.

    Raises Stop when the hub does not give them, or when they are beyond all bounds.
    """
    listing = client.listing(repo, revision, patience, wanted)
    skeleton = Skeleton(repo, listing.commit, listing.files)
    folder.mkdir(parents=True, exist_ok=True)
    volume.check_case(f"hub: {repo}", (file.name for file in listing.files), folder)
    transfer = Transfer(repo, listing.commit, folder, patience, lambda count: None)
    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(lay, skeleton, transfer, file) for file in listing.files]
        try:
            for done in running:
                done.result()
        except BaseException:
            transfer.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return skeleton


def lay(skeleton: Skeleton, transfer: Transfer, file: HubFile) -> None:
    """Lay one file of the skeleton: whole, or header and hole, or a hole alone."""
    path = transfer.folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(WHOLE):
        check_length(skeleton.repo, file)
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


def tensors(repo: str, revision: str) -> dict[str, Tensor]:
    """Every tensor of a published checkpoint by name, from the shards' headers.

    Paths are the shards' names. Raises Stop as `fetch_skeleton` and `read_shard` do.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="headers-") as work:
        folder = Path(work)
        skeleton = fetch_skeleton(repo, revision, folder, 0, ("*.safetensors",))
        for file in skeleton.files:
            for name, tensor in read_shard(folder / file.name).tensors.items():
                found[name] = replace(tensor, path=Path(file.name))
    return found


def check_length(repo: str, file: HubFile) -> None:
    if file.size > LARGEST:
        raise Stop(
            f"hub: {repo}: {file.name}", f"{file.size:,} bytes", f"at most {LARGEST:,}",
            "do not use this bundle",
        )  # fmt: skip


def read_header(repo: str, commit: str, file: HubFile, patience: float) -> bytes:
    """The first bytes of a shard, at least its header unless its length makes no sense."""
    head = read_range(repo, commit, file, 0, min(FIRST, file.size), patience)
    needed = 8 + int.from_bytes(head[:8], "little")
    if len(head) < needed <= min(file.size, MAX_HEADER):
        head += read_range(repo, commit, file, len(head), needed, patience)
    return head


def read_range(
    repo: str, commit: str, file: HubFile, begin: int, end: int, patience: float
) -> bytes:
    """Bytes `begin` to `end` of a published file; no more is read, whatever the server sends."""

    def ask() -> bytes:
        with wire.opened(repo, file.name, commit, f"bytes={begin}-{end - 1}") as response:
            skip = 0 if response.status_code == 206 else begin  # a server that ignores Range
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk[min(skip, len(chunk)) :]
                skip -= min(skip, len(chunk))
                if len(data) >= end - begin:
                    break
        if len(data) < end - begin:
            raise Short(f"{file.name} ending before byte {end:,}")
        return bytes(data[: end - begin])

    if begin == end:
        return b""
    with clear_words(repo):
        return patiently(ask, patience)
