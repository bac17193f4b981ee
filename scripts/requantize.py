"""Requantize the routed experts of a bundle from the FP4 source: the stage the project is about.

Upstream's converter copies each routed expert's FP4 bytes into the bundle and labels them affine.
This stage gives every routed expert, main layers and MTP, the bytes that `mx.quantize` gives for
the decoded source; restores the F32 control tensors that the converter rounded to F16; and rebuilds
the index and the labels in config.json. Everything else is copied byte for byte. With --mtp source
MTP keeps the source's numbers, and --drop-mtp leaves it out.

It is a conversion whose unchanged tensors are copied from the bundle. Each new shard is written
under a temporary name, flushed to disk and renamed to the old one's name. So a run may be killed at
any time: the same command continues. The metadata of each shard names the source and the quantizer
that made it, and so tells which shards are done.

A bundle keeps its recorded format unless --quantizer, --imatrix or --plan asks for another, which a
line on stderr then announces. A bundle of another maker is accepted when its experts are FP4 bytes
under an affine label, or when a quantizer is named. With --ours (`make all`) only a bundle of
--converter jang is.

    .venv/bin/python scripts/requantize.py --source DIR --bundle DIR [--dry-run] [--jobs N]
        [--part K/N]

Costs about the time of copying the bundle. --part K/N makes the K-th of N disjoint sets of shards,
for a job array. A last run without --part then completes index and config.
Exit status: 0 done, or already done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from dsv4.conversion import lossless
from dsv4.conversion.bundle_files import remove_leftovers
from dsv4.conversion.conversion_plan import describe_plan
from dsv4.conversion.expert_pieces import ErrorLog
from dsv4.conversion.job_array import JobPart, parse_part
from dsv4.conversion.progress import summary_line
from dsv4.conversion.recorded_format import (
    check_ours,
    describe_change,
    quantizer_for,
    read_recorded_format,
    resolve_quantizer,
)
from dsv4.conversion.requantize import (
    complete,
    count_experts,
    plan_from_bundle,
    replace_shards,
)
from dsv4.conversion.shard_metadata import made_by
from dsv4.errors import run
from dsv4.model import mtp
from dsv4.model.folder_roles import bundle_path
from dsv4.model.load import open_bundle, read_config
from dsv4.model.source import open_source
from dsv4.quantization.formats import add_mtp_options, add_quantizer_options, quantizer_options
from dsv4.settings import add_setting, available_cores
from dsv4.storage import locks, safe_paths
from dsv4.storage.checkpoint import read_index
from dsv4.storage.tensor_reader import TensorReader
from dsv4.text import print_escaped


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True, help="the FP4/FP8 checkpoint")
    add_setting(parser, "BUNDLE", required=True, help="the converted bundle")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    add_setting(parser, "JOBS", default=available_cores(), help="threads (all cores)")
    parser.add_argument(
        "--part", type=parse_part, default=JobPart(), help="K/N: a share of the work"
    )
    add_quantizer_options(parser)
    add_mtp_options(parser)
    add_setting(parser, "CONVERTER", choices=("native", "jang"), default="native")
    parser.add_argument("--ours", action="store_true", help="stop at another maker's bundle")
    return parser.parse_args()


def main() -> int:
    """Plan, and unless it is a dry run, write. Returns 0."""
    arguments = parse_arguments()
    start = time.perf_counter()
    folder, part = arguments.bundle, arguments.part
    bundle_path(folder, arguments.source)
    recorded = read_recorded_format(folder, arguments.quantizer)
    check_ours(folder, recorded, arguments.quantizer, arguments.converter, arguments.ours)
    options = resolve_quantizer(quantizer_options(arguments), recorded, folder)
    source = mtp.without_dropped(open_source(arguments.source), options.mtp)
    quantizer, error = quantizer_for(options, source, recorded)
    record = folder / lossless.RECORD
    read_config(folder)
    if quantizer.form.as_source:
        with contextlib.closing(TensorReader()) as reader:
            quantizer = lossless.with_measured_overflow(quantizer, source, reader.read, record, 1)
        print(lossless.message(quantizer, source))
    files = sorted(set(read_index(folder).values()))
    lock = locks.locked(folder, part.lock_key(f"{made_by(source, quantizer)}"))
    with contextlib.nullcontext() if arguments.dry_run else lock:
        if not arguments.dry_run:
            remove_leftovers(folder, files, part)
        bundle = open_bundle(folder)
        # A killed run may leave shards of another maker that have the same header.
        trusted = options.keep and recorded.complete
        plan = plan_from_bundle(source, bundle, quantizer, part, trust_unmarked=trusted)
        number = count_experts(plan)
        if error and number:
            raise error
        if line := describe_change(folder, options, recorded, quantizer, number):
            print_escaped(line, file=sys.stderr)
        if arguments.dry_run:
            print_escaped(describe_plan(plan, arguments.jobs))
            return 0
        if plan.todo and part.whole:  # several parts would write it at the same time
            lossless.write_record(record, source, quantizer)
        errors = replace_shards(plan, arguments.jobs) if plan.todo else ErrorLog()
        changed = complete(plan) if part.whole else False
        if part.whole:
            safe_paths.remove(folder, lossless.RECORD)
    if plan.todo:
        counts = f"{len(errors.stats):,} tensors, {len(plan.todo):,} shards"
        print_escaped(summary_line(counts, plan.written, errors, time.perf_counter() - start))
    elif changed:
        print("every shard was requantized already; index and config completed")
    else:
        print(f"already requantized: {len(plan.shards):,} shards, nothing to do")
    if not part.whole:
        print(part.message)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
