"""Plan and carry out a requantization: which shards of a bundle change, and to what."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dsv4.making.belonging import check_bundle, check_samples, is_copy
from dsv4.making.experts import Ledger, errors_in_words, estimate
from dsv4.making.marks import made_by, was_made_by, with_matrices
from dsv4.making.part import Part
from dsv4.making.pieces import pieces_of as unit_pieces
from dsv4.model import configs, labels
from dsv4.model.names import is_control, kind, parse_expert
from dsv4.model.opening import expert_bases
from dsv4.model.plan import Unit, as_long, unit_of
from dsv4.storage import inside
from dsv4.storage.checkpoint import INDEX, Checkpoint, check_strangers, read_json
from dsv4.storage.durable import TEMPORARY_SUFFIX, human, temporary_for, write_json
from dsv4.storage.rewrite import NewShard, Piece, copy_pieces, rewrite
from dsv4.storage.shard import Layout, Shard, Slot, Tensor
from dsv4.storage.space import check_room
from dsv4.weights.quantizer import Quantizer

JANG = "jang_config.json"


@dataclass(frozen=True)
class Fate:
    """What becomes of one shard of the bundle: its new layout, and whether it has it already."""

    shard: Shard
    layout: Layout
    kinds: dict[str, str]  # tensor → "expert", "control", "head", "own" or "copy"
    units: dict[str, Unit]  # tensor → what it is a part of, for those that come from the source
    done: bool

    @property
    def size(self) -> int:
        """The new shard's size in bytes."""
        return self.layout.size


@dataclass(frozen=True)
class Plan:
    """Every shard's fate, and which of them this run rewrites."""

    source: Checkpoint
    bundle: Checkpoint
    quantizer: Quantizer
    fates: dict[str, Fate]
    todo: list[str]
    jobs: int

    @property
    def work(self) -> list[Fate]:
        """The fates of the shards that this run rewrites, in order."""
        return [self.fates[file] for file in self.todo]

    @property
    def extra_disk(self) -> tuple[int, int]:
        """Bytes by which the bundle grows for good, and bytes of the shards open at one time."""
        sizes = sorted((fate.size for fate in self.work), reverse=True)
        growth = sum(fate.size - fate.shard.size for fate in self.work)
        return max(growth, 0), sum(sizes[: self.jobs + 1])


def make_plan(
    source: Checkpoint,
    bundle: Checkpoint,
    quantizer: Quantizer,
    part: Part,
    jobs: int,
    only: frozenset[str] | None = None,
    mark: dict[str, str] | None = None,
) -> Plan:
    """Decide every shard's fate. Raises Stop when bundle and source do not belong together.

    only: storage names of the expert matrices that are made; the others are copied as they lie
    (None: all are made). mark: metadata of the shards that are written (None: who made them).
    """
    check_bundle(source, bundle)
    if only is None:  # repair moves strangers away itself
        check_strangers(bundle, "move it away: MLX loads every shard that it finds; or make repair")
    mark = made_by(source, quantizer) if mark is None else mark
    present = frozenset(bundle.tensors)
    fates = {}
    for file, shard in bundle.shards.items():
        fates[file] = fate_of(shard, source, quantizer, present, mark, only)
    mine = part.of(list(fates))
    todo = [file for file in mine if not fates[file].done]
    for file in todo:
        check_samples(source, fates[file].shard)
    return Plan(source, bundle, quantizer, fates, todo, jobs)


def fate_of(
    shard: Shard,
    source: Checkpoint,
    quantizer: Quantizer,
    present: frozenset[str],
    mark: dict[str, str],
    only: frozenset[str] | None = None,
) -> Fate:
    """The new layout of one shard. What is not `present` in the bundle, and wanted, comes right
    after the scales that it belongs to, or after the weight.

    All of it is made anew where the source's own numbers are wanted, or where they are: then no
    byte of the bundle tells whether its weight or its scales were rewritten already.
    """
    own = shard.metadata.get("requantize_quantizer") in labels.OWN
    anew = only is None and (own or quantizer.form.as_source)
    slots, kinds, units = [], {}, {}
    for tensor in shard.tensors.values():
        weight, what = _origin(tensor, source, only, anew)
        new = [Slot(tensor.name, tensor.dtype, tensor.shape)]
        if what != "copy":
            unit = units.get(weight.name) or _unit(weight, source, quantizer)
            units[weight.name] = unit
            new = _slots_of(tensor, unit, present)
            units.update({slot.name: unit for slot in new})
        slots += new
        kinds.update({slot.name: what for slot in new})
    metadata = shard.metadata | {"format": "mlx"} | mark
    if is_native(shard):
        slots = _in_order(slots, source)
        metadata |= with_matrices(quantizer) if anew else {}
    layout = Layout.of(slots, metadata, as_long(quantizer.form) if only is None else {})
    wanted = sorted((slot.name, slot.dtype, slot.shape) for slot in layout.slots)
    found = sorted((t.name, t.dtype, t.shape) for t in shard.tensors.values())
    ours = was_made_by(shard, mark) and wanted == found
    untouched = wanted == found and (
        not {"expert", "own"} & set(kinds.values()) or is_copy(shard, source, quantizer)
    )
    return Fate(shard, layout, kinds, units, ours or untouched)


def _origin(
    tensor: Tensor, source: Checkpoint, only: frozenset[str] | None, anew: bool
) -> tuple[Tensor | None, str]:
    """The source's weight that a tensor of the bundle comes from, and the tensor's kind."""
    base, _, part = tensor.name.rpartition(".")
    of_module = part in ("weight", "scales", "biases")
    weight = source.tensors.get(f"{base}.weight" if of_module else tensor.name)
    if parse_expert(tensor.name):
        return weight, "expert" if only is None or base in only else "copy"
    if weight is None:
        return None, "copy"
    if anew:
        return weight, "own"
    if kind(weight.name) == "head":
        return weight, "head"
    control = is_control(tensor.name) and weight.dtype == "F32"
    return weight, "control" if control else "copy"


def _unit(weight: Tensor, source: Checkpoint, quantizer: Quantizer) -> Unit:
    scale = source.tensors.get(weight.name.removesuffix(".weight") + ".scale")
    return unit_of(weight, scale, quantizer.form)


def _slots_of(tensor: Tensor, unit: Unit, present: frozenset[str]) -> list[Slot]:
    """What one tensor of the bundle becomes: no tensor, the one of its name, new ones after it."""
    slots = [slot for slot in unit.slots if slot.name == tensor.name]
    scales = f"{unit.base}.scales"
    if tensor.name == (scales if scales in present else unit.weight.name):
        slots += [slot for slot in unit.slots if slot.name not in present]
    return slots


def is_native(shard: Shard) -> bool:
    """True for a shard that `convert` wrote."""
    return "convert_layout" in shard.metadata


def _in_order(slots: list[Slot], source: Checkpoint) -> list[Slot]:
    """The slots in the order in which `convert` writes them, so that the bytes are the same."""
    parts = {"weight": 0, "scales": 1, "biases": 2}

    def place(slot: Slot) -> tuple[str, int, str, int]:
        base, _, part = slot.name.rpartition(".")
        weight = source.tensors.get(f"{base}.weight" if part in parts else slot.name)
        if weight is None:
            return "", 0, slot.name, 0
        return weight.path.name, weight.offset, weight.name, parts.get(part, 0)

    return sorted(slots, key=place)


def new_shard(fate: Fate, source: Checkpoint, quantizer: Quantizer, ledger: Ledger) -> NewShard:
    """How a shard will be written."""
    pieces = functools.partial(pieces_of, fate, source, quantizer, ledger)
    return NewShard(fate.shard.path, fate.layout.header, fate.size, pieces)


def pieces_of(fate: Fate, source: Checkpoint, quantizer: Quantizer, ledger: Ledger) -> list[Piece]:
    """Where every byte of a new shard comes from: copies in file order, then from the source."""
    pieces: list[Piece] = []
    made: dict[str, Unit] = {}
    for slot in fate.layout.slots:
        if fate.kinds[slot.name] == "copy":
            tensor, place = fate.shard.tensors[slot.name], fate.layout.places[slot.name]
            pieces += copy_pieces(tensor.path, tensor.offset, place, slot.nbytes)
        else:
            unit = fate.units[slot.name]
            made[unit.weight.name] = unit
    for unit in made.values():
        pieces += unit_pieces(unit, fate.layout.places, source, quantizer, ledger)
    return pieces


def remove_leftovers(bundle: Path, files: list[str], part: Part) -> None:
    """Remove what killed runs left: the temporaries of this part's shards, or all of them.

    Links and folders of such a name are not ours and stay.
    """
    if part.whole:
        leftovers = list(bundle.glob(f".*{TEMPORARY_SUFFIX}"))
    else:
        leftovers = [temporary_for(bundle / file) for file in part.of(files)]
    for path in leftovers:
        if inside.kind(bundle, path.name) == inside.FILE:
            inside.remove(bundle, path.name)


def carry_out(plan: Plan) -> Ledger:
    """Rewrite the plan's shards. Raises Stop when they do not fit on the disk."""
    todo = "free space on that volume, or use fewer --jobs"
    check_room(plan.bundle.folder, sum(plan.extra_disk), "", todo)
    ledger = Ledger()
    shards = [new_shard(fate, plan.source, plan.quantizer, ledger) for fate in plan.work]
    total = sum(shard.size - len(shard.header) for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="requantize", disable=None) as bar:
        rewrite(shards, plan.jobs, bar.update)
    return ledger


def complete(plan: Plan) -> bool:
    """Rebuild the index, then the labels in config.json; True when either changed."""
    folder = plan.bundle.folder
    changed = write_index(folder, {file: fate.layout.slots for file, fate in plan.fates.items()})
    config = dict(plan.bundle.config)
    config.pop("quantization_config", None)
    slots = {slot.name: slot for fate in plan.fates.values() for slot in fate.layout.slots}
    form = plan.quantizer.form
    experts = {base: form.label(base) for base in expert_bases(plan.source)}
    config["quantization"] = labels.quantization(experts, slots)
    config[labels.RECORD] = record_of(plan.quantizer)
    if any(map(is_native, plan.bundle.shards.values())) and (folder / JANG).is_file():
        config |= configs.width(form.expert)
        changed |= restamp(folder / JANG, plan)
    if config != plan.bundle.config:
        changed |= write_json(folder / "config.json", config)
    return changed


def restamp(path: Path, plan: Plan) -> bool:
    """Write jang_config.json as the new form has it; True if it changed."""
    old = read_json(path)
    new = configs.restamped(old, plan.source, plan.quantizer.form)
    return old != new and write_json(path, new)


def write_index(folder: Path, shards: Mapping[str, Iterable[Slot | Tensor]]) -> bool:
    """Write the index of these shards' tensors; what else stands in it stays. True if it changed.

    Raises Stop when an index is there that is no JSON object.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    tensors = {tensor.name: (file, tensor.nbytes) for file, of in shards.items() for tensor in of}
    metadata = index.get("metadata")
    total = sum(nbytes for _, nbytes in tensors.values())
    index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
    index["weight_map"] = {name: file for name, (file, _) in sorted(tensors.items())}
    return write_json(folder / INDEX, index)


def record_of(quantizer: Quantizer) -> dict[str, str]:
    """What config.json says of the quantizer that made the routed experts."""
    return {"quantizer": quantizer.name, "table": quantizer.digest}


def describe(plan: Plan) -> str:
    """The plan for a reader: shards, tensors by kind, bytes, disk, an estimate of the time."""
    kinds = dict.fromkeys(("expert", "control", "head", "own", "copy"), 0)
    for fate in plan.work:
        for what in fate.kinds.values():
            kinds[what] += 1
    growth, at_once = plan.extra_disk
    shards = [new_shard(fate, plan.source, plan.quantizer, Ledger()) for fate in plan.work]
    written = sum(shard.size for shard in shards)
    read = sum(piece.nbytes_read for shard in shards for piece in shard.pieces())
    lines = [
        f"shards: {len(plan.todo):,} to write, {len(plan.fates):,} in the bundle",
        f"tensors: {kinds['expert']:,} parts of routed experts from FP4, "
        f"{kinds['control']:,} controls to F32, {kinds['head']:,} head as in the source, "
        f"{kinds['own']:,} others from the source, {kinds['copy']:,} copied",
        f"read: {human(read)}; written: {human(written)}",
        f"extra disk: {human(growth)} for good, {human(at_once)} while it runs",
        estimate(shards, written, plan.jobs),
    ]
    return "\n".join(lines)


def summarize(plan: Plan, ledger: Ledger, seconds: float) -> str:
    """One line: tensors, bytes, seconds, rate, and the errors as the table knows them."""
    written = sum(fate.size for fate in plan.work)
    line = (
        f"{len(ledger.tallies):,} tensors, {len(plan.todo):,} shards, {human(written)} in "
        f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    )
    return line + errors_in_words(ledger)
