"""Bring a repository of the hub to some files in one commit, and hold it to their hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv4.hub import client
from dsv4.hub.client import HubFile
from dsv4.hub.patience import patiently
from dsv4.hub.refusals import AGAIN, LOGIN, clear_words, is_limited
from dsv4.hub.transfer import bytes_hash
from dsv4.stop import Stop
from dsv4.storage import bounds

BATCH = 4  # shards handed over at once


@dataclass(frozen=True)
class Item:
    """One file that goes up: its name there, where it lies or what it holds, and its hash."""

    file: HubFile
    path: Path | None = None
    data: bytes = b""

    @property
    def name(self) -> str:
        return self.file.name


def made(name: str, text: str) -> Item:
    """An item that is written here."""
    data = text.encode()
    return Item(HubFile(name, len(data), bytes_hash(data)), data=data)


def check_login(repo: str) -> None:
    """Raise Stop when there is no login that the hub knows, before hours are spent."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise Stop(f"hub: {repo}", "no login", "one that may write there", LOGIN)
    with clear_words(repo):
        patiently(lambda: HfApi().whoami(), 30)


def missing(items: list[Item], remote: client.Listing) -> list[Item]:
    """The items whose bytes the repository does not have under their name."""
    have = {file.name: file for file in remote.files}
    return [item for item in items if not is_there(item, have.get(item.name))]


def is_there(item: Item, remote: HubFile | None) -> bool:
    """True when the hub's file has the item's bytes; a small one is known by git's hash."""
    if remote is None or remote.size != item.file.size:
        return False
    if remote.sha256:
        return remote.sha256 == item.file.sha256
    data = bounds.read(item.path) if item.path else item.data
    return bytes_hash(data, git=True) == remote.git_sha1


def upload(to: str, items: list[Item], private: bool, patience: float) -> str:
    """Bring the repository to these items in one commit; returns the commit's hash.

    Raises Stop for the hub's and the network's refusals, and when the hub's hashes differ after.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with clear_words(to):
        patiently(lambda: api.create_repo(to, private=private, exist_ok=True), patience)
    remote = client.listing(to, "main", patience, wanted=("*",))
    todo = missing(items, remote)
    names = {item.name for item in items}
    stale = [f.name for f in remote.files if f.name.endswith(".safetensors")
             and f.name not in names]  # fmt: skip
    if not todo and not stale:
        return remote.commit
    adds = [CommitOperationAdd(item.name, str(item.path) if item.path else item.data)
            for item in todo]  # fmt: skip
    shards = [add for add in adds if add.path_in_repo.endswith(".safetensors")]
    with clear_words(to):
        for start in range(0, len(shards), BATCH):
            batch = shards[start : start + BATCH]
            patiently(lambda some=batch: api.preupload_lfs_files(to, some), patience)
            print(f"{min(start + BATCH, len(shards))} of {len(shards)} shards are up")
        operations = [*adds, *(CommitOperationDelete(name) for name in stale)]
        message = f"Publish {len(items)} verified files"
        patiently(
            lambda: api.create_commit(
                to, operations, commit_message=message, parent_commit=remote.commit
            ),
            patience,
            passing=is_limited,  # after any other failure it may stand there already
        )
    return check_published(to, items, patience)


def check_published(to: str, items: list[Item], patience: float) -> str:
    """Compare the hub's hashes with the items'; returns the commit's hash."""
    remote = client.listing(to, "main", patience, wanted=("*",))
    wrong = missing(items, remote)
    if wrong:
        raise Stop(
            f"hub: {to}: {wrong[0].name}", f"other bytes ({len(wrong)} files so)",
            "the bytes that verify read", AGAIN,
        )  # fmt: skip
    return remote.commit
