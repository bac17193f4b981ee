"""Plan the bundle that fits a Mac: fewer bits for the routed experts, where they lose least.

Measures the error of each format in each layer on a sample of the source's experts
(dsv4/quantization/error_sampling.py). Chooses the formats with the least sum of errors within the
size (dsv4/conversion/size_planner.py). Writes the choice to a JSON file, which may be edited.
convert and requantize take it with --quantizer mixture --plan FILE: all other tensors are then
stored as with mlx. With --quantizer mixture-lossless, in both commands, they are stored as in the
source, which takes 0.2 GB more for Flash.

--fit 96GB is a Mac's memory, from which dsv4/model/mac_memory.py computes the bundle's size. --size
88GB is the bundle's size. Where the size allows, layers get a shape for which vMLX has fused
kernels, or stay exact; --any-shape takes the least error instead. An existing plan for the same
size, source and imatrix is kept, edited or not. Its context, any-shape and imatrix are the defaults
of these options. If --bundle is a mixture, its quantizer is the default.

    .venv/bin/python scripts/plan.py --source DIR --plan FILE (--fit 96GB | --size 88GB)
        [--bundle DIR] [--imatrix FILE] [--context TOKENS] [--any-shape] [--dry-run]

Reads 0.3 GB of Flash and takes minutes. Does nothing without --fit or --size. With --low-disk it
reads from the hub.
Exit status: 0 written, already there, or not asked for; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from tqdm import tqdm

from dsv4.conversion import low_disk, size_planner
from dsv4.conversion.recorded_format import read_recorded_format, resolve_quantizer
from dsv4.conversion.shard_metadata import fingerprint
from dsv4.errors import run
from dsv4.model import mac_memory, mtp
from dsv4.model.bundle_tensors import SHARD_BYTES
from dsv4.quantization import error_sampling
from dsv4.quantization.formats import add_mtp_options, parse_name, quantizer_options
from dsv4.quantization.imatrix import Importance, load_imatrix
from dsv4.quantization.mixture_plan import check_plan_exists
from dsv4.settings import add_setting, available_cores
from dsv4.storage.atomic import format_bytes, write_json
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.tensor_reader import TensorReader
from dsv4.text import print_escaped


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True)
    add_setting(parser, "BUNDLE", help="that is to have the plan, and may be a mixture already")
    add_setting(parser, "PLAN", help="the file to write")
    mac_memory.add_goal(parser)
    add_setting(parser, "QUANTIZER", type=parse_name,
                help="mixture or mixture-lossless; default: the bundle's, or mixture")  # fmt: skip
    add_setting(parser, "IMATRIX", help="importance of columns (.dat)")
    add_setting(parser, "ANY_SHAPE", help="not only what vMLX has fused")
    add_mtp_options(parser)
    add_setting(parser, "SHARD_BYTES", default=SHARD_BYTES)
    low_disk.add_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    add_setting(parser, "JOBS", default=available_cores())
    args = parser.parse_args()
    mac_memory.check_goal(args)
    if (args.fit or args.size) and not args.plan:
        parser.error("--fit and --size need --plan FILE, where the plan is written")
    if args.fit or args.size:
        recorded = read_recorded_format(args.bundle, args.quantizer) if args.bundle else None
        resolved = resolve_quantizer(quantizer_options(args), recorded, args.bundle)
        args.quantizer, args.mtp = resolved.name, resolved.mtp
    return args


def fill_in_from_plan(args: argparse.Namespace, present: dict[str, Any]) -> str:
    """Fill in options that were left out from a plan for the same size.

    Returns the digest of its imatrix, "" if another one was named or the plan is for another size.
    """
    if present.get("fit") != args.fit or not (args.fit or present.get("size") == args.size):
        return ""
    context = present.get("context")
    args.context = args.context or (context if isinstance(context, int) else None)
    args.any_shape = args.any_shape or present.get("any_shape") is True
    return "" if args.imatrix else f"{present.get('imatrix', '')}"


def plan_head(
    args: argparse.Namespace, source: Checkpoint, importance: Importance
) -> dict[str, Any]:
    """Return the head of the file: the settings, and how errors are measured."""
    unloaded = size_planner.unloaded_bytes(source, args.quantizer, args.mtp)
    return {
        "source": fingerprint(source),
        "quantizer": args.quantizer,
        "imatrix": importance.digest,
        "fit": args.fit,
        "size": mac_memory.size_goal(args, source.config, unloaded),
        "context": args.context,
        "any_shape": args.any_shape,
        "mtp": args.mtp,
        "sample": {"experts": error_sampling.EXPERTS, "weights": error_sampling.WEIGHTS},
    }


def main() -> int:
    """Write a plan, unless it exists or none was asked for. Returns 0."""
    args = parse_arguments()
    if not (args.fit or args.size):
        if args.plan:
            check_plan_exists(args.plan)
        print_escaped(f"no size was asked for (FIT, SIZE); {args.plan or 'no plan'} stays as it is")
        return 0
    where = (args.source, args.low_disk, args.repo, args.patience, args.workers)
    with (
        low_disk.open_checkpoints(*where) as (_, source, supply),
        contextlib.closing(TensorReader()) as reader,
    ):
        importance = load_imatrix(args.imatrix, source)
        source = mtp.without_dropped(source, args.mtp)
        present = read_json(args.plan) if args.plan.is_file() else {}
        present.setdefault("mtp", mtp.AS_EXPERTS)  # an older version's
        digest = fill_in_from_plan(args, present)
        args.context = args.context or mac_memory.CONTEXT
        head = plan_head(args, source, importance)
        if {**head, "imatrix": digest or importance.digest}.items() <= present.items():
            print_escaped(
                f"{args.plan}: there already, for {format_bytes(head['size'])}; "
                "delete it to plan afresh"
            )
            return 0
        stacks = error_sampling.sampled_tensors(source, args.mtp)
        with tqdm(total=len(stacks), unit="stack", desc="plan", disable=None) as bar:
            read = supply.read if supply else reader.read
            errors = error_sampling.sample_errors(
                source, read, importance, args.jobs, stacks, bar.update
            )
    planner = size_planner.SizePlanner(source, errors, args.shard_bytes, args.quantizer, args.mtp)
    fit = planner.fit(head["size"], args.any_shape)
    print_escaped(size_planner.describe_fit(fit))
    loaded = fit.nbytes - size_planner.unloaded_bytes(source, args.quantizer, args.mtp)
    print_escaped(mac_memory.describe_fit(source.config, loaded, args.context, args.fit or 0))
    if not args.dry_run:
        args.plan.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.plan, size_planner.plan_document(fit, errors, head))
        chosen = f"QUANTIZER={args.quantizer} PLAN={args.plan}"
        print_escaped(f"{args.plan}: written; {format_bytes(fit.nbytes)} with {chosen}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
