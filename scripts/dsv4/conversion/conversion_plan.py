"""The plan of a conversion: the shards of a bundle, and from what each tensor is made.

convert.py plans the shards of a new bundle from its source. requantize.py plans the new shards of a
bundle: its unchanged tensors are copied, the others are made from the source. Both kinds of plan
are described and written by the functions here.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from dsv4.conversion.expert_pieces import ErrorLog, expert_unit_pieces
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.lossless import fp8_pieces
from dsv4.conversion.progress import estimate_seconds
from dsv4.model.bundle_tensors import ConversionUnit, PlannedShard
from dsv4.quantization import mlx_affine
from dsv4.quantization.formats import Quantizer
from dsv4.quantization.source_reader import copy_tensor_pieces
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.shard_writer import NewShard, Piece, copy_pieces, write_shards


@dataclass(frozen=True)
class ConversionPlan:
    """All shards of a bundle in order, and those that this run writes (`todo`).

    folder: where they are written: the staging folder of a new bundle, or the bundle's own folder.
    bundle: the bundle whose shards are replaced, None for a new one.
    """

    source: Checkpoint
    quantizer: Quantizer
    folder: Path
    shards: list[PlannedShard]
    todo: list[PlannedShard]
    bundle: Checkpoint | None = None

    @property
    def written(self) -> int:
        """The bytes of the shards that this run writes."""
        return sum(shard.size for shard in self.todo)

    @property
    def digest(self) -> str:
        """The SHA-256 of every shard's name and header, as 64 hex digits."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.file}\n".encode() + shard.layout.header)
        return digest.hexdigest()

    def extra_disk(self, jobs: int) -> tuple[int, int]:
        """Return the bytes by which the folder grows, and those of the shards open at one time.

        The second is 0 for a new bundle, which has no old shards beside the new ones.
        """
        if self.bundle is None:
            return self.written, 0
        old = sum(self.bundle.shards[shard.file].size for shard in self.todo)
        sizes = sorted((shard.size for shard in self.todo), reverse=True)
        return max(self.written - old, 0), sum(sizes[: jobs + 1])


def without_finished(plan: ConversionPlan, part: JobPart) -> ConversionPlan:
    """Return the plan with those shards of this part as `todo` that its folder lacks."""
    shards = {shard.file: shard for shard in plan.shards}
    todo = [shards[file] for file in part.select(list(shards))]
    todo = [shard for shard in todo if not shard.layout.matches_file(plan.folder / shard.file)]
    return replace(plan, todo=todo)


# --- Writing ------------------------------------------------------------------------------------


def write_plan(plan: ConversionPlan, jobs: int, name: str) -> ErrorLog:
    """Write the plan's shards with `jobs` threads and a progress bar called `name`.

    Returns the errors of quantization.
    """
    errors = ErrorLog()
    with progress_bar(plan, name) as bar:
        write_shards([new_shard(shard, plan, errors) for shard in plan.todo], jobs, bar.update)
    return errors


def progress_bar(plan: ConversionPlan, name: str) -> tqdm:
    """Return a progress bar over the data bytes of the shards that are written."""
    total = plan.written - sum(len(shard.layout.header) for shard in plan.todo)
    return tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None)


def new_shard(shard: PlannedShard, plan: ConversionPlan, errors: ErrorLog) -> NewShard:
    """Return a planned shard with its header and pieces."""
    pieces = functools.partial(shard_pieces, shard, plan.quantizer, errors)
    return NewShard(plan.folder / shard.file, shard.layout.header, shard.size, pieces)


def shard_pieces(shard: PlannedShard, quantizer: Quantizer, errors: ErrorLog) -> list[Piece]:
    """Return the pieces of a shard: copies in file order, then units in theirs."""
    offsets = shard.layout.offsets
    pieces: list[Piece] = []
    for tensor in shard.copies:
        pieces += copy_pieces(tensor.path, tensor.offset, offsets[tensor.name], tensor.nbytes)
    for unit in shard.units:
        pieces += unit_pieces(unit, offsets, quantizer, errors)
    return pieces


def unit_pieces(
    unit: ConversionUnit, offsets: dict[str, int], quantizer: Quantizer, errors: ErrorLog
) -> list[Piece]:
    """Return the pieces of a unit's tensors in a shard. offsets: of the shard's tensors.

    A shard of an older bundle may hold a part of the unit's tensors.
    """
    weight = unit.weight
    tensors = {slot.name: offsets[slot.name] for slot in unit.slots if slot.name in offsets}
    parts = {name.rpartition(".")[2]: offset for name, offset in tensors.items()}
    if unit.treatment == "expert":
        return list(expert_unit_pieces(unit, parts, quantizer, errors))
    if unit.treatment == "fp8":
        return list(fp8_pieces(weight, unit.scale, parts, errors))
    if len(unit.slots) > 1:
        return list(mlx_affine.matrix_pieces(weight, unit.scale, parts))
    offset = tensors[weight.name]
    if unit.slots[0].dtype == weight.dtype:
        return list(copy_tensor_pieces(weight, offset))
    dtype, exact = unit.slots[0].dtype, quantizer.form.as_source
    return list(mlx_affine.float_pieces(weight, offset, dtype, exact))


# --- Descriptions -------------------------------------------------------------------------------


def describe_plan(plan: ConversionPlan, jobs: int, fetched: int | None = None) -> str:
    """Return the plan as text: tensors by treatment, shards, bytes, disk, estimated time.

    fetched: the bytes of source shards on the disk at one time, with --low-disk.
    """
    units = [unit for shard in plan.todo for unit in shard.units]
    read = sum(tensor.nbytes for unit in units for tensor in unit.tensors)
    read += sum(tensor.nbytes for shard in plan.todo for tensor in shard.copies)
    growth, at_once = plan.extra_disk(jobs)
    if fetched is None:
        shards = [new_shard(shard, plan, ErrorLog()) for shard in plan.todo]
        time = estimate_seconds(shards, plan.written, jobs)
    else:
        time = "time: depends on the network"
    lines = [
        f"tensors: {describe_tensors(plan)}",
        f"shards: {len(plan.todo):,} to write, {len(plan.shards):,} in the bundle",
        f"read: {format_bytes(read)}; written: {format_bytes(plan.written)}",
        f"extra disk: {format_bytes(growth)} for good, "
        f"{format_bytes(at_once + (fetched or 0))} while it runs",
        time,
    ]
    return "\n".join(lines)


def describe_tensors(plan: ConversionPlan) -> str:
    """Return the numbers of tensors in the shards to write, by the format that each gets."""
    counts: Counter[str] = Counter()
    form = plan.quantizer.form
    for unit in {unit.weight.name: unit for shard in plan.todo for unit in shard.units}.values():
        counts["mtp" if form.keeps_mtp(unit.base) else unit.treatment] += unit.number
    texts = [(counts["expert"], f"routed experts to {form.description()}")]
    if form.as_source:
        others = counts.total() - counts["expert"] - counts["fp8"] - counts["mtp"]
        texts += [
            (counts["fp8"], "FP8 matrices to mxfp8"),
            (others, "others as the source has them"),
        ]
    else:
        texts += [
            (counts["matrix"], "matrices to affine 8 bits"),
            (counts["passthrough"], "to F16 or as integers"),
            (counts["control"], "controls in F32"),
            (counts["head"], "head as it is"),
        ]
    texts.append((counts["mtp"], "of MTP as the source has them"))
    texts.append((sum(len(shard.copies) for shard in plan.todo), "copied from the bundle"))
    return ", ".join(f"{number:,} {text}" for number, text in texts if number) or "none"
