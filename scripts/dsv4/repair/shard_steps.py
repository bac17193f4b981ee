"""repair's first step: wrong experts, rounded controls and a quantized head, from the source."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dsv4.conversion import requantize, shard_metadata
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.recorded_format import quantizer_for, recorded_in, resolve_quantizer
from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.load import expert_bases
from dsv4.quantization.formats import Quantizer, is_quantizer
from dsv4.repair import foreign_layouts
from dsv4.repair.context import NEEDS_SOURCE, RepairContext, write_index
from dsv4.repair.shards_on_disk import (
    expert_formats,
    has_quantized_head,
    open_by_shards,
    parts_of,
    rounded_controls,
    wrong_experts,
)
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import INDEX, Checkpoint
from dsv4.storage.disk_space import check_free_space
from dsv4.text import escape_line


def mend_shards(repair: RepairContext) -> None:
    """Wrong experts, rounded controls and a quantized head are made again, from the source."""
    bundle, begun = open_by_shards(repair.bundle), repair.backup.unfinished
    if foreign_layouts.keeps_experts(seen := foreign_layouts.scan_bundle(bundle)):
        foreign_layouts.mend_controls(repair, seen)
        return
    wrong = wrong_experts(bundle)
    as_fp4 = repair.args.quantizer == "mxfp4" and repair.source is None and not begun
    if as_fp4 and wrong and all_fp4(bundle):
        found = f"{len(wrong):,} expert matrices of FP4 bytes (stock-experts)"
        repair.report(found, "labelled mxfp4; not compared with the source")
        repair.experts, wrong = dict.fromkeys(expert_bases(bundle), labels.MXFP4), {}
    wrong |= dict.fromkeys(begun.get("experts", ()), "unfinished")
    controls, head = rounded_controls(bundle), has_quantized_head(bundle)
    found = [f"{n:,} expert matrices ({fault})" for fault, n in Counter(wrong.values()).items()]
    found += [f"{len(controls):,} controls not in F32 (controls-rounded)"] if controls else []
    if repair.source is None and (found or begun):
        raise UserError(f"{repair.bundle}", ", ".join(found) or "an unfinished repair",
                   "experts and F32 controls made of the source", NEEDS_SOURCE)  # fmt: skip
    if repair.source is not None and (found or head or begun):
        found += ["an 8-bit head, which mlx-vlm refuses"] if head else []
        from_source(repair, bundle, wrong, ", ".join(found) or "an unfinished repair")


def all_fp4(bundle: Checkpoint) -> bool:
    """True when every routed expert is stored as FP4 codes and their exponents."""
    return all(one == labels.MXFP4 for one in expert_formats(bundle).values())


def from_source(
    repair: RepairContext, bundle: Checkpoint, wrong: dict[str, str], found: str
) -> None:
    """Rewrite the shards that need it. Raises UserError when source and bundle do not fit."""
    before = recorded_in(repair.bundle, repair.args.quantizer)
    stay = resolve_quantizer(repair.args, before)
    quantizer, lack = quantizer_for(repair.args, repair.source, before, stay)
    if lack and wrong:
        raise lack
    if quantizer.form.as_source and not (before and before.mark[0] == quantizer.name):
        raise UserError(f"{repair.bundle}", "a bundle that is not lossless", "another QUANTIZER",
                   "make requantize QUANTIZER=lossless, which makes every tensor anew")  # fmt: skip
    made = shard_metadata.made_by(repair.source, quantizer)
    begun = repair.backup.unfinished.get("mark", made)
    if begun != made:
        raise UserError(f"{repair.backup.folder}", f"a repair begun with {describe_mark(begun)}", describe_mark(made),
                   "go on with those, or make unrepair")  # fmt: skip
    mark = made if can_mark_all(bundle, wrong, quantizer, made) else {}
    plan = requantize.make_plan(
        repair.source,
        bundle,
        quantizer,
        JobPart(),
        repair.args.jobs,
        frozenset(wrong),
        mark,
    )
    size = sum(fate.size for fate in plan.work)
    how = f"made again from the source ({quantizer.name}): {len(plan.todo)} of {len(plan.fates)} "
    if repair.report(found, f"{how}shards, {format_bytes(size)}"):
        rewrite(repair, plan, {"experts": sorted(wrong), "mark": made}, size)
    bases = expert_bases(bundle)
    repair.experts = {base: quantizer.form.label(base) for base in bases} if wrong else None


def can_mark_all(
    bundle: Checkpoint, wrong: dict[str, str], quantizer: Quantizer, made: dict[str, str]
) -> bool:
    """May the new shards say who made their experts? Only when that is true of every shard.

    Raises UserError when right experts, which stay, are stored in another way than the new ones.
    """
    if not wrong:
        return False
    kept = {base: None for base in expert_bases(bundle) if base not in wrong}
    shards = {t.path.name for base in kept for t in parts_of(bundle, base).values()}
    marked = [bundle.shards[file] for file in sorted(shards) if was_requantized(bundle, file)]
    other = next((s.metadata for s in marked if not shard_metadata.is_made_by(s, made)), None)
    if other is not None:
        name = describe_mark(other)
    elif odd := [
        one
        for base, one in expert_formats(bundle).items()
        if base in kept and one != quantizer.form.label(base)
    ]:
        name = f"{odd[0]}"
    else:
        return len(marked) == len(shards)
    gone = other is not None and not is_quantizer(other["requantize_quantizer"])
    every = "make requantize to make every expert"
    raise UserError(f"{bundle.folder}", f"{len(kept):,} right expert matrices of {name}",
               f"the form of {describe_mark(made)}",
               every if gone else f"set QUANTIZER to theirs, or {every}")  # fmt: skip


def was_requantized(bundle: Checkpoint, file: str) -> bool:
    return "requantize_quantizer" in bundle.shards[file].metadata


def describe_mark(mark: dict[str, str]) -> str:
    """A mark for a reader."""
    name, table = mark.get("requantize_quantizer"), mark.get("requantize_table", "")
    source = mark.get("requantize_source", "")
    return f"QUANTIZER={escape_line(name)} (table {table[:8]}) and source {source[:8]}"


def rewrite(
    repair: RepairContext, plan: requantize.RequantizePlan, work: dict[str, Any], size: int
) -> None:
    """Keep the originals, write the new shards, then the index. Raises UserError without the
    room."""
    kept = [*plan.todo, INDEX]
    copies = repair.backup.cost(kept)
    why = f", {format_bytes(copies)} of it for copies of the originals" if copies else ""
    todo = "free space on that volume, where the originals stay too"
    check_free_space(repair.bundle, size + copies, why, todo)
    if plan.todo:
        repair.backup.begin(work)
        repair.backup.keep(kept)
        requantize.write_updates(plan)
        write_index(repair)
        repair.backup.finish()
