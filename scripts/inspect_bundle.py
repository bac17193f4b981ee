"""Judge a published bundle before its 180 GB are downloaded.

config.json, the index and every shard's header are read by ranged requests (some 30 MB in all), and
verify's level 1 runs on them: files, index, tensors, labels, stop tokens, and the signatures of the
known faults. Says what is wrong, which runtimes will load it, and whether `make repair` could mend
it. No number is read: that is what verify does after the download. With --against, the bundle is
also compared with the source's tensors, name by name (another 20 MB). Of several bundles, whoever
made them, a table ends it: size, layout, bits, runtimes, memory, faults.

Gated and private repositories are read with the user's own login. Exit 0: nothing wrong; 1: faults.

    .venv/bin/python scripts/inspect_bundle.py --repo "user/bundle …" [--against REPO]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from dsv4.errors import UserError, renamed_path, run
from dsv4.hub import repository
from dsv4.hub.remote_headers import Skeleton, fetch_skeleton
from dsv4.model.source import open_source
from dsv4.settings import add_setting, parse_seconds
from dsv4.storage.atomic import format_bytes
from dsv4.text import LINE, escape_line, join_some, print_escaped
from dsv4.verification.checks import check_all, conversation
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.report.summary import Row, failed_row, markdown_table, summary_row
from dsv4.verification.scan import Scan, scan

PATIENCE = 30  # seconds without an answer, after which it gives up
SHOWN = 2  # places of each fault

# ------------------------------------------------------------------------------- judgement


def mending(findings: Findings) -> str:
    """Whether `make repair` could mend what was found, and what it needs for that, in words."""
    beyond = [f for f in findings.errors if not f.repair.startswith("make repair")]
    if beyond:
        by_hand = "; ".join(f"{f.name} ({f.repair})" for f in beyond)
        return f"not mendable by make repair: {by_hand}"
    needs_source = any("SOURCE=" in finding.repair for finding in findings.errors)
    return "once downloaded, mended by: make repair" + (
        " SOURCE=… (it needs the FP4 source)" if needs_source else " (without the source)"
    )


# ---------------------------------------------------------------------------------- output


def show(skeleton: Skeleton, checks: list[Check], findings: Findings) -> None:
    """What was looked at, and what was found."""
    print_escaped(
        f"{escape_line(skeleton.repo)} at {escape_line(skeleton.commit[:12])}: "
        f"{len(skeleton.files)} files, {format_bytes(skeleton.nbytes)}; "
        f"{format_bytes(skeleton.read)} of it read"
    )
    for check in checks:
        print_escaped(f"{check.number:>9,} {check.what}{'; ' + check.note if check.note else ''}")
    for finding in findings:
        print(f"{finding.fault.severity}: {finding.name}, {finding.count:,}×: {finding.fault.why}")
        for place in finding.places[:SHOWN]:
            print_escaped(
                f"    {place['where']}: found {place['found']}, expected {place['expected']}"
            )
        print(f"    repair: {finding.repair}")


def show_runtimes(loads: dict[str, str]) -> None:
    print("will it load, by what is known of each runtime:")
    for name, fault in loads.items():
        print_escaped(f"  {'no ' if fault else 'yes'} {name}{': ' + fault if fault else ''}")


def show_conversation(bundle: Scan) -> None:
    print("what of a conversation reaches the model:")
    for name, kept in conversation.per_runtime(bundle).items():
        print_escaped(f"  {name}: {kept}")


def inspect(args: argparse.Namespace, repo: str, work: Path) -> tuple[Row, str, str]:
    """Read, judge, print; returns its row, the names of its faults and what mends them."""
    findings = Findings()
    skeleton = fetch_skeleton(repo, args.revision, work / "bundle", args.patience)
    bundle = scan(work / "bundle", findings)
    source = None
    if bundle and args.against:
        if not (work.parent / "source").exists():
            fetch_skeleton(args.against, "main", work.parent / "source", args.patience)
        with renamed_path(work.parent / "source", f"hub: {args.against}"):
            source = open_source(work.parent / "source")
    checks = check_all.check_headers(bundle, source, findings) if bundle else []
    check_all.require_nonempty(checks, findings)
    show(skeleton, checks, findings)
    show_runtimes(runtime_verdicts(bundle, findings))
    if bundle:
        show_conversation(bundle)
    names = ", ".join(finding.name for finding in findings.errors)
    return (
        summary_row(repo, skeleton.nbytes, bundle, findings),
        names,
        mending(findings) if names else "",
    )


def inspect_all(args: argparse.Namespace, work: Path) -> int:
    """Inspect each repository; of several, one table at the end. Raises UserError for faults."""
    repos, rows, wrong = args.repo.split(), [], []
    for number, repo in enumerate(repos):
        try:
            found, names, cure = inspect(args, repo, work / f"{number}")
        except UserError as stop:
            if len(repos) == 1:
                raise
            print(f"error: {escape_line(stop, LINE)}")
            found, names, cure = failed_row(repo, f"{stop}"), "what could not be read", ""
        rows.append(found)
        if names:
            wrong.append((repo, names, cure))
        shutil.rmtree(work / f"{number}", ignore_errors=True)
    if len(repos) > 1:
        print_escaped(markdown_table(rows))
    if len(repos) == 1 and wrong:
        raise UserError(*wrong[0][:2], "a bundle without faults", wrong[0][2])
    if wrong:
        named = join_some([repo for repo, _, _ in wrong])
        raise UserError(named, f"faults in {len(wrong)}", f"none in {len(repos)}", "see the table")
    print("no fault in headers and JSON; the numbers: download it, then make verify")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "REPO", required=True, help="user/bundle on the hub, or several")
    add_setting(parser, "REVISION", default="main", help="commit hash, tag or branch")
    add_setting(parser, "AGAINST", default="", metavar="REPO", help="its FP4/FP8 source")
    parser.add_argument(
        "--patience", type=parse_seconds, default=PATIENCE, metavar="SECONDS",
        help="how long to try again while nothing comes (default %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    if not args.repo.split():
        parser.error("--repo: none named")
    sys.stdout.reconfigure(line_buffering=True)
    repository.quiet()
    with tempfile.TemporaryDirectory(prefix="inspect-") as work:
        return inspect_all(args, Path(work))


if __name__ == "__main__":
    raise SystemExit(run(main))
