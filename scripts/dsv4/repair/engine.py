"""Repair and undo: look at the bundle, plan actions, apply them, and look again."""

from __future__ import annotations

import sys
from pathlib import Path

from dsv4.conversion.bundle_files import remove_leftovers
from dsv4.conversion.job_array import JobPart
from dsv4.errors import UserError
from dsv4.repair.context import Action, RepairContext
from dsv4.repair.document_steps import (
    plan_files,
    plan_index,
    plan_metadata,
    plan_outcomes,
)
from dsv4.repair.folder_steps import (
    config_fault,
    list_system_files,
    plan_config,
    plan_sidecar,
    plan_strangers,
)
from dsv4.repair.shard_steps import plan_shards
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import format_bytes
from dsv4.storage.backup import FOLDER, Backup
from dsv4.text import LINE, escape_line, print_escaped
from dsv4.verification import verify

# Findings about the toolchain: reported, but not the bundle's to repair.
TOOLCHAIN = {"loader-unpatched", "loader-unknown", "loader-not-checked"}
# In this order they are applied: each step may need what the ones before it write.
PLANNERS = (
    plan_strangers,
    plan_shards,
    plan_index,
    plan_files,
    plan_metadata,
    plan_sidecar,
    plan_outcomes,
)


def repair_bundle(repair: RepairContext) -> None:
    """Plan and apply actions until a look at the bundle plans none that is new.

    One round is the rule. More are needed when a file that was missing or broken hid other faults,
    as an unusable config.json does. A dry run prints the first plan and applies nothing.
    """
    list_system_files(repair.bundle)
    errors: dict[Action, str] = {}
    applied: list[Action] = []
    while actions := [a for a in make_plan(repair) if a not in applied]:
        print_plan(actions, repair.options.dry_run)
        applied += actions
        if repair.options.dry_run:
            break
        errors |= apply_plan(actions)
    repair.left += [errors[action] for action in repair.actions if action in errors]
    if not applied and not repair.left:
        print("nothing to repair")
    names = repair.backup.originals
    if names:
        print(f"originals of {len(names)} files in {repair.backup.folder}, which take "
              f"{format_bytes(repair.backup.nbytes)}: make unrepair puts them back")  # fmt: skip


def make_plan(repair: RepairContext) -> list[Action]:
    """Look at the bundle and return the actions that it needs, in order."""
    repair.look()
    repair.attempt(plan_config)
    if config_fault(repair):
        print("what else is to be done shows when config.json can be used")
    else:
        for planner in PLANNERS:
            repair.attempt(planner)
    return repair.actions


def print_plan(actions: list[Action], dry_run: bool) -> None:
    """Print one line for each action."""
    would = "would be " if dry_run else ""
    for action in actions:
        found, change = escape_line(action.found, LINE), escape_line(action.change, LINE)
        print_escaped(f"{found}; {would}{change}")


def apply_plan(actions: list[Action]) -> dict[Action, str]:
    """Apply every action; return those that failed, each with its error line."""
    errors = {}
    for action in actions:
        try:
            action.apply()
        except UserError as error:
            errors[action] = f"{error}"
    return errors


def undo_repair(bundle: Path) -> int:
    """Put every original back, and remove the files that repair created."""
    if safe_paths.file_type(bundle, FOLDER) == safe_paths.NOTHING:
        print(f"{bundle}: not repaired, nothing to undo")
        return 0
    with locks.locked(bundle):
        backup = Backup(bundle)
        remove_leftovers(bundle, [], JobPart())
        back, removed = backup.undo()
    if backup.folder.exists():
        print(f"left alone: {backup.folder}, which holds what repair did not put there")
    print(f"{bundle}: {back} files put back, {removed} that repair made removed")
    return 0


def print_remaining(repair: RepairContext) -> list[str]:
    """Run and print verify's level 1; return the names of the bundle's remaining errors."""
    args = repair.options
    options = verify.VerifyOptions(
        args.bundle,
        args.source,
        level=1,
        python=args.python,
        without_loader=args.without_loader,
        jobs=args.jobs,
    )
    done = verify.verify(options)
    print_escaped(verify.describe_checks(options, done), flush=True)
    print_escaped(done.findings.text(), file=sys.stderr, flush=True)
    names = [f.name for f in done.findings.errors if f.name not in TOOLCHAIN]
    return names if done.level_1 else names or ["nothing-checked"]
