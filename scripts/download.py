"""Download the source checkpoint and prove that it arrived whole.

The first run pins the commit that REVISION stands for, in SOURCE/.download.json, and every later
run goes on at that commit; a newer one upstream is reported, never used. Files come by ranged HTTP
requests and resume in the middle of a file, also after a reboot. Each file gets its name only when
its size and hash (SHA-256; git's blob hash for small files) are the hub's. The small files come
first; of the shards, those that the index names are fetched, and no others. At the end each of them
must be whole by its header. A complete source is recognised in seconds without a network;
--verify-hashes reads everything again.

160 GB (149 GiB) for DeepSeek-V4-Flash. A source that came some other way is used as it is with
--repo "" (its headers are checked, its hashes cannot be). The login is `hf auth login` or HF_TOKEN.

    .venv/bin/python scripts/download.py --source DIR --repo deepseek-ai/DeepSeek-V4-Flash
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dsv4.conversion import low_disk, published_source
from dsv4.errors import run
from dsv4.hub import download as hub
from dsv4.hub import repository
from dsv4.hub.provenance import Record, read_record
from dsv4.model.folder_roles import check_no_bundle
from dsv4.model.source import open_source
from dsv4.model.source_format import release_name
from dsv4.settings import add_setting, parse_jobs, parse_seconds
from dsv4.storage import locks
from dsv4.storage.atomic import format_bytes
from dsv4.storage.disk_space import check_free_space
from dsv4.text import escape_line, print_escaped


def check_local(source: Path) -> str:
    """Check a source that did not come from here by its headers; return what to say."""
    opened = open_source(source)
    return f"{len(opened.shards)} shards, {format_bytes(opened.nbytes)}, whole by their headers"


def download(args: argparse.Namespace) -> str:
    """Bring the source to the pinned commit's state; return what to say."""
    source, repo, revision = args.source, args.repo, args.revision
    record = read_record(source)
    if record is not None:
        hub.check_pin(source, record, repo, revision)
        if record.is_complete(source) and not args.verify_hashes:
            open_source(source)
            return f"complete already: {len(record.files)} files at {record.commit[:12]}"
        hub.report_news(record)
    else:
        check_no_bundle(source)
        record = hub.pin(source, repo, revision, args.patience)
    with locks.locked(source):
        hub.fetch_documents(source, record, args.patience, args.workers, args.verify_hashes)
        needed = hub.remaining(source, record.files.values())
        print(
            f"{source}: {format_bytes(record.nbytes)} in all, {format_bytes(needed)} still to fetch"
        )
        todo = "free space, or set SOURCE to another volume"
        check_free_space(source, needed, " for what is still to fetch", todo)
        shards = [record.files[name] for name in record.shards]
        if hub.remaining(source, shards) == sum(file.size for file in shards):
            judge(args, record)
        hub.fetch_shards(source, record, args.patience, args.workers, args.verify_hashes)
        open_source(source)
    said = (
        f"{len(record.files)} files, {format_bytes(record.nbytes)}, sizes and hashes as on the hub"
    )
    return f"{said} at {record.commit[:12]}"


def judge(args: argparse.Namespace, record: Record) -> None:
    """Judge the source on the hub. Raises UserError before a shard of a wrong one is fetched."""
    has_tokenizer = bool(args.reference or args.base)
    with hub.at_pin(args.source, record):
        published = published_source.open_published(
            record.repo, record.commit, has_tokenizer, args.patience
        )
    source = published.checkpoint
    release = release_name(source.config, source.tensors)
    print_escaped(f"{escape_line(args.source)}: {release}")


def prepare(args: argparse.Namespace) -> str:
    """Fetch all but the shards, and the shards' headers; return what to say."""
    source, repo, revision = args.source, args.repo, args.revision
    record = read_record(source)
    if record is None:
        check_no_bundle(source)
        record = hub.pin(source, repo, revision, args.patience)
    hub.check_pin(source, record, repo, revision)
    with locks.locked(source):
        hub.fetch_documents(source, record, args.patience, args.workers)
        if not low_disk.headers_folder(source).is_dir():
            judge(args, record)
        came = low_disk.fetch_headers(source, record, args.patience)
    return f"headers of {came} shards fetched; the shards come and go while convert runs"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True)
    add_setting(parser, "REPO", default="", help="user/name; none: the source is there already")
    add_setting(parser, "REVISION", default="main", help="commit hash, tag or branch")
    add_setting(parser, "BASE", default="", help="user/name that has the tokenizer files")
    add_setting(parser, "REFERENCE", help="folder that has them")
    add_setting(parser, "VERIFY_HASHES", help="reread and hash every file")
    parser.add_argument(
        "--patience", type=parse_seconds, default=hub.PATIENCE, metavar="SECONDS",
        help="how long to try again while nothing comes (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=parse_jobs, default=hub.WORKERS, help="files fetched at once"
    )
    add_setting(parser, "LOW_DISK", help="leave the shards to convert --low-disk")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # what is said stands before an error on stderr
    repository.quiet()
    if args.low_disk and args.repo:
        said = prepare(args)
    else:
        said = download(args) if args.repo else check_local(args.source)
    print(f"{args.source}: {said}")
    if args.base:
        with locks.locked(args.source):
            came = published_source.fetch_missing_documents(args.source, args.base, args.patience)
        if came:
            print_escaped(f"{escape_line(args.source)}: {came}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
