"""One run of repair: what it knows, and what its steps share."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.conversion import bundle_files
from dsv4.errors import UserError
from dsv4.repair.shards_on_disk import open_by_shards
from dsv4.storage import safe_paths
from dsv4.storage.backup import Backup
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.text import LINE, escape_line, print_escaped
from dsv4.verification.checks import check_all
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

NEEDS_SOURCE = "name the FP4/FP8 source: make repair SOURCE=…"


@dataclass
class RepairContext:
    """One run: the arguments, the source, the originals, and what could not be mended.

    experts: the labels of the experts that the shards step leaves, by storage name, when they are
    known beforehand.
    """

    args: argparse.Namespace
    source: Checkpoint | None
    backup: Backup
    left: list[str] = field(default_factory=list)
    experts: dict[str, dict[str, Any]] | None = None
    steps: int = 0

    @property
    def bundle(self) -> Path:
        return self.args.bundle

    def report(self, found: str, done: str) -> bool:
        """Report one step; True when it is to be taken, False in a dry run."""
        self.steps += 1
        would = "would be " if self.args.dry_run else ""
        print_escaped(f"{escape_line(found, LINE)}; {would}{escape_line(done, LINE)}")
        return not self.args.dry_run

    def attempt(self, step: Callable[..., None], *arguments: object) -> None:
        """Take a step; what stops it is left, and the next steps are taken all the same."""
        try:
            step(self, *arguments)
        except UserError as stop:
            self.left.append(f"{stop}")


def level1_findings(repair: RepairContext) -> Findings:
    """What level 1 finds in the bundle as it lies there now, without the toolchain."""
    findings = Findings()
    bundle = scan(repair.bundle, findings)
    if bundle is not None:
        check_all.check_headers(bundle, repair.source, findings)
    return findings


def write_index(repair: RepairContext) -> None:
    """The index of what the shards hold now; one that is no JSON object is written anew."""
    set_aside(repair, [INDEX])
    shards = open_by_shards(repair.bundle).shards
    bundle_files.write_index(repair.bundle, {f: s.tensors.values() for f, s in shards.items()})


def set_aside(repair: RepairContext, names: list[str]) -> None:
    """Remove those of the files that are no JSON object, after their originals are kept."""
    for name in filter(functools.partial(is_broken, repair.bundle), names):
        repair.backup.keep([name])
        safe_paths.remove(repair.bundle, name)


def is_broken(folder: Path, name: str) -> bool:
    """True for a JSON document that is there and no JSON object."""
    try:
        if (folder / name).is_file():
            read_json(folder / name)
    except UserError:
        return True
    return False
