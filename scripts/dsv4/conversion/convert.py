"""Plan and carry out a conversion: the source read once, the finished bundle written once.

The work is done in a hidden sibling of the bundle, locked, that takes the bundle's name when it is
whole. Each shard is written under a temporary name, made durable and renamed, so a run can be
killed at any moment: the same command goes on, with the same bytes in the end.
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
from dsv4.conversion.expert_pieces import ErrorLog, describe_errors, estimate_seconds
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.low_disk import ShardFetcher
from dsv4.conversion.shard_metadata import converted_by
from dsv4.conversion.unit_pieces import make_pieces
from dsv4.errors import UserError
from dsv4.hub.provenance import source_name
from dsv4.model import configs
from dsv4.model.bundle_plan import PlannedShard, missing_weights, plan_shards, weights_of
from dsv4.model.load import open_bundle
from dsv4.quantization.formats import Quantizer
from dsv4.storage import locks, safe_paths
from dsv4.storage.atomic import format_bytes, write_json
from dsv4.storage.checkpoint import INDEX, Checkpoint, check_index
from dsv4.storage.disk_space import MARK, check_free_space, staging_folder
from dsv4.storage.shard_writer import NewShard, Piece, write_shards
from dsv4.toolchain import upstream_converter

ELSEWHERE = "free space on that volume, or choose another BUNDLE"

# --- The plan: which bytes go where -------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All shards of the bundle in order, and what makes them.

    `headers` is the source as far as headers tell: with --low-disk a skeleton of it.
    """

    source: Checkpoint
    headers: Checkpoint
    quantizer: Quantizer
    shards: list[PlannedShard]

    @property
    def nbytes(self) -> int:
        """The bundle's shards, in bytes."""
        return sum(shard.size for shard in self.shards)

    @property
    def digest(self) -> str:
        """64 hex digits for the plan: every shard's name and header."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.file}\n".encode() + shard.layout.header)
        return digest.hexdigest()


def make_plan(
    source: Checkpoint, headers: Checkpoint, quantizer: Quantizer, shard_bytes: int
) -> Plan:
    """The shards of a bundle of `source`. Raises UserError for a tensor that we do not know."""
    metadata = converted_by(headers, quantizer)
    shards = plan_shards(source.tensors, quantizer.form, metadata, shard_bytes)
    return Plan(source, headers, quantizer, shards)


def new_shard(shard: PlannedShard, folder: Path, plan: Plan, ledger: ErrorLog) -> NewShard:
    """How a shard will be written."""
    pieces = functools.partial(shard_pieces, shard, plan, ledger)
    return NewShard(folder / shard.file, shard.layout.header, shard.size, pieces)


def shard_pieces(shard: PlannedShard, plan: Plan, ledger: ErrorLog) -> list[Piece]:
    """Where every byte of a shard comes from, in the order of the source."""
    places = shard.layout.offsets
    of = (plan.quantizer, ledger)
    return [piece for unit in shard.units for piece in make_pieces(unit, places, *of)]


# --- The workplace ------------------------------------------------------------------------------


def is_done(folder: Path, source: Checkpoint) -> bool:
    """True when `folder` holds this source converted; False when it is absent or empty.

    Raises UserError when it holds anything else, because nothing is written over.
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
    """Remove what no shard of the plan is, and return those that the part is still to make.

    A part removes its own temporaries only. Raises UserError when the workplace holds finished
    shards of another plan: from another source, or made with other settings. They may have cost
    hours.
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
        requantize.remove_leftovers(folder, list(planned), part)
    return [planned[file] for file in part.select(list(planned)) if file not in whole]


# --- Carrying it out ----------------------------------------------------------------------------


def convert(plan: Plan, bundle: Path, jobs: int, part: JobPart, supply: ShardFetcher | None) -> str:
    """Make the bundle, which appears whole or not at all, or a part of it; return what to say."""
    start = time.perf_counter()
    with staging.staging(bundle, part.lock_key(plan.digest)) as folder:
        todo = remove_other_files(folder, plan, part)
        staging.mark(folder)
        check_free_space(folder, sum(shard.size for shard in todo), "", ELSEWHERE)
        if supply:
            check_free_space(supply.folder, max_extra_bytes(plan, todo, supply), "", ELSEWHERE)
            ledger = convert_low_disk(plan, todo, folder, jobs, supply)
        else:
            if part.whole:  # parts would write it at once
                lossless.write_record(folder / lossless.RECORD, plan.headers, plan.quantizer)
            ledger = convert_shards(plan, todo, folder, jobs)
        if part.whole:
            complete(plan, folder, jobs)
            safe_paths.remove(folder, lossless.RECORD)
            staging.move_into_place(folder, bundle)
    return summary_line(plan, todo, ledger, time.perf_counter() - start)


def convert_shards(plan: Plan, todo: list[PlannedShard], folder: Path, jobs: int) -> ErrorLog:
    """Write the shards; those that a killed run left whole are not touched."""
    ledger = ErrorLog()
    shards = [new_shard(shard, folder, plan, ledger) for shard in todo]
    total = sum(shard.size - len(shard.header) for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        write_shards(shards, jobs, bar.update)
    return ledger


def convert_low_disk(
    plan: Plan, todo: list[PlannedShard], folder: Path, jobs: int, supply: ShardFetcher
) -> ErrorLog:
    """Write shard after shard, each from source shards that have just come; free what is used.

    A source shard goes when every shard that needs it is durable and was compared with the source.
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
    """Free what a killed run had used; what it may not have compared any more is compared."""
    for shard in plan.shards:
        if shard not in todo and all(supply.has(name) for name in shard.sources):
            low_disk.compare_shard(new_shard(shard, folder, plan, ErrorLog()), jobs)
    supply.keep_only(source_shards(todo))


def source_shards(shards: list[PlannedShard]) -> set[str]:
    """The source's shards that some of the bundle's need."""
    return {name for shard in shards for name in shard.sources}


def max_extra_bytes(plan: Plan, todo: list[PlannedShard], supply: ShardFetcher) -> int:
    """The most bytes of the source that --low-disk will add to the disk at one time."""
    came, most = set(), 0
    for i in range(len(todo)):
        came |= {name for name in source_shards(todo[i : i + 2]) if not supply.has(name)}
        most = max(most, supply.size(came))
        came &= source_shards(todo[i + 1 :])
    return most


def complete(plan: Plan, folder: Path, jobs: int) -> None:
    """Write index and configs; requantize adds the labels, and must find nothing to do.

    Raises UserError when it does: then the shards are not what the plan says.
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


# --- Saying what will be done and what was ------------------------------------------------------


def describe_plan(
    plan: Plan, bundle: Path, jobs: int, part: JobPart, supply: ShardFetcher | None
) -> str:
    """The plan for a reader: tensors by treatment, shards, bytes, an estimate of the time."""
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
    lines = [
        f"tensors: {counts['expert']:,} routed experts to {plan.quantizer.form.description()}, "
        + describe_other_tensors(counts, plan.quantizer),
        f"shards: {len(todo):,} to write, {len(plan.shards):,} in the bundle",
        f"read: {format_bytes(read)}; written: {format_bytes(written)}",
        f"disk: {format_bytes(plan.nbytes)} for the bundle, "
        + (f"{format_bytes(max_extra_bytes(plan, todo, supply))} for shards of the source at one time"
           if supply else "nothing beside it"),
        estimate_seconds(first, written, jobs) if not supply else "time: as the network has it",
    ]  # fmt: skip
    return "\n".join(lines)


def describe_other_tensors(counts: Counter[str], quantizer: Quantizer) -> str:
    """What becomes of everything but the routed experts."""
    if quantizer.form.as_source:
        rest = counts.total() - counts["expert"] - counts["fp8"]
        return f"{counts['fp8']:,} FP8 matrices to mxfp8, {rest:,} others as the source has them"
    return (
        f"{counts['affine8']:,} matrices to affine 8 bits, {counts['passthrough']:,} to F16 or as "
        f"integers, {counts['control']:,} controls in F32, {counts['head']:,} head as it is"
    )


def summary_line(plan: Plan, todo: list[PlannedShard], ledger: ErrorLog, seconds: float) -> str:
    """One line: tensors, bytes, seconds, rate, and the experts' errors."""
    written = sum(shard.size for shard in todo)
    tensors = sum(unit.number for shard in todo for unit in shard.units)
    line = (
        f"{tensors:,} tensors, {len(todo):,} of {len(plan.shards):,} shards, {format_bytes(written)} in "
        f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    )
    return line + describe_errors(ledger)
