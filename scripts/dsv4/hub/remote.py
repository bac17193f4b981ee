"""A published checkpoint's JSON and headers, laid out as a folder, without its tensors.

Each shard becomes a file of the right length that holds the header and then a hole, so that
whatever judges a local folder by headers judges a published one by the same code. A bundle of
180 GB costs some 30 MB of transfer: index, labels, and a hundred thousand header entries.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsv4.hub import client
from dsv4.hub.client import HubFile, clear_words, patiently
from dsv4.hub.transfer import Transfer
from dsv4.stop import Stop
from dsv4.storage.shard import MAX_HEADER

FIRST = 64 << 10  # bytes of a shard that are asked for at once; upstream's headers have 60 kB
LARGEST = 200_000_000  # of a JSON file that is read whole
WHOLE = (".json", ".jinja", ".py")
WORKERS = 8


@dataclass
class Skeleton:
    """What was found: the commit, the files with their sizes, and how many bytes were read."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    read: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files on the hub."""
        return sum(file.size for file in self.files)


def fetch_skeleton(repo: str, revision: str, folder: Path, patience: float) -> Skeleton:
    """Make `folder` look like `repo` at `revision` to everything that reads JSON and headers.

    Raises Stop when the hub does not give them.
    """
    listing = client.listing(repo, revision, patience, wanted=("*",))
    skeleton = Skeleton(repo, listing.commit, listing.files)
    transfer = Transfer(repo, listing.commit, folder, patience, lambda count: None)

    def lay(file: HubFile) -> int:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if file.name.endswith(WHOLE):
            check_length(repo, file)
            transfer.fetch(file)
            return file.size
        read, head = 0, b""
        if file.name.endswith(".safetensors"):
            head = read_header(repo, listing.commit, file, patience)
            read = len(head)
            head = head[: 8 + int.from_bytes(head[:8], "little")]
        with path.open("wb") as out:
            out.write(head)
            out.truncate(file.size)
        return read

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(WORKERS) as pool:
        skeleton.read = sum(pool.map(lay, listing.files))
    return skeleton


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
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repo, file.name, revision=commit)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
    headers = build_hf_headers() | headers
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT

    def ask() -> bytes:
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else begin  # a server that ignores Range
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + end - begin:
                    break
        if len(data) < skip + end - begin:
            raise client.Short(f"{file.name} ending before byte {end:,}")
        return bytes(data[skip : skip + end - begin])

    if begin == end:
        return b""
    with clear_words(repo):
        return patiently(ask, patience)
