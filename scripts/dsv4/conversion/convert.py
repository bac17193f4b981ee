"""Plan and run a conversion: read the source once, write the finished bundle once.

The bundle is made in a locked staging folder beside it, which is renamed when it is complete. Each
shard is written under a temporary name, flushed and renamed. So a run may be killed at any time:
the same command continues and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from dsv4.conversion import lossless, low_disk, requantize, staging
from dsv4.conversion.bundle_files import remove_leftovers
from dsv4.conversion.conversion_plan import (
    ConversionPlan,
    new_shard,
    progress_bar,
    without_finished,
    write_plan,
)
from dsv4.conversion.expert_pieces import ErrorLog
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.low_disk import ShardFetcher
from dsv4.conversion.progress import summary_line
from dsv4.conversion.shard_metadata import converted_by
from dsv4.errors import UserError
from dsv4.hub.provenance import source_name
from dsv4.model import configs
from dsv4.model.bundle_tensors import PlannedShard, missing_weights, plan_shards, weights_of
from dsv4.model.load import open_bundle
from dsv4.quantization.formats import Quantizer
from dsv4.quantization.weight_samples import WeightSamples
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import write_json
from dsv4.storage.checkpoint import INDEX, Checkpoint, check_index
from dsv4.storage.disk_space import MARK, check_free_space
from dsv4.storage.shard_writer import write_shards
from dsv4.storage.tensor_reader import TensorReader
from dsv4.toolchain import upstream_converter

ELSEWHERE = "free space on that volume, or choose another BUNDLE"


def plan_from_source(
    source: Checkpoint,
    headers: Checkpoint,
    quantizer: Quantizer,
    shard_bytes: int,
    folder: Path,
    part: JobPart,
) -> ConversionPlan:
    """Plan the shards of a new bundle of `source` in the staging folder `folder`.

    headers: the source, or with --low-disk a checkpoint that has headers and samples only. Raises
    UserError for an unknown tensor.
    """
    metadata = converted_by(headers, quantizer)
    shards = plan_shards(source.tensors, quantizer.form, metadata, shard_bytes)
    return without_finished(ConversionPlan(source, quantizer, folder, shards, []), part)


# --- The staging folder -------------------------------------------------------------------------


def is_done(folder: Path, source: Checkpoint) -> bool:
    """Return True when `folder` holds this source converted, False when it is absent or empty.

    Raises UserError when it holds anything else: nothing is overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder}",
            "a folder with other files",
            "no folder, or a bundle of this source",
            "choose another BUNDLE, or move it away",
        )
    bundle = open_bundle(folder)
    if missing_weights(weights_of(source.tensors), bundle.tensors):
        check_complete(bundle, source)
    return True


def check_complete(bundle: Checkpoint, source: Checkpoint) -> None:
    """Raise UserError unless the bundle has a tensor for every tensor of the source."""
    check_index(bundle, "convert")
    wanted = weights_of(source.tensors)
    missing = missing_weights(wanted, bundle.tensors)
    if missing:
        raise UserError(
            f"{bundle.folder}",
            f"no {missing[0]} ({len(missing):,} of {len(wanted):,} tensors missing)",
            "a tensor for every tensor of the source",
            "delete this folder and convert again",
        )


def remove_other_files(plan: ConversionPlan, part: JobPart) -> None:
    """Remove the files of the staging folder that are not finished shards of the plan.

    A part removes its own temporary files only. Raises UserError for finished shards of another
    plan (another source or other settings), which may have cost hours.
    """
    folder, planned = plan.folder, {shard.file: shard for shard in plan.shards}
    finished = set()
    for path in folder.glob("*.safetensors"):
        if path.name in planned and planned[path.name].layout.matches_file(path):
            finished.add(path.name)
        elif path.is_file() and upstream_converter.is_native(path):
            raise UserError(
                f"{path}", "a shard of another source or other settings",
                "shards of this run's plan",
                f"go on with those settings, or delete {folder}",
            )  # fmt: skip
    if part.whole:
        safe_paths.clear_folder(folder, {*finished, locks.LOCK, MARK, lossless.RECORD})
    else:
        remove_leftovers(folder, list(planned), part)


# --- Writing ------------------------------------------------------------------------------------


def convert(
    plan: ConversionPlan,
    headers: Checkpoint,
    bundle: Path,
    jobs: int,
    part: JobPart,
    fetcher: ShardFetcher | None,
) -> str:
    """Make the bundle, or a part of it, and return the summary. No incomplete bundle appears.

    headers: see `plan_from_source`.
    """
    start = time.perf_counter()
    with staging.staging(bundle, part.lock_key(plan.digest)) as folder:
        remove_other_files(plan, part)
        plan = without_finished(plan, part)  # another run may have ended since it was made
        staging.mark(folder)
        check_free_space(folder, plan.written, "", ELSEWHERE)
        if fetcher:
            check_free_space(fetcher.folder, max_fetched_bytes(plan.todo, fetcher), "", ELSEWHERE)
            errors = convert_low_disk(plan, jobs, fetcher)
        else:
            if part.whole:  # several parts would write it at the same time
                lossless.write_record(folder / lossless.RECORD, headers, plan.quantizer)
            errors = write_plan(plan, jobs, "convert")
        if part.whole:
            complete(plan, headers)
            safe_paths.remove(folder, lossless.RECORD)
            staging.move_into_place(folder, bundle)
    tensors = sum(unit.number for shard in plan.todo for unit in shard.units)
    counts = f"{tensors:,} tensors, {len(plan.todo):,} of {len(plan.shards):,} shards"
    return summary_line(counts, plan.written, errors, time.perf_counter() - start)


def convert_low_disk(plan: ConversionPlan, jobs: int, fetcher: ShardFetcher) -> ErrorLog:
    """Write one shard after the other while the source shards of the next one are fetched.

    A source shard is deleted when every shard that needs it is on disk and was compared with it.
    Raises SourceFaults before shards are converted whose values cannot be weights.
    """
    errors, todo, samples = ErrorLog(), plan.todo, WeightSamples(plan.source)
    free_used(plan, jobs, fetcher)
    with progress_bar(plan, "convert") as bar:
        with fetcher.fetching(source_shards(todo[:1])):
            pass
        for i, shard in enumerate(todo, 1):
            with contextlib.closing(TensorReader()) as reader:
                samples.check(reader.read, shard.sources)
            with fetcher.fetching(source_shards(todo[i : i + 1])):
                write_shards([new_shard(shard, plan, errors)], jobs, bar.update)
                low_disk.compare_shard(new_shard(shard, plan, ErrorLog()), jobs)
            fetcher.keep_only(source_shards(todo[i:]))
    return errors


def free_used(plan: ConversionPlan, jobs: int, fetcher: ShardFetcher) -> None:
    """Delete the source shards that a killed run has used, after comparing the finished shards."""
    for shard in plan.shards:
        if shard not in plan.todo and all(fetcher.has(name) for name in shard.sources):
            low_disk.compare_shard(new_shard(shard, plan, ErrorLog()), jobs)
    fetcher.keep_only(source_shards(plan.todo))


def source_shards(shards: list[PlannedShard]) -> set[str]:
    """Return the names of the source shards that these shards of the bundle need."""
    return {name for shard in shards for name in shard.sources}


def max_fetched_bytes(todo: list[PlannedShard], fetcher: ShardFetcher) -> int:
    """Return the most bytes of source shards that --low-disk keeps on the disk at one time."""
    fetched, most = set(), 0
    for i in range(len(todo)):
        fetched |= {name for name in source_shards(todo[i : i + 2]) if not fetcher.has(name)}
        most = max(most, fetcher.size(fetched))
        fetched &= source_shards(todo[i + 1 :])
    return most


def complete(plan: ConversionPlan, headers: Checkpoint) -> None:
    """Write the index and the config files. requantize adds the labels.

    Raises UserError when requantize would change a shard, because the shards then differ from the
    plan.
    """
    folder, form = plan.folder, plan.quantizer.form
    weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.layout.slots}
    write_json(folder / INDEX, {"weight_map": weight_map})
    write_json(folder / "config.json", configs.bundle_config(plan.source, form.expert))
    named = source_name(plan.source.folder)
    write_json(folder / "jang_config.json", configs.jang_config(plan.source, form, named))
    made = open_bundle(folder)
    check_complete(made, plan.source)
    again = requantize.plan_from_bundle(headers, made, plan.quantizer, JobPart())
    if again.todo:
        raise UserError(f"{folder / again.todo[0].file}", "a shard that requantize would change",
                   "none", "report this as a bug")  # fmt: skip
    requantize.complete(again)
