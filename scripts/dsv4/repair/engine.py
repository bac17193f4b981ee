"""The engine of repair: its steps in order, the judgement at the end, and the undo."""

from __future__ import annotations

from pathlib import Path

from dsv4.conversion.job_array import JobPart
from dsv4.conversion.requantize import remove_leftovers
from dsv4.repair.context import RepairContext
from dsv4.repair.document_steps import mend_files, mend_index, mend_metadata
from dsv4.repair.folder_steps import (
    config_fault,
    list_system_files,
    mend_config,
    mend_sidecar,
    mend_strangers,
)
from dsv4.repair.shard_steps import mend_shards
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import format_bytes
from dsv4.storage.backup import FOLDER, Backup
from dsv4.text import print_escaped
from dsv4.verification import verify

# Of the toolchain, not of the bundle: named, but nothing that is left to repair.
TOOLCHAIN = {"loader-unpatched", "loader-unknown", "loader-not-checked"}


def repair_bundle(repair: RepairContext) -> None:
    """All steps, in the order in which one needs the other."""
    list_system_files(repair.bundle)
    repair.attempt(mend_config)
    if config_fault(repair):
        print("what else is to be done shows when config.json can be used")
    else:
        first = (mend_strangers, mend_shards, mend_index)
        for step in (*first, mend_files, mend_metadata, mend_sidecar):
            repair.attempt(step)
    if not repair.steps and not repair.left:
        print("nothing to repair")
    names = repair.backup.originals
    if names:
        print(f"originals of {len(names)} files in {repair.backup.folder}, which take "
              f"{format_bytes(repair.backup.nbytes)}: make unrepair puts them back")  # fmt: skip


def undo_repair(bundle: Path) -> int:
    """Put every original back."""
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
    """verify's level 1 on the result, printed; the names of what is still wrong with the bundle."""
    args = repair.args
    options = verify.VerifyOptions(
        args.bundle,
        args.source,
        level=1,
        python=args.python,
        without_loader=args.without_loader,
        jobs=args.jobs,
    )
    done = verify.verify(options)
    print_escaped(verify.describe_checks(options, done))
    verify.print_findings(done.findings)
    names = [f.name for f in done.findings.errors if f.name not in TOOLCHAIN]
    return names if done.first else names or ["nothing-checked"]
