"""Plan and run a conversion: read the source once, write the finished bundle once.

The bundle is made in a locked staging folder beside it, which is renamed when it is complete. Each
shard is written under a temporary name, flushed and renamed. So a run may be killed at any time:
the same command continues and gives the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dsv4.conversion import lossless, low_disk, requantize, staging
from dsv4.conversion.bundle_files import remove_leftovers
from dsv4.conversion.expert_pieces import ErrorLog
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.low_disk import ShardFetcher
from dsv4.conversion.progress import estimate_seconds, summary_line, write_with_progress
from dsv4.conversion.shard_metadata import converted_by
from dsv4.conversion.unit_pieces import make_pieces
from dsv4.errors import UserError
from dsv4.hub.provenance import source_name
from dsv4.model import configs
from dsv4.model.bundle_tensors import PlannedShard, missing_weights, plan_shards, weights_of
from dsv4.model.load import open_bundle
from dsv4.quantization.formats import Quantizer
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import format_bytes, write_json
from dsv4.storage.checkpoint import INDEX, Checkpoint, check_index
from dsv4.storage.disk_space import MARK, check_free_space, staging_folder
from dsv4.storage.shard_writer import NewShard, Piece, write_shards
from dsv4.toolchain import upstream_converter

ELSEWHERE = "free space on that volume, or choose another BUNDLE"

# --- The plan -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All shards of the bundle in order, with their source and quantizer.

    headers: the source, or with --low-disk a checkpoint that has headers and samples only.
    """

    source: Checkpoint
    headers: Checkpoint
    quantizer: Quantizer
    shards: list[PlannedShard]

    @property
    def nbytes(self) -> int:
        """The bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def digest(self) -> str:
        """The SHA-256 of every shard's name and header, as 64 hex digits."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.file}\n".encode() + shard.layout.header)
        return digest.hexdigest()


def make_plan(
    source: Checkpoint, headers: Checkpoint, quantizer: Quantizer, shard_bytes: int
) -> Plan:
    """Plan the shards of a bundle of `source`. Raises UserError for an unknown tensor."""
    metadata = converted_by(headers, quantizer)
    shards = plan_shards(source.tensors, quantizer.form, metadata, shard_bytes)
    return Plan(source, headers, quantizer, shards)


def new_shard(shard: PlannedShard, folder: Path, plan: Plan, ledger: ErrorLog) -> NewShard:
    """Return a planned shard with its header and pieces."""
    pieces = functools.partial(shard_pieces, shard, plan, ledger)
    return NewShard(folder / shard.file, shard.layout.header, shard.size, pieces)


def shard_pieces(shard: PlannedShard, plan: Plan, ledger: ErrorLog) -> list[Piece]:
    """Return the pieces of a shard in the order of the source."""
    places = shard.layout.offsets
    of = (plan.quantizer, ledger)
    return [piece for unit in shard.units for piece in make_pieces(unit, places, *of)]


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


def remove_other_files(folder: Path, plan: Plan, part: JobPart) -> list[PlannedShard]:
    """Remove files that are not finished shards of the plan. Return the shards the part must make.

    A part removes its own temporary files only. Raises UserError for finished shards of another
    plan (another source or other settings), which may have cost hours.
    """
    planned = {shard.file: shard for shard in plan.shards}
    whole = set()
    for path in folder.glob("*.safetensors"):
        if path.name in planned and planned[path.name].layout.matches_file(path):
            whole.add(path.name)
        elif path.is_file() and upstream_converter.is_native(path):
            raise UserError(
                f"{path}", "a shard of another source or other settings",
                "shards of this run's plan",
                f"go on with those settings, or delete {folder}",
            )  # fmt: skip
    if part.whole:
        safe_paths.clear_folder(folder, {*whole, locks.LOCK, MARK, lossless.RECORD})
    else:
        remove_leftovers(folder, list(planned), part)
    return [planned[file] for file in part.select(list(planned)) if file not in whole]


# --- Writing ------------------------------------------------------------------------------------


def convert(plan: Plan, bundle: Path, jobs: int, part: JobPart, supply: ShardFetcher | None) -> str:
    """Make the bundle, or a part of it, and return the summary. No incomplete bundle appears."""
    start = time.perf_counter()
    with staging.staging(bundle, part.lock_key(plan.digest)) as folder:
        todo = remove_other_files(folder, plan, part)
        staging.mark(folder)
        check_free_space(folder, sum(shard.size for shard in todo), "", ELSEWHERE)
        if supply:
            check_free_space(supply.folder, max_extra_bytes(todo, supply), "", ELSEWHERE)
            ledger = convert_low_disk(plan, todo, folder, jobs, supply)
        else:
            if part.whole:  # parts would write it at once
                lossless.write_record(folder / lossless.RECORD, plan.headers, plan.quantizer)
            ledger = convert_shards(plan, todo, folder, jobs)
        if part.whole:
            complete(plan, folder, jobs)
            safe_paths.remove(folder, lossless.RECORD)
            staging.move_into_place(folder, bundle)
    tensors = sum(unit.number for shard in todo for unit in shard.units)
    counts = f"{tensors:,} tensors, {len(todo):,} of {len(plan.shards):,} shards"
    written = sum(shard.size for shard in todo)
    return summary_line(counts, written, ledger, time.perf_counter() - start)


def convert_shards(plan: Plan, todo: list[PlannedShard], folder: Path, jobs: int) -> ErrorLog:
    """Write the shards and return the quantization errors."""
    ledger = ErrorLog()
    shards = [new_shard(shard, folder, plan, ledger) for shard in todo]
    write_with_progress(shards, jobs, "convert")
    return ledger


def convert_low_disk(
    plan: Plan, todo: list[PlannedShard], folder: Path, jobs: int, supply: ShardFetcher
) -> ErrorLog:
    """Write one shard after the other while the source shards of the next one are fetched.

    A source shard is deleted when every shard that needs it is on disk and was compared with it.
    """
    ledger = ErrorLog()
    free_used(plan, todo, folder, jobs, supply)
    total = sum(shard.size - len(shard.layout.header) for shard in todo)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        with supply.fetching(source_shards(todo[:1])):
            pass
        for i, shard in enumerate(todo, 1):
            with supply.fetching(source_shards(todo[i : i + 1])):
                write_shards([new_shard(shard, folder, plan, ledger)], jobs, bar.update)
                low_disk.compare_shard(new_shard(shard, folder, plan, ErrorLog()), jobs)
            supply.keep_only(source_shards(todo[i:]))
    return ledger


def free_used(
    plan: Plan, todo: list[PlannedShard], folder: Path, jobs: int, supply: ShardFetcher
) -> None:
    """Delete the source shards that a killed run has used, after comparing the finished shards."""
    for shard in plan.shards:
        if shard not in todo and all(supply.has(name) for name in shard.sources):
            low_disk.compare_shard(new_shard(shard, folder, plan, ErrorLog()), jobs)
    supply.keep_only(source_shards(todo))


def source_shards(shards: list[PlannedShard]) -> set[str]:
    """Return the names of the source shards that these shards of the bundle need."""
    return {name for shard in shards for name in shard.sources}


def max_extra_bytes(todo: list[PlannedShard], supply: ShardFetcher) -> int:
    """Return the most bytes of source shards that --low-disk keeps on the disk at one time."""
    came, most = set(), 0
    for i in range(len(todo)):
        came |= {name for name in source_shards(todo[i : i + 2]) if not supply.has(name)}
        most = max(most, supply.size(came))
        came &= source_shards(todo[i + 1 :])
    return most


def complete(plan: Plan, folder: Path, jobs: int) -> None:
    """Write the index and the config files. requantize adds the labels.

    Raises UserError when requantize would change a shard, because the shards then differ from the
    plan.
    """
    weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.layout.slots}
    write_json(folder / INDEX, {"weight_map": weight_map})
    label = plan.quantizer.form.expert
    write_json(folder / "config.json", configs.bundle_config(plan.source, label))
    named = source_name(plan.source.folder)
    write_json(
        folder / "jang_config.json", configs.jang_config(plan.source, plan.quantizer.form, named)
    )
    made = open_bundle(folder)
    check_complete(made, plan.source)
    after = requantize.make_plan(plan.headers, made, plan.quantizer, JobPart(), jobs)
    if after.todo:
        raise UserError(f"{folder / after.todo[0]}", "a shard that requantize would change",
                   "none", "report this as a bug")  # fmt: skip
    requantize.complete(after)


# --- Descriptions -------------------------------------------------------------------------------


def describe_plan(
    plan: Plan, bundle: Path, jobs: int, part: JobPart, supply: ShardFetcher | None
) -> str:
    """Return the plan as text: tensors by treatment, shards, bytes, estimated time."""
    folder = staging_folder(bundle)
    mine = part.select([shard.file for shard in plan.shards])
    here = [shard for shard in plan.shards if shard.file in mine]
    todo = [shard for shard in here if not shard.layout.matches_file(folder / shard.file)]
    units = [unit for shard in plan.shards for unit in shard.units]
    counts: Counter[str] = Counter()
    for unit in units:
        counts[unit.treatment] += unit.number
    written = sum(shard.size for shard in todo)
    read = sum(t.nbytes for shard in todo for unit in shard.units for t in unit.tensors)
    first = [new_shard(shard, folder, plan, ErrorLog()) for shard in todo[:1]]
    extra = "nothing beside it"
    if supply:
        most = max_extra_bytes(todo, supply)
        extra = f"{format_bytes(most)} for shards of the source at one time"
    lines = [
        f"tensors: {counts['expert']:,} routed experts to {plan.quantizer.form.description()}, "
        + describe_other_tensors(counts, plan.quantizer),
        f"shards: {len(todo):,} to write, {len(plan.shards):,} in the bundle",
        f"read: {format_bytes(read)}; written: {format_bytes(written)}",
        f"disk: {format_bytes(plan.nbytes)} for the bundle, "
        + extra,
        estimate_seconds(first, written, jobs) if not supply else "time: as the network has it",
    ]  # fmt: skip
    return "\n".join(lines)


def describe_other_tensors(counts: Counter[str], quantizer: Quantizer) -> str:
    """Return how all tensors but the routed experts are stored."""
    if quantizer.form.as_source:
        rest = counts.total() - counts["expert"] - counts["fp8"]
        return f"{counts['fp8']:,} FP8 matrices to mxfp8, {rest:,} others as the source has them"
    return (
        f"{counts['matrix']:,} matrices to affine 8 bits, {counts['passthrough']:,} to F16 or as "
        f"integers, {counts['control']:,} controls in F32, {counts['head']:,} head as it is"
    )
