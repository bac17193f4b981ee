"""The plan of one repair: its options, the last look at the bundle, and the actions that follow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv4.conversion import bundle_files
from dsv4.errors import UserError
from dsv4.repair.shards_on_disk import open_by_shards
from dsv4.storage import safe_paths
from dsv4.storage.atomic import format_bytes
from dsv4.storage.backup import Backup
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.storage.disk_space import check_free_space
from dsv4.verification.checks import check_all
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

NEEDS_SOURCE = "name the FP4/FP8 source: make repair SOURCE=…"


@dataclass
class RepairOptions:
    """The settings of one repair. `quantizer` is filled in from the bundle when it is None."""

    bundle: Path
    source: Path | None = None
    reference: Path | None = None
    quantizer: str | None = None
    plan: Path | None = None
    imatrix: Path | None = None
    python: Path | None = None
    without_loader: bool = False
    dry_run: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Action:
    """One change of the bundle: what is wrong, what is done, and the function that does it."""

    found: str
    change: str
    apply: Callable[[], object] = field(compare=False)


@dataclass
class RepairContext:
    """State of one repair. `findings`, `actions`, `left` and `experts` are of the last look.

    left: error lines of faults for which nothing can be planned.
    experts: labels of the experts as the shard actions leave them, by storage name; None when the
    shards on disk tell.
    """

    options: RepairOptions
    source: Checkpoint | None
    backup: Backup
    findings: Findings = field(default_factory=Findings)
    actions: list[Action] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    experts: dict[str, dict[str, Any]] | None = None

    @property
    def bundle(self) -> Path:
        return self.options.bundle

    def look(self) -> None:
        """Run level 1 without the toolchain, and forget the plan that was made before."""
        self.findings, self.actions, self.left, self.experts = Findings(), [], [], None
        bundle = scan(self.bundle, self.findings)
        if bundle is not None:
            check_all.check_headers(bundle, self.source, self.findings)

    def plan(self, found: str, change: str, apply: Callable[[], object]) -> None:
        """Add an action to the plan."""
        self.actions.append(Action(found, change, apply))

    def attempt(self, planner: Callable[..., None], *arguments: object) -> None:
        """Call `planner`. A UserError is added to `left`, so that the other planners still run."""
        try:
            planner(self, *arguments)
        except UserError as error:
            self.left.append(f"{error}")

    def check_space(self, names: list[str], nbytes: int) -> None:
        """Raise UserError without room for `nbytes` of new files and for copies of `names`."""
        copies = self.backup.cost(names)
        why = f", {format_bytes(copies)} of it for copies of the originals" if copies else ""
        todo = "free space on that volume, where the originals stay too"
        check_free_space(self.bundle, nbytes + copies, why, todo)


def write_index(repair: RepairContext) -> None:
    """Write the index of the shards on disk. Raises UserError when they cannot be read."""
    repair.backup.keep([INDEX])
    remove_broken(repair, [INDEX])
    shards = open_by_shards(repair.bundle).shards
    bundle_files.write_index(repair.bundle, {f: s.tensors.values() for f, s in shards.items()})


def remove_broken(repair: RepairContext, names: list[str]) -> None:
    """Remove the files that hold no JSON object, after their originals are kept."""
    for name in filter(functools.partial(is_broken, repair.bundle), names):
        repair.backup.keep([name])
        safe_paths.remove(repair.bundle, name)


def is_broken(folder: Path, name: str) -> bool:
    """Return True for a file that exists and holds no JSON object."""
    try:
        if (folder / name).is_file():
            read_json(folder / name)
    except UserError:
        return True
    return False
