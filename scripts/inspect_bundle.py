"""Judge a published bundle before its 180 GB are downloaded.

config.json, the index and every shard's header are read by ranged requests (some 30 MB in all), and
verify's level 1 runs on them: files, index, tensors, labels, stop tokens, and the signatures of the
known faults. Prints the faults, which runtimes will load the bundle, and whether `make repair`
could repair it. No tensor data is read; verify does that after the download. With --against, the
bundle is also compared with the source's tensors, name by name (another 20 MB). For several bundles
a table follows: size, layout, bits, runtimes, memory, faults.

Gated and private repositories are read with the user's own login. Exit 0: no fault; 1: faults.

    .venv/bin/python scripts/inspect_bundle.py --repo "user/bundle …" [--against REPO]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dsv4.errors import UserError, renamed_path, run
from dsv4.hub import repository
from dsv4.hub.remote_headers import Skeleton, fetch_skeleton
from dsv4.model.source import open_headers
from dsv4.model.source_format import release_name
from dsv4.settings import add_setting, parse_seconds
from dsv4.storage.atomic import format_bytes
from dsv4.text import LINE, escape_line, join_some, print_escaped
from dsv4.verification.checks import check_all, conversation
from dsv4.verification.checks.runtimes import runtime_verdicts
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.report.summary import failed_row, summary_row, summary_table
from dsv4.verification.scan import Scan, scan

PATIENCE = 30  # seconds without an answer, after which it gives up
SHOWN = 2  # places of each fault


@dataclass(frozen=True)
class InspectOptions:
    """The options of the command line.

    repos: names on the hub; against: the source's, or ""; patience: seconds without an answer.
    """

    repos: list[str]
    revision: str
    against: str
    patience: float


def repair_advice(findings: Findings) -> str:
    """Return whether `make repair` could repair the faults, and whether it needs the source."""
    beyond = [f for f in findings.errors if not f.repair.startswith("make repair")]
    if beyond:
        by_hand = "; ".join(f"{f.name} ({f.repair})" for f in beyond)
        return f"not repairable by make repair: {by_hand}"
    needs_source = any("SOURCE=" in finding.repair for finding in findings.errors)
    return "once downloaded, repair it by: make repair" + (
        " SOURCE=… (it needs the FP4 source)" if needs_source else " (without the source)"
    )


# ---------------------------------------------------------------------------------- output


def print_result(skeleton: Skeleton, checks: list[Check], findings: Findings) -> None:
    """Print the repository, the checks and the findings."""
    print_escaped(
        f"{escape_line(skeleton.repo)} at {escape_line(skeleton.commit[:12])}: "
        f"{len(skeleton.files)} files, {format_bytes(skeleton.nbytes)}; "
        f"{format_bytes(skeleton.read)} of it read"
    )
    for check in checks:
        print_escaped(check.text())
    print_escaped(findings.text(SHOWN))


def print_runtimes(verdicts: dict[str, str]) -> None:
    print("will it load, by the known requirements of each runtime:")
    for name, fault in verdicts.items():
        print_escaped(f"  {'no ' if fault else 'yes'} {name}{': ' + fault if fault else ''}")


def print_conversation(bundle: Scan) -> None:
    print("which features of a conversation reach the model:")
    for name, features in conversation.features_by_runtime(bundle).items():
        print_escaped(f"  {name}: {features}")


def inspect(options: InspectOptions, repo: str, work: Path) -> tuple[tuple[str, ...], str, str]:
    """Check one bundle and print it; return its row, its faults' names, and the advice."""
    findings = Findings()
    skeleton = fetch_skeleton(repo, options.revision, work / "bundle", options.patience)
    bundle = scan(work / "bundle", findings)
    source = None
    if bundle and options.against:
        folder = work.parent / "source"
        if not folder.exists():
            fetch_skeleton(options.against, "main", folder, options.patience)
        with renamed_path(folder, f"hub: {options.against}"):
            source = open_headers(folder)
    checks = check_all.check_headers(bundle, source, findings) if bundle else []
    check_all.require_nonempty(checks, findings)
    print_result(skeleton, checks, findings)
    print_runtimes(runtime_verdicts(bundle, findings))
    if bundle:
        print_escaped(f"release: {release_name(bundle.config, bundle.tensors)}")
        print_conversation(bundle)
    row = summary_row(repo, skeleton.nbytes, bundle, findings)
    names = ", ".join(finding.name for finding in findings.errors)
    return row, names, repair_advice(findings) if names else ""


def inspect_all(options: InspectOptions, work: Path) -> None:
    """Inspect each repository; print a table of several. Raises UserError for faults."""
    repos, rows, wrong = options.repos, [], []
    for number, repo in enumerate(repos):
        try:
            row, names, advice = inspect(options, repo, work / f"{number}")
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "REPO", required=True, help="user/bundle on the hub, or several")
    add_setting(parser, "REVISION", default="main", help="commit hash, tag or branch")
    add_setting(parser, "AGAINST", default="", metavar="REPO", help="its FP4/FP8 source")
    parser.add_argument(
        "--patience", type=parse_seconds, default=PATIENCE, metavar="SECONDS",
        help="how long to retry without an answer (default %(default)s)",
    )  # fmt: skip
    args = parser.parse_args()
    if not args.repo.split():
        parser.error("--repo: none named")
    sys.stdout.reconfigure(line_buffering=True)
    repository.quiet()
    options = InspectOptions(args.repo.split(), args.revision, args.against, args.patience)
    with tempfile.TemporaryDirectory(prefix="inspect-") as work:
        inspect_all(options, Path(work))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
