"""Download the source checkpoint and prove that it arrived whole.

The first run pins the commit that REVISION stands for, in SOURCE/.download.json, and every later
run goes on at that commit; a newer one upstream is reported, never used. Files come by ranged HTTP
requests and resume in the middle of a file, also after a reboot. Each file gets its name only when
its size and hash (SHA-256; git's blob hash for small files) are the hub's. At the end every shard
that the index names must be there, whole by its header. A complete source is recognised in seconds
without a network; --verify-hashes reads everything again.

160 GB (149 GiB) for DeepSeek-V4-Flash. A source that came some other way is used as it is with
--repo "" (its headers are checked, its hashes cannot be). The login is `hf auth login` or HF_TOKEN.

    .venv/bin/python scripts/download.py --source DIR --repo deepseek-ai/DeepSeek-V4-Flash
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import re
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from dsv4 import hub, low_disk, space
from dsv4.checkpoint import INDEX, open_source, read_index
from dsv4.durable import human
from dsv4.hub import HubFile
from dsv4.origin import RECORD, Record, read_record
from dsv4.stop import Stop, run
from dsv4.transfer import Interrupted, Transfer, file_hash, partial_for, size_of

LOCK = ".download.lock"
PATIENCE = 300  # seconds without a byte, after which a transfer gives up
WORKERS = 4  # files at once: one HTTP stream seldom fills a fast line


def recorded(source: Path, repo: str, revision: str) -> Record | None:
    """The record of a complete download of this revision whose files are untouched, else None."""
    record = read_record(source)
    if record is None or record.repo != repo:
        return None
    same = revision in (record.revision, record.commit)
    return record if same and record.is_complete(source) else None


def remaining(source: Path, files: tuple[HubFile, ...]) -> int:
    """Bytes still to fetch: files that are absent or of another size, less their partial parts."""
    total = 0
    for file in files:
        path = source / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            total += max(0, file.size - size_of(partial_for(path, file)))
    return total


# ------------------------------------------------------------------------------------ the pin


def check_pin(source: Path, record: Record, repo: str, revision: str) -> None:
    """Raise Stop when the folder is pinned to something else than what is asked for."""
    if record.repo != repo:
        raise Stop(
            f"{source}", f"a download of {record.repo}", repo, "set SOURCE to another folder"
        )
    if revision in (record.revision, record.commit):
        return
    asked = revision
    if not re.fullmatch("[0-9a-f]{40}", revision):
        asked = hub.commit_of(repo, revision)
    if asked != record.commit:
        raise Stop(
            f"{source}", f"the commit {record.commit[:12]} pinned", f"{revision} ({asked[:12]})",
            f"set SOURCE to another folder, or delete {source / RECORD} to let this one change",
        )  # fmt: skip


def pin(source: Path, repo: str, revision: str, patience: float) -> Record:
    """Ask the hub what `revision` stands for and write that down before anything is fetched."""
    record = Record.pinned(repo, revision, hub.listing(repo, revision, patience))
    source.mkdir(parents=True, exist_ok=True)
    record.write(source)
    print(f"{source}: pinned to {repo} at {record.commit}")
    return record


def report_news(record: Record) -> None:
    """Say when the revision stands for another commit by now. Silent when the hub is silent."""
    with contextlib.suppress(Stop):
        now = hub.commit_of(record.repo, record.revision)
        if now != record.commit:
            print(
                f"note: {record.repo} {record.revision} is at {now[:12]} by now; this folder stays "
                f"at {record.commit[:12]} (a new SOURCE gets the new one)"
            )


@contextlib.contextmanager
def locked(source: Path) -> Iterator[None]:
    """Hold the folder against a second download. Raises Stop when one is running."""
    with (source / LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Stop(f"{source}", "another download running", "none", "wait for it") from error
        yield


# ---------------------------------------------------------------------------- what is there


def hash_present(source: Path, record: Record, again: bool) -> None:
    """Hash every file that is there and not known (with `again`: every file), and record it.

    Raises Stop when some differ from the hub's, after moving them aside.
    """
    todo = [
        file
        for name, file in record.files.items()
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
                path.replace(path.with_name(path.name + ".bad"))
                wrong.append(file.name)
            record.write(source)
    if wrong:
        raise Stop(
            f"{source / wrong[0]}",
            f"another size or hash than the hub's ({len(wrong)} of {len(todo)} files so)",
            f"the bytes of {record.commit[:12]}",
            "moved aside as .bad; run the same command again to fetch the right ones",
        )


def check_room(source: Path, needed: int) -> None:
    """Raise Stop when the volume cannot hold what is still to be fetched."""
    free = space.free(source)
    if needed > free:
        raise Stop(
            f"{source}", f"{human(free)} free", f"{human(needed)} for what is still to fetch",
            "free space, or set SOURCE to another volume",
        )  # fmt: skip


def check_listing(source: Path, record: Record) -> None:
    """Raise Stop when the index names a shard that the repository does not have."""
    missing = sorted(set(read_index(source).values()) - set(record.files))
    if missing:
        raise Stop(
            f"{source / INDEX}", f"{missing[0]} and {len(missing) - 1} more that the hub lacks",
            "only shards that can be fetched", "use another revision",
        )  # fmt: skip


# ------------------------------------------------------------------------------------ fetching


def fetch(
    source: Path, record: Record, patience: float, workers: int, shards_too: bool = True
) -> None:
    """Fetch what is missing: first JSON and text, then, when the index agrees, the shards."""
    missing = [file for name, file in record.files.items() if not record.is_verified(source, name)]
    shards = [file for file in missing if file.name.endswith(".safetensors")]
    needed = remaining(source, tuple(missing))
    total = sum(file.size for file in missing)
    with tqdm(
        total=total, initial=total - needed, unit="B", unit_scale=True, desc="download",
        disable=None if missing else True,
    ) as bar:  # fmt: skip
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        transfer = Transfer(record.repo, record.commit, source, patience, advance)
        fetch_all(transfer, record, [file for file in missing if file not in shards], workers)
        check_listing(source, record)
        if shards_too:
            fetch_all(transfer, record, shards, workers)


def fetch_all(transfer: Transfer, record: Record, files: list[HubFile], workers: int) -> None:
    """Fetch some files at once; the first failure stops the others, and they keep what they have.

    Raises Stop for a failure of the hub, the network or the disk.
    """
    with ThreadPoolExecutor(max_workers=workers) as pool:
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
    """The error to tell: a full disk in the project's words, and never a mere Interrupted."""
    if isinstance(error, Interrupted):
        causes = [f.exception() for f in running if f.done() and not f.cancelled()]
        error = next((c for c in causes if c and not isinstance(c, Interrupted)), error)
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in full:
        return Stop(
            "download", f"a full volume ({error.strerror})", "room for the rest of the source",
            "free space; run the same command again: it resumes",
        )  # fmt: skip
    return error


# --------------------------------------------------------------------------------- in all


def check_local(source: Path) -> str:
    """Check a source that did not come from here by its headers; return what to say."""
    opened = open_source(source)
    return f"{len(opened.shards)} shards, {human(opened.nbytes)}, whole by their headers"


def download(args: argparse.Namespace) -> str:
    """Bring the source to the pinned commit's state; return what to say."""
    source, repo, revision = args.source, args.repo, args.revision
    record = read_record(source)
    if record is not None:
        check_pin(source, record, repo, revision)
        if record.is_complete(source) and not args.verify_hashes:
            open_source(source)
            return f"complete already: {len(record.files)} files at {record.commit[:12]}"
        report_news(record)
    else:
        record = pin(source, repo, revision, args.patience)
    with locked(source):
        needed = remaining(source, tuple(record.files.values()))
        print(f"{source}: {human(record.nbytes)} in all, {human(needed)} still to fetch")
        check_room(source, needed)
        hash_present(source, record, args.verify_hashes)
        fetch(source, record, args.patience, args.workers)
        open_source(source)
    said = f"{len(record.files)} files, {human(record.nbytes)}, sizes and hashes as on the hub"
    return f"{said} at {record.commit[:12]}"


def prepare(args: argparse.Namespace) -> str:
    """Fetch all but the shards, and the shards' headers; return what to say."""
    source, repo, revision = args.source, args.repo, args.revision
    record = read_record(source)
    if record is None:
        record = pin(source, repo, revision, args.patience)
    check_pin(source, record, repo, revision)
    with locked(source):
        fetch(source, record, args.patience, args.workers, shards_too=False)
        came = low_disk.fetch_headers(source, record, args.patience)
    return f"headers of {came} shards fetched; the shards come and go while convert runs"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--repo", required=True, help='"" for a source that is there already')
    parser.add_argument("--revision", default="main", help="commit hash, tag or branch")
    parser.add_argument("--verify-hashes", action="store_true", help="reread and hash every file")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE, metavar="SECONDS",
        help="how long to try again while nothing comes (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=WORKERS, help="files fetched at once")
    parser.add_argument("--low-disk", action="store_true",
                        help="leave the shards to convert --low-disk")  # fmt: skip
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # what is said stands before an error on stderr
    hub.quiet()
    if args.low_disk and args.repo:
        said = prepare(args)
    else:
        said = download(args) if args.repo else check_local(args.source)
    print(f"{args.source}: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
