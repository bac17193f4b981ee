"""Plan and run a requantization: rewrite the shards of a bundle whose tensors change.

It is a conversion in which unchanged tensors are copied from the bundle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv4.conversion.bundle_files import quantizer_record, sidecar_bytes, write_index
from dsv4.conversion.expert_pieces import ErrorLog
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.progress import estimate_seconds, write_with_progress
from dsv4.conversion.shard_metadata import is_made_by, made_by, with_mlx_digest
from dsv4.conversion.source_match import check_bundle, check_samples, is_copy
from dsv4.conversion.unit_pieces import make_pieces as unit_pieces
from dsv4.model import configs, labels
from dsv4.model.bundle_tensors import (
    ConversionUnit,
    conversion_unit,
    conversion_units,
    header_dtypes,
)
from dsv4.model.load import expert_bases
from dsv4.model.names import expert_base, is_control, kind, parse_expert, parse_stack, stack_base
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.quantization.formats import Quantizer
from dsv4.storage import safe_paths
from dsv4.storage.atomic import format_bytes, write_bytes, write_json
from dsv4.storage.checkpoint import SIDECAR, Checkpoint, check_strangers, read_json
from dsv4.storage.disk_space import check_free_space
from dsv4.storage.safetensors_file import Shard, ShardLayout, Tensor, TensorSpec
from dsv4.storage.shard_writer import NewShard, Piece, copy_pieces

JANG = "jang_config.json"


@dataclass(frozen=True)
class ShardUpdate:
    """The target layout of one shard. `done` is true if the file on disk already has it."""

    shard: Shard
    layout: ShardLayout
    kinds: dict[str, str]  # tensor → "expert", "control", "head", "own" or "copy"
    units: dict[str, ConversionUnit]  # tensor → its unit, for tensors made from the source
    done: bool

    @property
    def size(self) -> int:
        """The new shard's size in bytes."""
        return self.layout.size


@dataclass(frozen=True)
class RequantizePlan:
    """The updates of all shards by file, and the files that this run rewrites (`todo`)."""

    source: Checkpoint
    bundle: Checkpoint
    quantizer: Quantizer
    fates: dict[str, ShardUpdate]
    todo: list[str]
    jobs: int

    @property
    def work(self) -> list[ShardUpdate]:
        """The updates of the shards that this run rewrites, in order."""
        return [self.fates[file] for file in self.todo]

    @property
    def extra_disk(self) -> tuple[int, int]:
        """The bytes by which the bundle grows, and the bytes of the shards open at one time."""
        sizes = sorted((fate.size for fate in self.work), reverse=True)
        growth = sum(fate.size - fate.shard.size for fate in self.work)
        return max(growth, 0), sum(sizes[: self.jobs + 1])


def make_plan(
    source: Checkpoint,
    bundle: Checkpoint,
    quantizer: Quantizer,
    part: JobPart,
    jobs: int,
    only: frozenset[str] | None = None,
    mark: dict[str, str] | None = None,
    stay: bool = False,
) -> RequantizePlan:
    """Plan the update of every shard. Raises UserError when bundle and source do not match.

    only: storage names of the expert matrices that are made; others are copied (None: all are
    made). mark: metadata of the written shards (None: `made_by`). stay: a shard without provenance
    metadata counts as done if its header is as planned.
    """
    check_bundle(source, bundle)
    if only is None:  # repair moves strangers away itself
        check_strangers(bundle, "move it away: MLX loads every shard that it finds; or make repair")
    mark = made_by(source, quantizer) if mark is None else mark
    present = frozenset(bundle.tensors)
    units = conversion_units(source.tensors, quantizer.form) if only is None else []
    units = [unit for unit in units if unit.treatment == "expert"]
    coming, experts = (
        incoming_units(units, bundle),
        {s.name: unit for unit in units for s in unit.slots},
    )
    fates = {}
    for file, shard in bundle.shards.items():
        new = coming.get(file, [])
        fates[file] = shard_update(
            shard, source, quantizer, present, mark, only, new, experts, stay
        )
    mine = part.select(list(fates))
    todo = [file for file in mine if not fates[file].done]
    for file in todo:
        check_samples(source, fates[file].shard)
    return RequantizePlan(source, bundle, quantizer, fates, todo, jobs)


def incoming_units(
    units: list[ConversionUnit], bundle: Checkpoint
) -> dict[str, list[ConversionUnit]]:
    """Return file → units whose tensors have no counterpart of the same name in the bundle.

    They go into the file of the tensors that they replace. The first stack goes into the first
    shard, where jang_tools looks for it.
    """
    tensors, files = bundle.tensors, list(bundle.shards)
    coming: dict[str, list[ConversionUnit]] = {}
    for number, unit in enumerate(units):
        if any(slot.name in tensors for slot in unit.slots):
            continue
        bases = [of[0].name.removesuffix(".weight") for of in unit.stack] or [unit.base]
        old = [f"{base}.{part}" for base in bases for part in ("weight", "tq_packed")]
        lies = next((n for n in (*old, f"{stack_base(unit.base)}.tq_packed") if n in tensors), None)
        first = lies is None or (unit.stack and number == 0)
        coming.setdefault(files[0] if first else tensors[lies].path.name, []).append(unit)
    return coming


def shard_update(
    shard: Shard,
    source: Checkpoint,
    quantizer: Quantizer,
    present: frozenset[str],
    mark: dict[str, str],
    only: frozenset[str] | None,
    coming: Iterable[ConversionUnit],
    experts: Mapping[str, ConversionUnit],
    stay: bool,
) -> ShardUpdate:
    """The new layout of one shard. What is not `present` in the bundle, and wanted, comes right
    after the scales that it belongs to, or after the weight; the units that are `coming` last.
    experts: the units of all that are made, by the names of their tensors.

    All of it is made anew where the source's own numbers are wanted, or where they are: then no
    byte of the bundle tells whether its weight or its scales were rewritten already.
    """
    own = quantizer_properties(shard.metadata.get("requantize_quantizer")).keeps_source
    anew = only is None and (own or quantizer.form.as_source)
    slots, kinds, units = [], {}, {}
    for tensor in shard.tensors.values():
        weight, what = _source_weight(tensor, source, only, anew)
        new = [TensorSpec(tensor.name, tensor.dtype, tensor.shape)]
        if what != "copy":
            new = []
            unit = experts.get(tensor.name) or units.get(weight.name)
            unit = unit or _unit(tensor, weight, source, quantizer)
            if unit is not None:
                units[weight.name] = unit
                new = _slots_of(tensor, unit, present)
                units.update({slot.name: unit for slot in new})
        slots += new
        kinds.update({slot.name: what for slot in new})
    for unit in coming:
        slots += unit.slots
        units.update({slot.name: unit for slot in unit.slots})
        kinds.update({slot.name: "expert" for slot in unit.slots})
    metadata = shard.metadata | {"format": "mlx"} | mark
    if is_native(shard):
        slots = _in_order(slots, units, source)
        metadata |= with_mlx_digest(quantizer) if anew else {}
    layout = ShardLayout.of(slots, metadata, header_dtypes(quantizer.form) if only is None else {})
    wanted = sorted((slot.name, slot.dtype, slot.shape) for slot in layout.slots)
    found = sorted((t.name, t.dtype, t.shape) for t in shard.tensors.values())
    lost = stay and not mark.keys() & shard.metadata.keys()
    ours = (is_made_by(shard, mark) or lost) and wanted == found
    untouched = wanted == found and (
        not {"expert", "own"} & set(kinds.values()) or is_copy(shard, source, quantizer)
    )
    return ShardUpdate(shard, layout, kinds, units, ours or untouched)


def _source_weight(
    tensor: Tensor, source: Checkpoint, only: frozenset[str] | None, anew: bool
) -> tuple[Tensor | None, str]:
    """Return the source's weight for a tensor of the bundle, and the tensor's kind."""
    base, _, part = tensor.name.rpartition(".")
    if of := parse_stack(tensor.name):
        base = expert_base("layers", of[0], 0, of[1])
    of_module = part in ("weight", "scales", "biases", *labels.TURBO_PARTS)
    weight = source.tensors.get(f"{base}.weight" if of_module else tensor.name)
    if parse_expert(tensor.name) or of:
        return weight, "expert" if only is None or base in only else "copy"
    if weight is None:
        return None, "copy"
    if anew:
        return weight, "own"
    if kind(weight.name) == "head":
        return weight, "head"
    control = is_control(tensor.name) and weight.dtype == "F32"
    return weight, "control" if control else "copy"


def _unit(
    tensor: Tensor, weight: Tensor, source: Checkpoint, quantizer: Quantizer
) -> ConversionUnit | None:
    """Return the unit of a tensor's weight, or None when its tensors get another name."""
    stacked = quantizer.form.stacked and weight.name.startswith("layers.")
    if parse_stack(tensor.name) or (parse_expert(tensor.name) and stacked):
        return None
    scale = source.tensors.get(weight.name.removesuffix(".weight") + ".scale")
    return conversion_unit(weight, scale, quantizer.form)


def _slots_of(tensor: Tensor, unit: ConversionUnit, present: frozenset[str]) -> list[TensorSpec]:
    """Return what replaces one tensor: nothing, the tensor of its name, or also new ones."""
    slots = [slot for slot in unit.slots if slot.name == tensor.name]
    scales = f"{unit.base}.scales"
    arrives = not any(slot.name in present for slot in unit.slots)
    if not arrives and tensor.name == (scales if scales in present else unit.weight.name):
        slots += [slot for slot in unit.slots if slot.name not in present]
    return slots


def is_native(shard: Shard) -> bool:
    """Return True for a shard that `convert` wrote."""
    return "convert_layout" in shard.metadata


def _in_order(
    slots: list[TensorSpec], units: dict[str, ConversionUnit], source: Checkpoint
) -> list[TensorSpec]:
    """Return the slots in the order of `convert`, so that the bytes are the same."""
    parts = {part: i for i, part in enumerate(("weight", "scales", "biases", *labels.TURBO_PARTS))}

    def place(slot: TensorSpec) -> tuple[str, int, str, int]:
        base, _, part = slot.name.rpartition(".")
        weight = source.tensors.get(f"{base}.weight" if part in parts else slot.name)
        if slot.name in units:
            weight = units[slot.name].weight
        if weight is None:
            return "", 0, slot.name, 0
        return weight.path.name, weight.offset, weight.name, parts.get(part, 0)

    return sorted(slots, key=place)


def new_shard(
    fate: ShardUpdate, source: Checkpoint, quantizer: Quantizer, ledger: ErrorLog
) -> NewShard:
    """Return an updated shard with its header and pieces."""
    pieces = functools.partial(update_pieces, fate, source, quantizer, ledger)
    return NewShard(fate.shard.path, fate.layout.header, fate.size, pieces)


def update_pieces(
    fate: ShardUpdate, source: Checkpoint, quantizer: Quantizer, ledger: ErrorLog
) -> list[Piece]:
    """Return the pieces of a shard: copies in file order, then tensors from the source."""
    pieces: list[Piece] = []
    made: dict[str, ConversionUnit] = {}
    for slot in fate.layout.slots:
        if fate.kinds[slot.name] == "copy":
            tensor, place = fate.shard.tensors[slot.name], fate.layout.offsets[slot.name]
            pieces += copy_pieces(tensor.path, tensor.offset, place, slot.nbytes)
        else:
            unit = fate.units[slot.name]
            made[unit.weight.name] = unit
    for unit in made.values():
        pieces += unit_pieces(unit, fate.layout.offsets, quantizer, ledger)
    return pieces


def rewritten(plan: RequantizePlan) -> int:
    """Return the number of expert matrices that are quantized again."""
    units = {
        fate.units[slot.name].weight.name: fate.units[slot.name].number
        for fate in plan.work
        for slot in fate.layout.slots
        if fate.kinds[slot.name] == "expert"
    }
    return sum(units.values())


def write_updates(plan: RequantizePlan) -> ErrorLog:
    """Rewrite the plan's shards. Raises UserError when they do not fit on the disk."""
    todo = "free space on that volume, or use fewer --jobs"
    check_free_space(plan.bundle.folder, sum(plan.extra_disk), "", todo)
    ledger = ErrorLog()
    shards = [new_shard(fate, plan.source, plan.quantizer, ledger) for fate in plan.work]
    write_with_progress(shards, plan.jobs, "requantize")
    return ledger


def complete(plan: RequantizePlan) -> bool:
    """Rebuild the index and the labels in config.json. Return True when either changed."""
    folder = plan.bundle.folder
    changed = write_index(folder, {file: fate.layout.slots for file, fate in plan.fates.items()})
    config = dict(plan.bundle.config)
    config.pop("quantization_config", None)
    slots = {slot.name: slot for fate in plan.fates.values() for slot in fate.layout.slots}
    form = plan.quantizer.form
    experts = {base: form.label(base) for base in expert_bases(plan.source)}
    config["quantization"] = labels.quantization(experts, slots)
    config[labels.RECORD] = quantizer_record(plan.quantizer)
    native = any(map(is_native, plan.bundle.shards.values())) and (folder / JANG).is_file()
    turbo = labels.TURBO in (form.expert["mode"], config.get("weight_format"))
    if native or turbo:
        config = configs.replace_width_fields(config, form.expert)
        changed |= update_jang_config(folder / JANG, plan)
    changed |= write_sidecar(folder, plan)
    for file, fate in plan.fates.items():
        if not fate.layout.slots:  # all its experts lie in stacks now
            safe_paths.remove(folder, file)
    if config != plan.bundle.config:
        changed |= write_json(folder / "config.json", config)
    return changed


def update_jang_config(path: Path, plan: RequantizePlan) -> bool:
    """Write jang_config.json for the new format. Return True if it changed."""
    old = read_json(path) if path.is_file() else {}
    new = configs.updated_jang_config(old, plan.source, plan.quantizer.form)
    return old != new and write_json(path, new)


def write_sidecar(folder: Path, plan: RequantizePlan) -> bool:
    """Write TurboQuant's signs and codebooks, or remove that file from bundles in other formats.

    Returns True if it changed. The file is as jang_tools.build_jangtq_sidecar 2.5.50 writes it.
    """
    if not plan.quantizer.form.stacked:
        there = (folder / SIDECAR).is_file() and plan.bundle.config.get("weight_format") == "mxtq"
        if there:
            safe_paths.remove(folder, SIDECAR)
        return there
    bases = expert_bases(plan.source)
    columns = {2 * plan.source.tensors[f"{base}.weight"].shape[1] for base in bases}
    return write_bytes(folder / SIDECAR, sidecar_bytes(columns), folder)


def describe_plan(plan: RequantizePlan) -> str:
    """Return the plan as text: shards, tensors by kind, bytes, disk, estimated time."""
    kinds = dict.fromkeys(("expert", "control", "head", "own", "copy"), 0)
    for fate in plan.work:
        for what in fate.kinds.values():
            kinds[what] += 1
    growth, at_once = plan.extra_disk
    shards = [new_shard(fate, plan.source, plan.quantizer, ErrorLog()) for fate in plan.work]
    written = sum(shard.size for shard in shards)
    read = sum(piece.nbytes_read for shard in shards for piece in shard.pieces())
    lines = [
        f"shards: {len(plan.todo):,} to write, {len(plan.fates):,} in the bundle",
        f"tensors: {kinds['expert']:,} parts of routed experts from FP4, "
        f"{kinds['control']:,} controls to F32, {kinds['head']:,} head as in the source, "
        f"{kinds['own']:,} others from the source, {kinds['copy']:,} copied",
        f"read: {format_bytes(read)}; written: {format_bytes(written)}",
        f"extra disk: {format_bytes(growth)} for good, {format_bytes(at_once)} while it runs",
        estimate_seconds(shards, written, plan.jobs),
    ]
    return "\n".join(lines)
