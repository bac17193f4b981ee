"""Bring a repository of the hub to some files in one commit, and compare their hashes after."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dsv4.errors import UserError
from dsv4.hub import http, repository
from dsv4.hub.hub_errors import AGAIN, LOGIN, translated
from dsv4.hub.repository import HubFile
from dsv4.hub.retry import with_retries
from dsv4.storage import limits
from dsv4.text import escape_line


@dataclass(frozen=True)
class Item:
    """One file to upload: its name there, its path or content here, and its hash."""

    file: HubFile
    path: Path | None = None
    data: bytes = b""

    @property
    def name(self) -> str:
        return self.file.name


def text_item(name: str, text: str) -> Item:
    """Return an item whose content is `text`."""
    data = text.encode()
    return Item(HubFile(name, len(data), hashlib.sha256(data).hexdigest()), data=data)


def check_login(repo: str) -> None:
    """Raise UserError when there is no login that the hub knows, before hours are spent."""
    http.check_login()
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(f"hub: {repo}", "no login", "one that may write there", LOGIN)
    with translated(repo):
        with_retries(lambda: HfApi().whoami(), 30)


def missing(items: list[Item], remote: repository.Listing) -> list[Item]:
    """Return the items whose bytes the repository does not have under their name."""
    have = {file.name: file for file in remote.files}
    return [item for item in items if not is_there(item, have.get(item.name))]


def is_there(item: Item, remote: HubFile | None) -> bool:
    """True when the hub's file has the item's bytes; a small one is known by git's hash."""
    from huggingface_hub.utils.sha import git_hash

    if remote is None or remote.size != item.file.size:
        return False
    if remote.sha256:
        return remote.sha256 == item.file.sha256
    return git_hash(limits.read_bounded(item.path) if item.path else item.data) == remote.git_sha1


def list_all(to: str, patience: float) -> repository.Listing:
    """List every file of the repository's main branch."""
    return repository.listing(to, "main", patience, repository.is_any_file)


def stale_shards(names: set[str], remote: repository.Listing) -> list[str]:
    """Return the shards of an earlier bundle, which loaders would read too: those in the
    repository's root that are not in `names`. What lies in folders is not ours.
    """
    return [file.name for file in remote.files if file.name.endswith(".safetensors")
            and "/" not in file.name and file.name not in names]  # fmt: skip


def upload(to: str, items: list[Item], private: bool, patience: float) -> str:
    """Bring the repository to these items in one commit; return the commit's hash.

    Raises UserError for errors of the hub and the network, and when the hub's hashes differ after.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with translated(to):
        with_retries(lambda: api.create_repo(to, private=private, exist_ok=True), patience)
    adds: dict[str, CommitOperationAdd] = {}  # kept: each one hashes its file when it is made

    def commit() -> None:
        remote = list_all(to, patience)  # anew: a failed attempt may have succeeded
        stale = stale_shards({item.name for item in items}, remote)
        todo = missing(items, remote)
        for item in todo:
            if item.name not in adds:
                content = str(item.path) if item.path else item.data
                adds[item.name] = CommitOperationAdd(item.name, content)
        operations = [*(adds[item.name] for item in todo), *map(CommitOperationDelete, stale)]
        if operations:
            message = f"Publish {len(items)} verified files"
            api.create_commit(to, operations, commit_message=message, parent_commit=remote.commit)
        for name in stale:
            print(f"{to}: deleted in the same commit: {escape_line(name)}")

    with translated(to):
        with_retries(commit, patience)
    return check_published(to, items, patience)


def check_published(to: str, items: list[Item], patience: float) -> str:
    """Compare the hub's hashes with the items'; return the commit's hash."""
    remote = list_all(to, patience)
    wrong = missing(items, remote)
    if wrong:
        raise UserError(
            f"hub: {to}: {wrong[0].name}", f"other bytes ({len(wrong)} files so)",
            "the bytes that verify read", AGAIN,
        )  # fmt: skip
    return remote.commit
