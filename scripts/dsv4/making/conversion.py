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

from dsv4.hub.provenance import source_name
from dsv4.making import low_disk, own_numbers, requantization, workplace
from dsv4.making.experts import Ledger, errors_in_words, estimate
from dsv4.making.low_disk import Supply
from dsv4.making.marks import converted_by
from dsv4.making.part import Part
from dsv4.making.pieces import pieces_of
from dsv4.model import configs
from dsv4.model.opening import open_bundle
from dsv4.model.plan import ShardPlan, lacking, plan_shards, weights_of
from dsv4.runtime import upstream
from dsv4.stop import Stop
from dsv4.storage import inside, locks
from dsv4.storage.checkpoint import INDEX, Checkpoint, check_index
from dsv4.storage.durable import human, write_json
from dsv4.storage.rewrite import NewShard, Piece, rewrite
from dsv4.storage.space import MARK, check_room, workplace_of
from dsv4.weights.quantizer import Quantizer

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
    shards: list[ShardPlan]

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
    """The shards of a bundle of `source`. Raises Stop for a tensor that we do not know."""
    metadata = converted_by(headers, quantizer)
    shards = plan_shards(source.tensors, quantizer.form, metadata, shard_bytes)
    return Plan(source, headers, quantizer, shards)


def new_shard(shard: ShardPlan, folder: Path, plan: Plan, ledger: Ledger) -> NewShard:
    """How a shard will be written."""
    pieces = functools.partial(shard_pieces, shard, plan, ledger)
    return NewShard(folder / shard.file, shard.layout.header, shard.size, pieces)


def shard_pieces(shard: ShardPlan, plan: Plan, ledger: Ledger) -> list[Piece]:
    """Where every byte of a shard comes from, in the order of the source."""
    places = shard.layout.places
    of = (plan.quantizer, ledger)
    return [piece for unit in shard.units for piece in pieces_of(unit, places, *of)]


# --- The workplace ------------------------------------------------------------------------------


def is_done(folder: Path, source: Checkpoint) -> bool:
    """True when `folder` holds this source converted; False when it is absent or empty.

    Raises Stop when it holds anything else, because nothing is written over.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / INDEX).is_file():
        raise Stop(
            f"{folder}",
            "a folder with other files",
            "no folder, or a bundle of this source",
            "choose another BUNDLE, or move it away",
        )
    bundle = open_bundle(folder)
    if lacking(weights_of(source.tensors), bundle.tensors):
        check_complete(bundle, source)
    return True


def check_complete(bundle: Checkpoint, source: Checkpoint) -> None:
    """Raise Stop unless the bundle has a tensor for every tensor of the source."""
    check_index(bundle, "convert")
    wanted = weights_of(source.tensors)
    missing = lacking(wanted, bundle.tensors)
    if missing:
        raise Stop(
            f"{bundle.folder}",
            f"no {missing[0]} ({len(missing):,} of {len(wanted):,} tensors missing)",
            "a tensor for every tensor of the source",
            "delete this folder and convert again",
        )


def clear_strangers(folder: Path, plan: Plan, part: Part) -> list[ShardPlan]:
    """Remove what no shard of the plan is, and return those that the part is still to make.

    A part removes its own temporaries only. Raises Stop when the workplace holds finished shards of
    another plan: from another source, or made with other settings. They may have cost hours.
    """
    planned = {shard.file: shard for shard in plan.shards}
    whole = set()
    for path in folder.glob("*.safetensors"):
        if path.name in planned and planned[path.name].layout.is_at(path):
            whole.add(path.name)
        elif path.is_file() and upstream.is_native(path):
            raise Stop(
                f"{path}", "a shard of another source or other settings",
                "shards of this run's plan",
                f"go on with those settings, or delete {folder}",
            )  # fmt: skip
    if part.whole:
        inside.empty(folder, {*whole, locks.LOCK, MARK, own_numbers.RECORD})
    else:
        requantization.remove_leftovers(folder, list(planned), part)
    return [planned[file] for file in part.of(list(planned)) if file not in whole]


# --- Carrying it out ----------------------------------------------------------------------------


def convert(plan: Plan, bundle: Path, jobs: int, part: Part, supply: Supply | None) -> str:
    """Make the bundle, which appears whole or not at all, or a part of it; return what to say."""
    start = time.perf_counter()
    with workplace.workplace(bundle, part.to_hold(plan.digest)) as folder:
        todo = clear_strangers(folder, plan, part)
        workplace.claim(folder)
        check_room(folder, sum(shard.size for shard in todo), "", ELSEWHERE)
        if supply:
            check_room(supply.folder, most_at_once(plan, todo, supply), "", ELSEWHERE)
            ledger = write_in_turn(plan, todo, folder, jobs, supply)
        else:
            if part.whole:  # parts would write it at once
                own_numbers.keep(folder / own_numbers.RECORD, plan.headers, plan.quantizer)
            ledger = write_shards(plan, todo, folder, jobs)
        if part.whole:
            complete(plan, folder, jobs)
            inside.remove(folder, own_numbers.RECORD)
            workplace.publish(folder, bundle)
    return summarize(plan, todo, ledger, time.perf_counter() - start)


def write_shards(plan: Plan, todo: list[ShardPlan], folder: Path, jobs: int) -> Ledger:
    """Write the shards; those that a killed run left whole are not touched."""
    ledger = Ledger()
    shards = [new_shard(shard, folder, plan, ledger) for shard in todo]
    total = sum(shard.size - len(shard.header) for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        rewrite(shards, jobs, bar.update)
    return ledger


def write_in_turn(
    plan: Plan, todo: list[ShardPlan], folder: Path, jobs: int, supply: Supply
) -> Ledger:
    """Write shard after shard, each from source shards that have just come; free what is used.

    A source shard goes when every shard that needs it is durable and was compared with the source.
    """
    ledger = Ledger()
    free_used(plan, todo, folder, jobs, supply)
    total = sum(shard.size - len(shard.layout.header) for shard in todo)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        with supply.coming(sources_of(todo[:1])):
            pass
        for i, shard in enumerate(todo, 1):
            with supply.coming(sources_of(todo[i : i + 1])):
                rewrite([new_shard(shard, folder, plan, ledger)], jobs, bar.update)
                low_disk.compare(new_shard(shard, folder, plan, Ledger()), jobs)
            supply.keep_only(sources_of(todo[i:]))
    return ledger


def free_used(plan: Plan, todo: list[ShardPlan], folder: Path, jobs: int, supply: Supply) -> None:
    """Free what a killed run had used; what it may not have compared any more is compared."""
    for shard in plan.shards:
        if shard not in todo and all(supply.has(name) for name in shard.sources):
            low_disk.compare(new_shard(shard, folder, plan, Ledger()), jobs)
    supply.keep_only(sources_of(todo))


def sources_of(shards: list[ShardPlan]) -> set[str]:
    """The source's shards that some of the bundle's need."""
    return {name for shard in shards for name in shard.sources}


def most_at_once(plan: Plan, todo: list[ShardPlan], supply: Supply) -> int:
    """The most bytes of the source that --low-disk will add to the disk at one time."""
    came, most = set(), 0
    for i in range(len(todo)):
        came |= {name for name in sources_of(todo[i : i + 2]) if not supply.has(name)}
        most = max(most, supply.size(came))
        came &= sources_of(todo[i + 1 :])
    return most


def complete(plan: Plan, folder: Path, jobs: int) -> None:
    """Write index and configs; requantize adds the labels, and must find nothing to do.

    Raises Stop when it does: then the shards are not what the plan says.
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
    after = requantization.make_plan(plan.headers, made, plan.quantizer, Part(), jobs)
    if after.todo:
        raise Stop(f"{folder / after.todo[0]}", "a shard that requantize would change",
                   "none", "report this as a bug")  # fmt: skip
    requantization.complete(after)


# --- Saying what will be done and what was ------------------------------------------------------


def describe(plan: Plan, bundle: Path, jobs: int, part: Part, supply: Supply | None) -> str:
    """The plan for a reader: tensors by treatment, shards, bytes, an estimate of the time."""
    folder = workplace_of(bundle)
    mine = part.of([shard.file for shard in plan.shards])
    here = [shard for shard in plan.shards if shard.file in mine]
    todo = [shard for shard in here if not shard.layout.is_at(folder / shard.file)]
    units = [unit for shard in plan.shards for unit in shard.units]
    counts: Counter[str] = Counter()
    for unit in units:
        counts[unit.treatment] += unit.number
    written = sum(shard.size for shard in todo)
    read = sum(t.nbytes for shard in todo for unit in shard.units for t in unit.tensors)
    first = [new_shard(shard, folder, plan, Ledger()) for shard in todo[:1]]
    lines = [
        f"tensors: {counts['expert']:,} routed experts to {plan.quantizer.form.in_words()}, "
        + rest_in_words(counts, plan.quantizer),
        f"shards: {len(todo):,} to write, {len(plan.shards):,} in the bundle",
        f"read: {human(read)}; written: {human(written)}",
        f"disk: {human(plan.nbytes)} for the bundle, "
        + (f"{human(most_at_once(plan, todo, supply))} for shards of the source at one time"
           if supply else "nothing beside it"),
        estimate(first, written, jobs) if not supply else "time: as the network has it",
    ]  # fmt: skip
    return "\n".join(lines)


def rest_in_words(counts: Counter[str], quantizer: Quantizer) -> str:
    """What becomes of everything but the routed experts."""
    if quantizer.form.as_source:
        rest = counts.total() - counts["expert"] - counts["fp8"]
        return f"{counts['fp8']:,} FP8 matrices to mxfp8, {rest:,} others as the source has them"
    return (
        f"{counts['affine8']:,} matrices to affine 8 bits, {counts['passthrough']:,} to F16 or as "
        f"integers, {counts['control']:,} controls in F32, {counts['head']:,} head as it is"
    )


def summarize(plan: Plan, todo: list[ShardPlan], ledger: Ledger, seconds: float) -> str:
    """One line: tensors, bytes, seconds, rate, and the experts' errors."""
    written = sum(shard.size for shard in todo)
    tensors = sum(unit.number for shard in todo for unit in shard.units)
    line = (
        f"{tensors:,} tensors, {len(todo):,} of {len(plan.shards):,} shards, {human(written)} in "
        f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    )
    return line + errors_in_words(ledger)
