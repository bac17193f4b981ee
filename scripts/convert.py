"""Convert the FP4/FP8 source into a bundle: read it once, write the finished bundle once.

--converter native does all of it here. Routed experts go through requantize's engine; every other
matrix is decoded and goes through `mx.quantize` (8 bits, group 32, on the CPU); norms, router and
tables become F16 or stay integers, controls stay F32. Which tensor gets which treatment stands in
one table, dsv4/model/names.py; a name that it does not have stops the run. For all but experts and
controls the bytes are those of upstream's converter; requantize finds nothing left to do.

--converter jang runs upstream's (dsv4/toolchain/upstream_converter.py): hours, and experts that
requantize must mend.

Both work in a hidden sibling of the bundle, locked, that takes the bundle's name when it is whole.
The native one writes each shard under a temporary name, makes it durable and renames it, so it can
be killed at any moment: the same command goes on, with the same bytes in the end. An existing
bundle is never written over: one that holds all of this source counts as done.

--part K/N makes the K-th of N disjoint sets of shards, for a job array: N processes, here or on
machines that share the folders; any of them can be killed and run again. A last run without --part
makes what is missing, completes index and config, and gives the bundle its name.

With --low-disk the source's shards are fetched from --repo when they are needed, and deleted when
all that needs them is durable and compared (dsv4/conversion/low_disk.py).

    .venv/bin/python scripts/convert.py --source DIR --bundle DIR [--dry-run] [--jobs N]
        [--part K/N]

Costs about the time of copying the source. Exit status: 0 done, or already done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from dsv4.conversion import lossless, low_disk
from dsv4.conversion.conversion_plan import describe_plan
from dsv4.conversion.convert import (
    check_complete,
    convert,
    is_done,
    max_fetched_bytes,
    plan_from_source,
)
from dsv4.conversion.job_array import JobPart, parse_part
from dsv4.conversion.low_disk import ShardFetcher
from dsv4.conversion.recorded_format import (
    quantizer_for,
    read_recorded_format,
    resolve_quantizer,
)
from dsv4.conversion.staging import mark, move_into_place, staging, unmark
from dsv4.errors import UserError, run
from dsv4.model.bundle_tensors import SHARD_BYTES
from dsv4.model.folder_roles import bundle_path
from dsv4.model.fp8_blocks import read_block
from dsv4.model.load import open_bundle
from dsv4.model.source import source_notes
from dsv4.quantization import weight_samples
from dsv4.quantization.formats import (
    Quantizer,
    QuantizerOptions,
    add_quantizer_options,
    quantizer_options,
)
from dsv4.settings import add_setting, available_cores
from dsv4.storage.checkpoint import Checkpoint, check_strangers
from dsv4.storage.disk_space import staging_folder
from dsv4.storage.tensor_reader import TensorReader
from dsv4.text import escape_line, print_escaped
from dsv4.toolchain import upstream_converter
from dsv4.toolchain.python_env import default_python

UPSTREAMS_BLOCK = (128, 128)  # of jang_tools.dsv4.fp8_ue8m0_codec, 2.5.9


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True, help="the FP4/FP8 checkpoint")
    add_setting(parser, "BUNDLE", required=True, help="the folder to make")
    add_setting(parser, "CONVERTER", choices=("native", "jang"), default="native")
    add_setting(parser, "TOOLCHAIN_PYTHON", option="--python", default=default_python(),
                help="jang: the toolchain")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    add_setting(parser, "JOBS", default=available_cores(), help="threads (all cores)")
    add_setting(parser, "SHARD_BYTES", default=SHARD_BYTES, help="the largest shard (5e9)")
    parser.add_argument(
        "--part", type=parse_part, default=JobPart(), help="K/N: a share of the shards"
    )
    add_quantizer_options(parser)
    low_disk.add_options(parser)
    args = parser.parse_args()
    if not args.part.whole and (args.low_disk or args.converter == "jang"):
        parser.error("--part: not with --low-disk or --converter jang")
    return args


def run_upstream(args: argparse.Namespace, source: Checkpoint) -> str:
    """Upstream's converter; return what to say."""
    if args.dry_run or args.low_disk:
        raise UserError(
            "--converter jang", "--dry-run or --low-disk", "neither", "use native for them"
        )
    check_strangers(source, "move it away: upstream's converter reads every shard that it finds")
    if (block := read_block(source.config, source.folder)) != UPSTREAMS_BLOCK:
        raise UserError("--converter jang", f"FP8 in blocks of {list(block)}",
                   f"{list(UPSTREAMS_BLOCK)}, which alone it reads", "use native")  # fmt: skip
    with staging(args.bundle) as folder:
        upstream_converter.clear_folder(folder)
        mark(folder)
        upstream_converter.convert_into(folder, source.folder, args.python)
        check_complete(open_bundle(folder), source)
        move_into_place(folder, args.bundle)
    return f"converted, {len(source.tensors):,} source tensors"


def run_native(args: argparse.Namespace, options: QuantizerOptions, source: Checkpoint,
               headers: Checkpoint, supply: ShardFetcher | None) -> str:  # fmt: skip
    """The native converter, or its plan; return what to say."""
    quantizer, _ = quantizer_for(options, headers, None)
    if supply is None:
        with contextlib.closing(TensorReader()) as reader:
            weight_samples.check_weights(source, reader.read)
    if quantizer.form.as_source:
        quantizer = survey(quantizer, args, source, headers, supply)
        print_escaped(lossless.message(quantizer, headers))
    folder = staging_folder(args.bundle)
    plan = plan_from_source(source, headers, quantizer, args.shard_bytes, folder, args.part)
    if args.dry_run:
        fetched = max_fetched_bytes(plan.todo, supply) if supply else None
        return "would be made\n" + describe_plan(plan, args.jobs, fetched)
    said = convert(plan, headers, args.bundle, args.jobs, args.part, supply)
    return said if args.part.whole else f"{said}\n{args.part.message}"


def survey(quantizer: Quantizer, args: argparse.Namespace, source: Checkpoint, headers: Checkpoint,
           supply: ShardFetcher | None) -> Quantizer:  # fmt: skip
    """The quantizer, which knows the source's BF16 values now: read here, or from the hub."""
    if supply is None:
        record = staging_folder(args.bundle) / lossless.RECORD
        with contextlib.closing(TensorReader()) as reader:
            return lossless.with_measured_overflow(quantizer, source, reader.read, record, 1)
    record = low_disk.headers_folder(args.source) / lossless.RECORD
    quantizer = lossless.with_measured_overflow(
        quantizer, headers, supply.read, record, args.workers
    )
    if not args.dry_run:
        lossless.write_record(record, headers, quantizer)
    return quantizer


def main() -> int:
    """Convert, or say what would be done. Returns 0."""
    args = parse_arguments()
    args.bundle = bundle_path(args.bundle, args.source)
    recorded = read_recorded_format(args.bundle, args.quantizer)
    options = resolve_quantizer(quantizer_options(args), recorded)
    where = (args.source, args.low_disk, args.repo, args.patience, args.workers)
    with low_disk.open_checkpoints(*where) as (source, headers, supply):
        if is_done(args.bundle, source):
            said = f"holds every tensor of {args.source} already; delete it to convert afresh"
            if not args.dry_run:
                unmark(args.bundle)
            if supply and not args.dry_run:
                supply.keep_only(set())
        else:
            for note in source_notes(source):
                print_escaped(f"note: {escape_line(source.folder)}: {note}", file=sys.stderr)
            if args.converter == "jang":
                said = run_upstream(args, source)
            else:
                said = run_native(args, options, source, headers, supply)
    print_escaped(f"{escape_line(args.bundle)}: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
