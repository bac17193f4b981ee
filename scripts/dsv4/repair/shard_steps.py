"""Plan new shards for wrong experts, rounded controls and a quantized head, from the source."""

from __future__ import annotations

from collections import Counter
from typing import Any

from dsv4.conversion import requantize, shard_metadata
from dsv4.conversion.conversion_plan import ConversionPlan
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.recorded_format import quantizer_for, read_recorded_format, resolve_quantizer
from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.load import expert_bases
from dsv4.model.quantizer_table import is_quantizer, quantizer_properties
from dsv4.quantization.formats import Quantizer, QuantizerOptions
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
from dsv4.text import escape_line


def plan_shards(repair: RepairContext) -> None:
    """Plan to make wrong experts, rounded controls and a quantized head from the source."""
    bundle, begun = open_by_shards(repair.bundle), repair.backup.unfinished
    if foreign_layouts.keeps_experts(scanned := foreign_layouts.scan_bundle(bundle)):
        foreign_layouts.plan_controls(repair, scanned)
        return
    wrong = wrong_experts(bundle)
    accepts_stock = quantizer_properties(repair.options.quantizer).accepts_stock
    as_fp4 = accepts_stock and repair.source is None and not begun
    if as_fp4 and wrong and all_fp4(bundle):
        found = f"{len(wrong):,} expert matrices of FP4 bytes (stock-experts)"
        change = "labelled mxfp4; not compared with the source"
        repair.plan(found, change, lambda: None)  # config.json's own action writes the labels
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
        plan_from_source(repair, bundle, wrong, ", ".join(found) or "an unfinished repair")


def all_fp4(bundle: Checkpoint) -> bool:
    """Return True when every routed expert is stored as FP4 codes and exponents."""
    return all(one == labels.MXFP4 for one in expert_formats(bundle).values())


def plan_from_source(
    repair: RepairContext, bundle: Checkpoint, wrong: dict[str, str], found: str
) -> None:
    """Plan the shards to rewrite. Raises UserError when source and bundle do not fit."""
    asked = repair.options
    before = read_recorded_format(repair.bundle, asked.quantizer)
    options = QuantizerOptions(asked.quantizer, asked.imatrix, asked.plan)
    options = resolve_quantizer(options, before, repair.bundle)
    asked.quantizer = options.name
    quantizer, error = quantizer_for(options, repair.source, before)
    if error and wrong:
        raise error
    if quantizer.form.as_source and not (before and before.name == quantizer.name):
        raise UserError(f"{repair.bundle}", "a bundle that is not lossless", "another QUANTIZER",
                   "make requantize QUANTIZER=lossless, which makes every tensor anew")  # fmt: skip
    made = shard_metadata.made_by(repair.source, quantizer)
    begun = repair.backup.unfinished.get("mark", made)
    if begun != made:
        raise UserError(f"{repair.backup.folder}", f"a repair begun with {describe_mark(begun)}",
                   describe_mark(made), "go on with those, or make unrepair")  # fmt: skip
    mark = made if can_mark_all(bundle, wrong, quantizer, made) else {}
    plan = requantize.plan_from_bundle(
        repair.source, bundle, quantizer, JobPart(), frozenset(wrong), mark
    )
    how = f"made again from the source ({quantizer.name}): {len(plan.todo)} of {len(plan.shards)} "
    bases = expert_bases(bundle)
    experts = {base: quantizer.form.label(base) for base in bases} if wrong else None

    def apply() -> None:
        repair.experts = None  # the labels are right only once the shards are written
        rewrite(repair, plan, {"experts": sorted(wrong), "mark": made})
        repair.experts = experts

    repair.plan(found, f"{how}shards, {format_bytes(plan.written)}", apply)
    repair.experts = experts


def can_mark_all(
    bundle: Checkpoint, wrong: dict[str, str], quantizer: Quantizer, made: dict[str, str]
) -> bool:
    """Return whether the new shards get provenance metadata: only if it holds for every shard.

    Raises UserError when the right experts, which stay, have another format than the new ones.
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
    """Return the quantizer and the source that provenance metadata names, as text."""
    name, table = mark.get("requantize_quantizer"), mark.get("requantize_table", "")
    source = mark.get("requantize_source", "")
    return f"QUANTIZER={escape_line(name)} (table {table[:8]}) and source {source[:8]}"


def rewrite(repair: RepairContext, plan: ConversionPlan, work: dict[str, Any]) -> None:
    """Keep the originals, write the new shards, then the index.

    Raises UserError when the disk has no room for that.
    """
    kept = [*(shard.file for shard in plan.todo), INDEX]
    repair.check_space(kept, plan.written)
    if plan.todo:
        repair.backup.begin(work)
        repair.backup.keep(kept)
        requantize.replace_shards(plan, repair.options.jobs)
        write_index(repair)
        repair.backup.finish()
