"""Repair a damaged bundle, or one of another maker. Correct parts stay unchanged.

Runs verify's level 1, plans a list of actions from its findings, prints it, applies it, and runs
level 1 again; --dry-run stops after the list.

| step     | what it repairs                                                        | needs      |
|----------|------------------------------------------------------------------------|------------|
| config   | a config.json that is missing or broken                                | the source |
| others   | shards that the index does not list are moved to the originals         |            |
| shards   | routed experts that headers prove wrong, controls not in F32, the head | the source |
| index    | entries that are missing, wrong or too many; an index that is gone, or |            |
|          | another checkpoint's                                                   |            |
| files    | tokenizer and encoding files that are missing or no JSON               | the source |
| metadata | labels, stop tokens, chat template, jang_config.json's group size,     |            |
|          | limits of answers, another sampling than generation_config.json's      |            |

It uses the code of requantize, finalize and patch. Correct experts stay, whatever tool made them.
Wrong ones are made by --quantizer, or by the quantizer in the bundle's record. Faults that cannot
be repaired are printed, and the others are repaired. BUNDLE/.before-repair keeps the originals as
hard links, so only rewritten shards cost disk. --undo restores every byte. Delete that folder to
keep the repair. Half-written files of killed runs are removed for good.

A killed run can be repeated: the same command continues.

    .venv/bin/python scripts/repair.py --bundle DIR [--source DIR] [--quantizer NAME] [--dry-run]
    .venv/bin/python scripts/repair.py --bundle DIR --undo

Exit 0: level 1 finds no error; 1: faults are left, which are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys

from dsv4.conversion.bundle_files import remove_leftovers
from dsv4.conversion.job_array import JobPart
from dsv4.errors import UserError, run
from dsv4.model.folder_roles import bundle_path, check_bundle_path
from dsv4.model.source import open_source
from dsv4.quantization.formats import add_quantizer_options
from dsv4.repair.context import RepairContext, RepairOptions
from dsv4.repair.engine import print_remaining, repair_bundle, undo_repair
from dsv4.repair.shards_on_disk import shard_files
from dsv4.settings import add_setting, available_cores
from dsv4.storage import locks
from dsv4.storage.backup import Backup
from dsv4.text import print_escaped
from dsv4.toolchain.python_env import default_python


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "SOURCE", if_there=True, help="FP4/FP8 source of the bundle")
    add_setting(parser, "REFERENCE", help="bundle to copy tokenizer and encoding files from")
    add_quantizer_options(parser)
    add_setting(parser, "DRY_RUN", help="print the plan and change nothing")
    parser.add_argument("--undo", action="store_true", help="put every original back")
    add_setting(
        parser, "TOOLCHAIN_PYTHON", option="--python", default=default_python(), help="toolchain"
    )
    parser.add_argument("--without-loader", action="store_true", help="do not check the loaders")
    add_setting(parser, "JOBS", default=available_cores())
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    check_bundle_path(args.bundle)
    if args.undo:
        return undo_repair(args.bundle)
    bundle_path(args.bundle, args.source)
    files = shard_files(args.bundle)
    source = open_source(args.source) if args.source else None
    names = (field.name for field in dataclasses.fields(RepairOptions))
    options = RepairOptions(**{name: getattr(args, name) for name in names})
    repair = RepairContext(options, source, Backup(args.bundle))
    lock = locks.locked(args.bundle)
    with contextlib.nullcontext() if args.dry_run else lock:
        if not args.dry_run:
            remove_leftovers(args.bundle, files, JobPart())
        repair_bundle(repair)
    for line in repair.left:
        print_escaped(f"left: {line}", file=sys.stderr)
    wrong = [] if args.dry_run else print_remaining(repair)
    if wrong or repair.left:
        raise UserError(f"{args.bundle}", ", ".join(wrong) or f"{len(repair.left)} not repaired",
                   "a bundle that level 1 passes", "see above")  # fmt: skip
    if not args.dry_run:
        print("level 1 holds; every number: scripts/verify.py --bundle DIR --source DIR")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
