"""Find and judge a source, wherever it is: in its folder, in part (LOW_DISK), or on the hub."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from dsv4.conversion import low_disk, published_source
from dsv4.conversion.tokenizer_files import REQUIRED
from dsv4.errors import UserError
from dsv4.hub.download import recorded, remaining
from dsv4.hub.provenance import HEADERS, read_record
from dsv4.model.source import check_tokenizer_files, open_source, source_notes
from dsv4.model.source_format import release_name
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import INDEX, SINGLE, Checkpoint, MissingShards

AT_ONCE = 4  # shards of the source that lie there at one time with LOW_DISK, as a rule


@dataclass(frozen=True)
class SourceState:
    """A judged source. headers: its data need not be there; fetch: bytes still to be fetched."""

    description: str
    headers: Checkpoint
    fetch: int = 0


def source_state(
    source: Path, repo: str, revision: str, in_parts: bool, has_tokenizer: bool
) -> SourceState:
    """Judge a source by the folder's headers, else those that LOW_DISK kept, else the hub's.

    repo: where it is fetched from, "" if it is there already. has_tokenizer: the tokenizer files
    come from elsewhere. Raises UserError as `open_source` and `open_published` do.
    """
    if in_parts and repo:
        return _state_in_parts(source, repo, revision, has_tokenizer)
    if (source / INDEX).is_file() or (source / SINGLE).is_file():
        with contextlib.suppress(MissingShards if repo else ()):
            return _local_state(source, repo, revision, has_tokenizer)
    if not repo:
        raise UserError("source", f"no {source / INDEX}", "one", "set SOURCE, or REPO to fetch it")
    published = published_source.open_published(repo, revision, has_tokenizer)
    needed = remaining(source, published.files)
    total = sum(file.size for file in published.files)
    description = (
        f"{describe(published.checkpoint)}, {format_bytes(total)} on the hub at "
        f"{published.commit[:12]}, {format_bytes(needed)} still to fetch"
    )
    return SourceState(description, published.checkpoint, needed)


def _local_state(source: Path, repo: str, revision: str, has_tokenizer: bool) -> SourceState:
    opened = open_source(source)
    if not has_tokenizer:
        check_tokenizer_files(source, REQUIRED)
    known = bool(repo and recorded(source, repo, revision))
    complete = f"complete{' as downloaded' if known else ''}"
    return SourceState(f"{describe(opened)}, {complete}, {format_bytes(opened.nbytes)}", opened)


def _state_in_parts(source: Path, repo: str, revision: str, has_tokenizer: bool) -> SourceState:
    record = read_record(source)
    if record is not None and record.repo == repo and (source / HEADERS).is_dir():
        with low_disk.header_checkpoint(source, record) as headers:
            files = [file for file in record.files.values() if file.name in headers.shards]
    else:
        published = published_source.open_published(repo, revision, has_tokenizer)
        headers, files = published.checkpoint, list(published.files)
    at_once = sum(sorted((file.size for file in files), reverse=True)[:AT_ONCE])
    total = sum(file.size for file in files)
    description = (
        f"{describe(headers)}, {format_bytes(total)} on the hub, {format_bytes(at_once)} of it "
        "here at one time"
    )
    return SourceState(description, headers, at_once)


def describe(source: Checkpoint) -> str:
    """Return a source's release and what is unusual in it."""
    return "; ".join((release_name(source.config, source.tensors), *source_notes(source)))
