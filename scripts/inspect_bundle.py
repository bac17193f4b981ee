"""Check a published bundle by its headers, before its 180 GB are downloaded.

Reads config.json, the index and every shard's header by ranged requests (some 30 MB in all), and
runs verify's level 1 on them: files, index, tensors, labels, stop tokens, and the known faults of
converters. Prints the faults, which runtimes will load the bundle, and whether `make repair` can
repair it. It reads no number: verify does, after the download. With --against, it also compares the
names of tensors with the source's (another 20 MB). For several bundles it ends with a table: size,
layout, bits, runtimes, memory, faults.

Gated and private repositories are read with the user's own login. Exit 0: no fault; 1: faults.

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
from dsv4.verification.report.summary import failed_row, summary_row, summary_table
from dsv4.verification.scan import Scan, scan

PATIENCE = 30  # seconds without an answer, after which it gives up
PLACES_SHOWN = 2  # of each fault


def repair_advice(findings: Findings) -> str:
    """Return whether `make repair` can repair the errors, and whether it needs the source."""
    other = [f for f in findings.errors if not f.repair.startswith("make repair")]
    if other:
        by_hand = "; ".join(f"{f.name} ({f.repair})" for f in other)
        return f"not repairable by make repair: {by_hand}"
    needs_source = any("SOURCE=" in finding.repair for finding in findings.errors)
    return "once downloaded, repaired by: make repair" + (
        " SOURCE=… (it needs the FP4 source)" if needs_source else " (without the source)"
    )


def print_result(skeleton: Skeleton, checks: list[Check], findings: Findings) -> None:
    """Print the repository, the checks and the findings."""
    print_escaped(
        f"{escape_line(skeleton.repo)} at {escape_line(skeleton.commit[:12])}: "
        f"{len(skeleton.files)} files, {format_bytes(skeleton.nbytes)}; "
        f"{format_bytes(skeleton.read)} of it read"
    )
    for check in checks:
        print_escaped(check.text())
    print_escaped(findings.text(PLACES_SHOWN))


def print_runtimes(verdicts: dict[str, str]) -> None:
    print("will it load, by the known requirements of each runtime:")
    for name, fault in verdicts.items():
        print_escaped(f"  {'no ' if fault else 'yes'} {name}{': ' + fault if fault else ''}")


def print_conversation(bundle: Scan) -> None:
    print("which features of a conversation reach the model:")
    for name, features in conversation.features_by_runtime(bundle).items():
        print_escaped(f"  {name}: {features}")


def inspect(args: argparse.Namespace, repo: str, work: Path) -> tuple[tuple[str, ...], str, str]:
    """Check one bundle and print the result; return its row, fault names and repair advice."""
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
    print_result(skeleton, checks, findings)
    print_runtimes(runtime_verdicts(bundle, findings))
    if bundle:
        print_conversation(bundle)
    names = ", ".join(finding.name for finding in findings.errors)
    return (
        summary_row(repo, skeleton.nbytes, bundle, findings),
        names,
        repair_advice(findings) if names else "",
    )


def inspect_all(args: argparse.Namespace, work: Path) -> int:
    """Inspect each repository; print a table if there are several. Raises UserError for faults."""
    repos, rows, wrong = args.repo.split(), [], []
    for number, repo in enumerate(repos):
        try:
            row, names, advice = inspect(args, repo, work / f"{number}")
        except UserError as stop:
            if len(repos) == 1:
                raise
            print(f"error: {escape_line(stop, LINE)}")
            row, names, advice = failed_row(repo, f"{stop}"), "what could not be read", ""
        rows.append(row)
        if names:
            wrong.append((repo, names, advice))
        shutil.rmtree(work / f"{number}", ignore_errors=True)
    if len(repos) > 1:
        print_escaped(summary_table(rows))
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
