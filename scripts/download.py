"""Download the source checkpoint and prove that it arrived whole.

A snapshot of REPO at REVISION goes into the source folder through huggingface_hub, which resumes
where it was interrupted. Then every file is compared with the hub's size, every shard with its
SHA-256, and every shard that the index names must be there. The result is kept in
SOURCE/.download.json, so that a complete source is recognised in seconds and without a network.

160 GB (149 GiB) for DeepSeek-V4-Flash. A source that came some other way is used as it is with
--repo "" (its headers are checked, its hashes cannot be). The login is `hf auth login` or HF_TOKEN.

    .venv/bin/python scripts/download.py --source DIR --repo deepseek-ai/DeepSeek-V4-Flash
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv4 import hub, space
from dsv4.checkpoint import open_source, read_json
from dsv4.durable import human, write_json
from dsv4.stop import Stop, run

RECORD = ".download.json"
CHUNK = 8 << 20


def stamp(path: Path) -> list[int]:
    """Size and modification time (ns): what a record remembers of a file that was verified."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def recorded(source: Path, repo: str, revision: str) -> dict[str, Any] | None:
    """The record of an earlier download of this revision if its files are untouched, else None."""
    path = source / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("repo") != repo or revision not in (record.get("revision"), record.get("commit")):
        return None
    files = record.get("files", {})
    whole = all((source / n).is_file() and stamp(source / n) == s for n, s in files.items())
    return record if files and whole else None


def remaining(source: Path, files: tuple[hub.HubFile, ...]) -> int:
    """Bytes still to fetch: files that are absent or of another size, less their partial parts."""
    total = 0
    for file in files:
        path = source / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            total += file.size
    partial = (source / ".cache" / "huggingface" / "download").rglob("*.incomplete")
    return max(0, total - sum(path.stat().st_size for path in partial))


def check_room(source: Path, needed: int) -> None:
    """Raise Stop when the volume cannot hold what is still to be fetched."""
    free = space.free(source)
    if needed > free:
        raise Stop(
            f"{source}",
            f"{human(free)} free",
            f"{human(needed)} for what is still to fetch",
            "free space, or set SOURCE to another volume",
        )


def fetch(repo: str, listing: hub.Listing, source: Path) -> None:
    """Fetch the wanted files at the listing's commit; huggingface_hub resumes partial files."""
    from huggingface_hub import snapshot_download

    with hub.clear_words(repo):
        snapshot_download(
            repo,
            revision=listing.commit,
            local_dir=source,
            allow_patterns=[file.name for file in listing.files],
        )


def sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def check_files(source: Path, files: tuple[hub.HubFile, ...]) -> None:
    """Compare every file with the hub's size and SHA-256.

    Raises Stop for the first that differs, after moving it away, so that the next run fetches it.
    """
    hashed = sum(file.size for file in files if file.sha256)
    with tqdm(total=hashed, unit="B", unit_scale=True, desc="SHA-256", disable=None) as bar:
        for file in files:
            path = source / file.name
            if not path.is_file():
                raise Stop(f"{path}", "no such file", "it from the hub", "run download again")
            size = path.stat().st_size
            if size != file.size:
                discard(path)
                raise Stop(
                    f"{path}", f"{size:,} bytes", f"{file.size:,} by the hub", "run download again"
                )
            if file.sha256 and (found := sha256(path, bar)) != file.sha256:
                discard(path)
                raise Stop(
                    f"{path}",
                    f"SHA-256 {found[:16]}…",
                    f"{file.sha256[:16]}… by the hub",
                    f"run download again (kept as {path.name}.bad)",
                )


def discard(path: Path) -> None:
    """Move a wrong file aside under a name that no glob for shards matches."""
    path.replace(path.with_name(path.name + ".bad"))


def check_local(source: Path) -> str:
    """Check a source that did not come from here by its headers; return what to say."""
    opened = open_source(source)
    return f"{len(opened.shards)} shards, {human(opened.nbytes)}, whole by their headers"


def download(source: Path, repo: str, revision: str, rehash: bool) -> str:
    """Bring `source` to the hub's state and record it; return what to say."""
    if not rehash and (record := recorded(source, repo, revision)):
        open_source(source)
        return f"complete already ({len(record['files'])} files at {record['commit'][:12]})"
    listing = hub.listing(repo, revision)
    total = sum(file.size for file in listing.files)
    needed = remaining(source, listing.files)
    check_room(source, needed)
    print(f"{source}: {human(total)} at {listing.commit[:12]}, {human(needed)} still to fetch")
    source.mkdir(parents=True, exist_ok=True)
    if needed or not recorded(source, repo, revision):
        fetch(repo, listing, source)
    check_files(source, listing.files)
    open_source(source)
    files = {file.name: stamp(source / file.name) for file in listing.files}
    record = {"repo": repo, "revision": revision, "commit": listing.commit, "files": files}
    write_json(source / RECORD, record)
    return f"{len(files)} files, {human(total)}, sizes and hashes as on the hub"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--repo", required=True, help='"" for a source that is there already')
    parser.add_argument("--revision", default="main", help="commit hash, tag or branch")
    parser.add_argument("--verify-hashes", action="store_true", help="reread and hash every file")
    args = parser.parse_args()
    if args.repo:
        said = download(args.source, args.repo, args.revision, args.verify_hashes)
    else:
        said = check_local(args.source)
    print(f"{args.source}: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
