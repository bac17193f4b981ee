"""Publish a verified bundle: exactly the bytes that verify read, and a model card of facts.

Refuses unless verify.json says that every number of exactly these files passed; each file is hashed
again here. Goes up: the files that runtimes read, the model card, verify.json and its page, the
source's licence; nothing else that lies in the folder. Nothing is published that holds a local path
or a token. All files arrive in one commit, so that nobody ever downloads half a bundle; shards of
an earlier one, which loaders would read too, go in the same commit. An interrupted upload goes on
where it stopped. At the end the hub's own hashes are compared with verify's.

The login is `hf auth login` or HF_TOKEN. --dry-run does everything but the upload and shows the
card. Costs one reading of the bundle (180 GB), and the upload.

    .venv/bin/python scripts/publish.py --bundle DIR --source DIR --to user/name
        --report build/KEY/verify.json [--page build/KEY/verify.html] [--private] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv4.errors import UserError, run
from dsv4.hub import repository
from dsv4.hub.file_transfer import file_hash
from dsv4.hub.provenance import provenance
from dsv4.hub.repository import HubFile
from dsv4.hub.upload import Item, check_login, list_all, made, stale_shards, upload
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


# ------------------------------------------------------------------------- what verify said


def read_report(path: Path) -> dict[str, Any]:
    """verify.json. Raises UserError unless every number was compared with the source and passed."""
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


# ------------------------------------------------------------------------------ what goes up


def wanted(bundle: Scan) -> list[str]:
    """The files of the bundle that runtimes read."""
    shards = set(bundle.checkpoint.weight_map.values())
    return [
        name
        for name in bundle.files
        if name in shards or name in FILES or re.fullmatch(r"encoding/[\w./-]+\.(py|json|md)", name)
    ]


def hashed(folder: Path, names: list[str], sizes: dict[str, int], known: dict[str, str]) -> list:
    """Items for these files. Raises UserError when one does not hold the bytes that verify read."""
    total, items = sum(sizes[name] for name in names), []
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=None) as bar:
        for name in names:
            if name not in known:
                raise UserError(
                    f"{folder / name}", "a file that verify has not seen", "only files that it has",
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


def public(report: dict[str, Any], to: str) -> str:
    """verify.json without this machine's paths."""
    source = {k: v for k, v in (report["source"] or {}).items() if k != "folder"}
    return json.dumps({**report, "bundle": to, "source": source}, indent=2) + "\n"


def attachments(args: argparse.Namespace, report: dict[str, Any], text: str) -> list[Item]:
    """The card, the report and its page, and the source's licence."""
    items = [made("README.md", text), made("verify.json", public(report, args.to))]
    if args.page and args.page.is_file():
        if args.page.stat().st_mtime < args.report.stat().st_mtime:
            raise UserError(
                f"{args.page}", "a page older than the report", "one of it", "make report"
            )
        page = text_of(args.page)
        page = page.replace(report["bundle"], args.to) if report["bundle"] else page
        folder = (report["source"] or {}).get("folder")
        items.append(made("verify.html", page.replace(folder, "the source") if folder else page))
    for path in sorted(args.source.glob("LICENSE*")) if args.source else []:
        items.append(made(path.name, text_of(path)))
    return items


def text_of(path: Path) -> str:
    """A text file. Raises UserError when it is larger than any document, or no UTF-8."""
    try:
        return limits.read_bounded(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}", f"no UTF-8 ({error})", "text", "restore this file") from error


def check_secrets(items: list[Item], bundle: Scan, places: list[str]) -> None:
    """Raise UserError when something that goes up holds a token or a path of this machine."""
    texts = {
        item.name: item.data.decode("utf-8") if item.path is None else text_of(item.path)
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


# ----------------------------------------------------------------------------------- in all


def prepare(args: argparse.Namespace) -> tuple[list[Item], str, list[str]]:
    """Everything that goes up, the card, and what stays here."""
    report = read_report(args.report)
    findings = Findings()
    bundle = scan(args.bundle, findings)
    if bundle is None or findings.errors:
        raise UserError(
            f"{args.bundle}", join_some(sorted(findings.names)), "no fault", "make verify"
        )
    origin = provenance(args.source) if args.source else None
    origin = origin or origin_of(bundle.documents.get("jang_config.json", {}))
    text = card(Facts(args.to, bundle, report, origin, licence_of(args.source)))
    names = wanted(bundle)
    extra = attachments(args, report, text)
    small = [Item(HubFile(name, 0, ""), args.bundle / name) for name in names]
    places = [str(p.resolve()) for p in (args.bundle, args.source, Path.cwd()) if p]
    check_secrets([*small, *extra], bundle, [p for p in places if len(p) > 4])
    items = hashed(args.bundle, names, bundle.files, report["hashes"]) + extra
    return items, text, sorted(set(bundle.files) - {item.name for item in items})


def show_deletions(args: argparse.Namespace, items: list[Item]) -> None:
    """Print which shards of the repository would be deleted, or why that is not known."""
    try:
        remote = list_all(args.to, 0)
    except UserError as stop:
        print_escaped(
            f"would be deleted: unknown, or nothing when {args.to} is new "
            f"({escape_line(stop, LINE)})"
        )
        return
    for name in stale_shards({item.name for item in items}, remote):
        print_escaped(f"would be deleted: {escape_line(name)}")


def publish(args: argparse.Namespace) -> int:
    """Prepare, show or upload."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", args.to):
        raise UserError("TO", short_repr(args.to), "user/name", "make publish TO=user/name")
    if not args.dry_run:
        check_login(args.to)
    items, text, left = prepare(args)
    total = format_bytes(sum(item.file.size for item in items))
    if args.dry_run:
        print_escaped(text)
        for item in items:
            said = f"{item.file.size:,} bytes  {escape_line(item.file.sha256)}"
            print_escaped(f"would go up: {escape_line(item.name)}  {said}")
    for name in left:
        print_escaped(f"stays here: {escape_line(name)}")
    if args.dry_run:
        show_deletions(args, items)
        print(f"{len(items)} files, {total}; nothing was uploaded")
        return 0
    print(f"{args.to}: {len(items)} files, {total}")
    commit = upload(args.to, items, args.private, args.patience)
    print(f"{args.to}: published at {commit}, every hash as verified")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "SOURCE", help="for its origin and licence")
    add_setting(parser, "TO", required=True, help="user/name on the hub")
    parser.add_argument("--report", type=parse_path, required=True, help="verify's --json")
    parser.add_argument("--page", type=parse_path, help="the report as a page, if there is one")
    add_setting(parser, "PRIVATE", help="make a new repository private")
    add_setting(parser, "DRY_RUN", help="show card and files, upload nothing")
    parser.add_argument(
        "--patience", type=parse_seconds, default=PATIENCE, metavar="SECONDS",
        help="how long to try again while nothing moves (default %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    repository.quiet(bars=True)
    return publish(args)


if __name__ == "__main__":
    raise SystemExit(run(main))
