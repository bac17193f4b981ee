"""Publish a verified bundle: the bytes that verify read, and a model card of facts.

Refuses unless verify.json says that every number of these files passed; each file is hashed again
here. Uploads the files that runtimes read, the model card, verify.json and its page, and the
source's licence; other files of the folder stay. Refuses files that hold a local path or a token.
All files go in one commit, so that nobody downloads half a bundle. The same commit deletes shards
of an earlier bundle, which loaders would read too. An interrupted upload resumes. At the end the
hub's own hashes are compared with verify's.

Log in with `hf auth login` or HF_TOKEN. --dry-run does everything but the upload and prints the
card. Costs one reading of the bundle (180 GB), and the upload.

    .venv/bin/python scripts/publish.py --bundle DIR --source DIR --to user/name
        --report build/KEY/verify.json [--page build/KEY/verify.html] [--private] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv4.errors import UserError, run
from dsv4.hub import repository
from dsv4.hub.file_transfer import file_hash
from dsv4.hub.provenance import provenance
from dsv4.hub.repository import HubFile
from dsv4.hub.upload import Item, check_login, list_all, stale_shards, text_item, upload
from dsv4.model.json_schemas import origin_of
from dsv4.settings import add_setting, parse_path, parse_seconds
from dsv4.storage import limits
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import INDEX
from dsv4.text import LINE, escape_line, join_some, print_escaped, short_repr
from dsv4.verification.report.card import Facts, card, licence_of
from dsv4.verification.report.findings import Findings
from dsv4.verification.report.schema import read_result
from dsv4.verification.scan import Scan, scan

FILES = (
    "config.json", "generation_config.json", "jang_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", INDEX,
)  # fmt: skip
PATIENCE = 300  # seconds without progress, after which it gives up
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
LOCAL = re.compile(r"(?<![\w.:/])(?:/Users|/home|/root|/Volumes|/private|/tmp|/var)/[\w.\-]+")


@dataclass(frozen=True)
class PublishOptions:
    """The options of the command line.

    to: user/name on the hub; report, page: verify.json, and its HTML page if there is one;
    patience: seconds without progress.
    """

    bundle: Path
    source: Path | None
    to: str
    report: Path
    page: Path | None
    private: bool
    dry_run: bool
    patience: float


# ------------------------------------------------------------------------- verify's report


def read_report(path: Path) -> dict[str, Any]:
    """Read verify.json.

    Raises UserError unless every number was compared with the source and passed.
    """
    todo = "make verify, then make publish"
    if not path.is_file():
        raise UserError(f"{path}", "no report", "verify's, on this bundle", todo)
    report = read_result(path)
    expected = "a bundle whose every number passed"
    if report["verdict"] != "passed":
        names = join_some(finding["name"] for finding in report["findings"])
        raise UserError(
            f"{path}", f"verdict {escape_line(report['verdict'])} ({names})", expected, todo
        )
    if 2 not in report["levels"]:
        raise UserError(f"{path}", "level 1 only", expected, f"{todo} (LEVEL=2)")
    if not report["errors"].get("experts") or not report["sizes"]:
        raise UserError(f"{path}", "numbers that were compared with no source", expected, todo)
    return report


# ------------------------------------------------------------------------------ files to upload


def files_to_upload(bundle: Scan) -> list[str]:
    """Return the names of the bundle's files that runtimes read."""
    shards = set(bundle.checkpoint.weight_map.values())
    return [
        name
        for name in bundle.files
        if name in shards or name in FILES or re.fullmatch(r"encoding/[\w./-]+\.(py|json|md)", name)
    ]


def hash_files(
    folder: Path, names: list[str], sizes: dict[str, int], known: dict[str, str]
) -> list[Item]:
    """Hash these files and return their items. known: SHA-256 by name, from verify's report.

    Raises UserError when a file does not hold the bytes that verify read.
    """
    total, items = sum(sizes[name] for name in names), []
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None) as bar:
        for name in names:
            if name not in known:
                raise UserError(
                    f"{folder / name}", "a file that verify has not read", "only files that it has",
                    "make verify, then make publish",
                )  # fmt: skip
            file = HubFile(name, sizes[name], known[name])
            found = file_hash(folder / name, file, bar.update)
            if found != known[name]:
                raise UserError(
                    f"{folder / name}", f"SHA-256 {found[:16]}…",
                    f"{known[name][:16]}… as verified", "make verify, then make publish",
                )  # fmt: skip
            items.append(Item(file, folder / name))
    return items


def public_report(report: dict[str, Any], to: str) -> str:
    """Return verify.json without this machine's paths."""
    source = {k: v for k, v in (report["source"] or {}).items() if k != "folder"}
    return json.dumps({**report, "bundle": to, "source": source}, indent=2) + "\n"


def attachments(options: PublishOptions, report: dict[str, Any], text: str) -> list[Item]:
    """Return the model card `text`, the report and its page, and the source's licence."""
    items = [
        text_item("README.md", text),
        text_item("verify.json", public_report(report, options.to)),
    ]
    if options.page and options.page.is_file():
        if options.page.stat().st_mtime < options.report.stat().st_mtime:
            raise UserError(
                f"{options.page}", "a page older than the report", "one of it", "make report"
            )
        page = read_text(options.page)
        page = page.replace(report["bundle"], options.to) if report["bundle"] else page
        folder = (report["source"] or {}).get("folder")
        items.append(
            text_item("verify.html", page.replace(folder, "the source") if folder else page)
        )
    for path in sorted(options.source.glob("LICENSE*")) if options.source else []:
        items.append(text_item(path.name, read_text(path)))
    return items


def read_text(path: Path) -> str:
    """Read a text file. Raises UserError when it exceeds the size limit, or is no UTF-8."""
    try:
        return limits.read_bounded(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}", f"no UTF-8 ({error})", "text", "restore this file") from error


def check_secrets(items: list[Item], bundle: Scan, places: list[str]) -> None:
    """Raise UserError when an item holds a token or a path of this machine.

    places: paths that must not occur, beside those that LOCAL matches.
    """
    texts = {
        item.name: item.data.decode("utf-8") if item.path is None else read_text(item.path)
        for item in items
        if not item.name.endswith(".safetensors")
    }
    for name, shard in bundle.checkpoint.shards.items():
        texts[name] = "\n".join(shard.metadata.values())
    for name, text in texts.items():
        local = next((place for place in places if place in text), None)
        ours = name != "tokenizer.json" and not name.startswith(("encoding/", "LICENSE"))
        if ours and local is None and (match := LOCAL.search(text)):
            local = match[0]
        if local or SECRET.search(text):
            raise UserError(
                name, f"the local path {local}" if local else "a token", "nothing of this machine",
                "remove it (make patch does, in jang_config.json), make verify, then make publish",
            )  # fmt: skip


# ----------------------------------------------------------------------------------- publishing


def prepare(options: PublishOptions) -> tuple[list[Item], str, list[str]]:
    """Return the items to upload, the model card, and the names of the files that stay here."""
    report = read_report(options.report)
    findings = Findings()
    bundle = scan(options.bundle, findings)
    if bundle is None or findings.errors:
        raise UserError(
            f"{options.bundle}", join_some(sorted(findings.names)), "no fault", "make verify"
        )
    source = options.source
    origin = provenance(source) if source else None
    origin = origin or origin_of(bundle.documents.get("jang_config.json", {}))
    text = card(Facts(options.to, bundle, report, origin, licence_of(source)))
    names = files_to_upload(bundle)
    extra = attachments(options, report, text)
    small = [Item(HubFile(name, 0, ""), options.bundle / name) for name in names]
    places = [str(p.resolve()) for p in (options.bundle, source, Path.cwd()) if p]
    check_secrets([*small, *extra], bundle, [p for p in places if len(p) > 4])
    items = hash_files(options.bundle, names, bundle.files, report["hashes"]) + extra
    return items, text, sorted(set(bundle.files) - {item.name for item in items})


def print_deletions(to: str, items: list[Item]) -> None:
    """Print which shards of the repository would be deleted, or why that is not known."""
    try:
        remote = list_all(to, 0)
    except UserError as stop:
        print_escaped(
            f"would be deleted: unknown, or nothing when {to} is new ({escape_line(stop, LINE)})"
        )
        return
    for name in stale_shards({item.name for item in items}, remote):
        print_escaped(f"would be deleted: {escape_line(name)}")


def publish(options: PublishOptions) -> None:
    """Upload the bundle, or print what would be uploaded."""
    to = options.to
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", to):
        raise UserError("TO", short_repr(to), "user/name", "make publish TO=user/name")
    if not options.dry_run:
        check_login(to)
    items, text, left = prepare(options)
    total = format_bytes(sum(item.file.size for item in items))
    if options.dry_run:
        print_escaped(text)
        for item in items:
            facts = f"{item.file.size:,} bytes  {escape_line(item.file.sha256)}"
            print_escaped(f"would be uploaded: {escape_line(item.name)}  {facts}")
    for name in left:
        print_escaped(f"stays here: {escape_line(name)}")
    if options.dry_run:
        print_deletions(to, items)
        print(f"{len(items)} files, {total}; nothing was uploaded")
        return
    print(f"{to}: {len(items)} files, {total}")
    commit = upload(to, items, options.private, options.patience)
    print(f"{to}: published at {commit}, every hash as verified")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "SOURCE", help="for its origin and licence")
    add_setting(parser, "TO", required=True, help="user/name on the hub")
    parser.add_argument("--report", type=parse_path, required=True, help="verify's --json")
    parser.add_argument("--page", type=parse_path, help="report's HTML page, if there is one")
    add_setting(parser, "PRIVATE", help="make a new repository private")
    add_setting(parser, "DRY_RUN", help="print card and files, upload nothing")
    parser.add_argument(
        "--patience", type=parse_seconds, default=PATIENCE, metavar="SECONDS",
        help="how long to retry without progress (default %(default)s)",
    )  # fmt: skip
    options = PublishOptions(**vars(parser.parse_args()))
    sys.stdout.reconfigure(line_buffering=True)
    repository.quiet(bars=True)
    publish(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
