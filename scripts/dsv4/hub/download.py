"""Bring a source folder to one pinned commit, whatever is there already."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from dsv4.errors import UserError
from dsv4.hub import repository
from dsv4.hub.file_transfer import Interrupted, Transfer, file_hash, partial_for, size_of
from dsv4.hub.hub_errors import RevisionNotFound
from dsv4.hub.provenance import RECORD, Record, read_record
from dsv4.hub.repository import HubFile
from dsv4.storage import filesystem, locks, safe_paths
from dsv4.storage.checkpoint import INDEX, SINGLE, read_index

PATIENCE = 300  # seconds without a byte, after which a transfer gives up
WORKERS = 4  # files at once: one HTTP stream seldom fills a fast line


def recorded(source: Path, repo: str, revision: str) -> Record | None:
    """Return the record of a complete, untouched download of this revision, else None."""
    record = read_record(source)
    if record is None or record.repo != repo:
        return None
    same = revision in (record.revision, record.commit)
    return record if same and record.is_complete(source) else None


def remaining(source: Path, files: Iterable[HubFile]) -> int:
    """Return the bytes still to fetch: absent files, and those of another size, less what their
    partial files hold."""
    total = 0
    for file in files:
        path = source / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            total += max(0, file.size - size_of(partial_for(path, file)))
    return total


# --- The pinned commit ----------------------------------------------------------------------------


def check_pin(source: Path, record: Record, repo: str, revision: str) -> None:
    """Raise UserError when the folder is pinned to something else than what is asked for."""
    if record.repo != repo:
        raise UserError(
            f"{source}", f"a download of {record.repo}", repo, "set SOURCE to another folder"
        )
    if revision in (record.revision, record.commit):
        return
    asked = revision
    if not re.fullmatch("[0-9a-f]{40}", revision):
        asked = repository.commit_of(repo, revision)
    if asked != record.commit:
        raise UserError(
            f"{source}", f"the commit {record.commit[:12]} pinned", f"{revision} ({asked[:12]})",
            f"set SOURCE to another folder, or delete {source / RECORD} to let this one change",
        )  # fmt: skip


def pin(source: Path, repo: str, revision: str, patience: float) -> Record:
    """Ask the hub what `revision` stands for and write that down before anything is fetched."""
    record = Record.pinned(repo, revision, repository.listing(repo, revision, patience))
    source.mkdir(parents=True, exist_ok=True)
    with locks.locked(source):
        filesystem.check_case(f"hub: {repo}", record.files, source)
        record.write(source)
    print(f"{source}: pinned to {repo} at {record.commit}")
    return record


@contextlib.contextmanager
def at_pin(source: Path, record: Record) -> Iterator[None]:
    """Raise a UserError that says how to go on, when the pinned commit is no longer on the hub."""
    try:
        yield
    except RevisionNotFound:
        raise UserError(
            f"hub: {record.repo}", f"the pinned commit {record.commit[:12]} gone from the hub",
            "it there, as when this download began",
            f"what is verified stays; to take what {record.revision} is by now, delete "
            f"{source / RECORD} and run download again: files whose hashes agree are kept",
        ) from None  # fmt: skip


def report_news(record: Record) -> None:
    """Print when the revision stands for another commit by now. Errors of the hub are ignored."""
    with contextlib.suppress(UserError):
        now = repository.commit_of(record.repo, record.revision)
        if now != record.commit:
            print(
                f"note: {record.repo} {record.revision} is at {now[:12]} by now; this folder stays "
                f"at {record.commit[:12]} (a new SOURCE gets the new one)"
            )


# --- Files on the disk ----------------------------------------------------------------------------


def hash_present(source: Path, record: Record, names: list[str], again: bool) -> None:
    """Hash those of the files that are there and not verified (with `again`: all), and record it.

    Raises UserError when some differ from the hub's, after moving them aside; before anything is
    done when a link leads out of the folder on the way to one.
    """
    for name in names:
        safe_paths.file_type(source, name)
    todo = [
        record.files[name]
        for name in names
        if (source / name).is_file() and (again or not record.is_verified(source, name))
    ]
    wrong = []
    total = sum(file.size for file in todo)
    hidden = None if todo else True  # None: shown on a terminal
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=hidden) as bar:
        for file in todo:
            path = source / file.name
            if size_of(path) == file.size and file_hash(path, file, bar.update) == file.digest:
                record.set_verified(source, file.name)
            else:
                record.verified.pop(file.name, None)
                safe_paths.move(source, file.name, file.name + ".bad")
                wrong.append(file.name)
            record.write(source)
    if wrong:
        raise UserError(
            f"{source / wrong[0]}",
            f"another size or hash than the hub's ({len(wrong)} of {len(todo)} files so)",
            f"the bytes of {record.commit[:12]}",
            "moved aside as .bad; run the same command again to fetch the right ones",
        )


def select_shards(source: Path, record: Record) -> None:
    """Keep in the record the shards that the index names; without an index, model.safetensors.

    A repository may hold others (an adapter's, consolidated ones), which are not fetched. Raises
    UserError when it lacks one that is named.
    """
    if INDEX in record.files:
        where, named = f"{source / INDEX}", set(read_index(source).values())
    else:
        where, named = f"hub: {record.repo}, which has no {INDEX}", {SINGLE}
    missing = sorted(named - set(record.files))
    if missing:
        raise UserError(
            where, f"{missing[0]} and {len(missing) - 1} more that the hub lacks",
            "only shards that can be fetched", "use another revision",
        )  # fmt: skip
    before = len(record.files)
    record.keep_shards(named)
    if len(record.files) < before:
        record.write(source)


# --- Fetching -------------------------------------------------------------------------------------


def fetch_documents(
    source: Path, record: Record, patience: float, workers: int, again: bool = False
) -> None:
    """Fetch what is missing of the JSON and text files, and select the shards by the index.

    Raises UserError for failures, and as `hash_present` and `select_shards` do.
    """
    fetch(source, record, documents(record), patience, workers, again)
    select_shards(source, record)


def fetch_shards(
    source: Path, record: Record, patience: float, workers: int, again: bool = False
) -> None:
    """Fetch the shards that are missing. Raises UserError for failures, and as `hash_present`
    does."""
    names = [name for name in record.files if name not in documents(record)]
    fetch(source, record, names, patience, workers, again)


def documents(record: Record) -> list[str]:
    """Return the names of all files but the shards."""
    return [name for name in record.files if not name.endswith(".safetensors")]


def fetch(
    source: Path, record: Record, names: list[str], patience: float, workers: int, again: bool
) -> None:
    """Hash those of the files that are there, and fetch the others, with a progress bar."""
    hash_present(source, record, names, again)
    missing = [record.files[name] for name in names if not record.is_verified(source, name)]
    needed, total = remaining(source, missing), sum(file.size for file in missing)
    with tqdm(
        total=total, initial=total - needed, unit="B", unit_scale=True, desc="download",
        disable=None if missing else True,
    ) as bar:  # fmt: skip
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        transfer = Transfer(record.repo, record.commit, source, patience, advance)
        fetch_all(transfer, record, missing, workers)


def fetch_all(transfer: Transfer, record: Record, files: list[HubFile], workers: int) -> None:
    """Fetch some files at once; the first failure stops the others, and they keep what they have.

    Raises UserError for a failure of the hub, the network or the disk.
    """
    with at_pin(transfer.folder, record), ThreadPoolExecutor(max_workers=workers) as pool:
        running = {pool.submit(transfer.fetch, file): file for file in files}
        try:
            for done in as_completed(running):
                done.result()
                record.set_verified(transfer.folder, running[done].name)
                record.write(transfer.folder)
        except BaseException as error:
            transfer.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise first_cause(error, running) from None


def first_cause(error: BaseException, running: dict) -> BaseException:
    """Return the error to raise: for a full disk a UserError, and never a mere Interrupted."""
    if isinstance(error, Interrupted):
        causes = [f.exception() for f in running if f.done() and not f.cancelled()]
        error = next((c for c in causes if c and not isinstance(c, Interrupted)), error)
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return UserError(
            "download", f"a full volume ({error.strerror})", "room for the rest of the source",
            "free space; run the same command again: it resumes",
        )  # fmt: skip
    return error
