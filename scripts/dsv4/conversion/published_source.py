"""Judge a source on the hub by config.json, index, headers and small tables, before it is fetched.

What is read is some 20 MB for DeepSeek-V4-Flash. The judgement is that of model/source.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4.conversion.tokenizer_files import REQUIRED
from dsv4.errors import UserError, renamed_path
from dsv4.hub import remote_headers, repository
from dsv4.hub.file_transfer import Transfer
from dsv4.hub.repository import HubFile
from dsv4.model.expected_tensors import check_tables
from dsv4.model.source import open_headers
from dsv4.storage.checkpoint import INDEX, SINGLE, Checkpoint, read_index
from dsv4.storage.safetensors_file import Tensor


@dataclass(frozen=True)
class PublishedSource:
    """A judged source on the hub.

    checkpoint: config, index and headers; its data cannot be read. files: what download fetches.
    """

    commit: str
    checkpoint: Checkpoint
    files: tuple[HubFile, ...]


def open_published(
    repo: str, revision: str, has_tokenizer: bool, patience: float = 0
) -> PublishedSource:
    """Read and judge a source on the hub. Raises UserError as `open_headers` and `check_tables` do.

    has_tokenizer: the tokenizer files come from elsewhere, so the repository may lack them.
    """
    listing = repository.listing(repo, revision, patience)
    if not has_tokenizer:
        check_listed(repo, {file.name for file in listing.files})
    with tempfile.TemporaryDirectory(prefix="headers-") as work:
        folder = Path(work)
        with renamed_path(folder, f"hub: {repo}"):
            for wanted in (is_document, lambda name: name in shard_names(folder)):
                remote_headers.fetch_skeleton(repo, listing.commit, folder, patience, wanted)
            source = open_headers(folder)
            sizes = {file.name: file for file in listing.files}

            def read(tensor: Tensor) -> np.ndarray:
                file, begin = sizes[tensor.path.name], tensor.offset
                data = remote_headers.read_range(
                    repo, listing.commit, file, begin, begin + tensor.nbytes, patience
                )
                return np.frombuffer(data, np.uint8)

            check_tables(source, read)
    return PublishedSource(listing.commit, source, tuple(files_to_fetch(listing.files, source)))


def is_document(name: str) -> bool:
    """Return True for config.json and the index."""
    return name in ("config.json", INDEX)


def shard_names(folder: Path) -> set[str]:
    """Return the shards that a folder's index names; without an index SINGLE."""
    return set(read_index(folder).values()) if (folder / INDEX).is_file() else {SINGLE}


def files_to_fetch(files: Iterable[HubFile], source: Checkpoint) -> list[HubFile]:
    """Return the files that download fetches: the small ones, and the shards of the index."""
    return [f for f in files if not f.name.endswith(".safetensors") or f.name in source.shards]


def check_listed(repo: str, names: set[str]) -> None:
    """Raise UserError when a repository lacks a tokenizer or encoding file."""
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise UserError(
            f"hub: {repo}", f"no {', '.join(missing)}", "tokenizer and encoding files",
            "name the repository of the base model, which has them: BASE=deepseek-ai/… "
            "(or a folder: REFERENCE=DIR)",
        )  # fmt: skip


def fetch_missing_documents(source: Path, base: str, patience: float) -> str:
    """Fetch the tokenizer and encoding files that SOURCE lacks from `base`, at its main branch.

    Returns a line for the user, "" when nothing is missing. Files that are there stay. Raises
    UserError when `base` lacks them too, or the hub does not give them.
    """
    if all((source / name).is_file() for name in REQUIRED):
        return ""
    listing = repository.listing(base, "main", patience)
    check_listed(base, {file.name for file in listing.files})
    small = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    wanted = [
        file for file in listing.files
        if (file.name in small or file.name.startswith("encoding/"))
        and not (source / file.name).exists()
    ]  # fmt: skip
    transfer = Transfer(base, listing.commit, source, patience, lambda count: None)
    for file in wanted:
        transfer.fetch(file)
    names = ", ".join(file.name for file in wanted)
    return f"{names} fetched from {base} at {listing.commit[:12]}"
