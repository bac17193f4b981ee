"""Plan and complete a requantization: a conversion that copies the bundle's unchanged tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsv4.conversion.bundle_files import quantizer_record, sidecar_bytes, write_index
from dsv4.conversion.conversion_plan import ConversionPlan, write_plan
from dsv4.conversion.expert_pieces import ErrorLog
from dsv4.conversion.job_array import JobPart
from dsv4.conversion.shard_metadata import is_made_by, made_by, with_mlx_digest
from dsv4.conversion.source_match import check_bundle, check_samples, is_copy
from dsv4.model import configs, labels, mtp
from dsv4.model.bundle_tensors import (
    ConversionUnit,
    PlannedShard,
    conversion_unit,
    conversion_units,
    header_dtypes,
)
from dsv4.model.load import expert_bases
from dsv4.model.names import expert_base, is_control, kind, parse_expert, parse_stack, stack_base
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.quantization.formats import Quantizer
from dsv4.storage import safe_paths
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.storage.checkpoint import SIDECAR, Checkpoint, check_strangers, read_json
from dsv4.storage.disk_space import check_free_space
from dsv4.storage.safetensors_file import Shard, ShardLayout, Tensor, TensorSpec

JANG = "jang_config.json"
PART_ORDER = {part: i for i, part in enumerate(("weight", "scales", "biases", *labels.TURBO_PARTS))}


# --- The plan -----------------------------------------------------------------------------------


def plan_from_bundle(
    source: Checkpoint,
    bundle: Checkpoint,
    quantizer: Quantizer,
    part: JobPart,
    experts: frozenset[str] | None = None,
    provenance: dict[str, str] | None = None,
    trust_unmarked: bool = False,
) -> ConversionPlan:
    """Plan the new shards of a bundle. Raises UserError when bundle and source do not match.

    experts: storage names of the expert matrices that are made; others are copied (None: all are
    made). provenance: metadata of the written shards (None: `made_by`). trust_unmarked: a shard
    without such metadata counts as done if its header is as planned.
    """
    source = mtp.without_dropped(source, quantizer.form.mtp)
    check_bundle(source, mtp.without_dropped(bundle, quantizer.form.mtp))
    if experts is None:  # repair moves foreign shards away itself
        check_strangers(bundle, "move it away: MLX loads every shard that it finds; or make repair")
    provenance = made_by(source, quantizer) if provenance is None else provenance
    planner = ShardPlanner(source, bundle, quantizer, experts, provenance, trust_unmarked)
    shards, done = {}, set()
    for file, shard in bundle.shards.items():
        shards[file], is_done = planner.plan_shard(shard)
        if is_done:
            done.add(file)
    todo = [file for file in part.select(list(shards)) if file not in done]
    for file in todo:
        check_samples(source, bundle.shards[file])
    planned = [shards[file] for file in todo]
    return ConversionPlan(source, quantizer, bundle.folder, list(shards.values()), planned, bundle)


@dataclass(frozen=True)
class ShardPlanner:
    """Plan the new shards of one bundle. The fields are as in `plan_from_bundle`."""

    source: Checkpoint
    bundle: Checkpoint
    quantizer: Quantizer
    experts: frozenset[str] | None
    provenance: dict[str, str]
    trust_unmarked: bool

    @cached_property
    def expert_units(self) -> list[ConversionUnit]:
        """The units of all routed experts; none if some experts are copied."""
        if self.experts is not None:
            return []
        units = conversion_units(self.source.tensors, self.quantizer.form)
        return [unit for unit in units if unit.treatment == "expert"]

    @cached_property
    def unit_of_tensor(self) -> dict[str, ConversionUnit]:
        """New tensor of a routed expert → its unit."""
        return {slot.name: unit for unit in self.expert_units for slot in unit.slots}

    @cached_property
    def new_units(self) -> dict[str, list[ConversionUnit]]:
        """File → units none of whose tensors has a counterpart of the same name in the bundle.

        They go into the file of the tensors that they replace. The first stack goes into the first
        shard, where jang_tools looks for it.
        """
        tensors, first_file = self.bundle.tensors, next(iter(self.bundle.shards))
        units: dict[str, list[ConversionUnit]] = {}
        for number, unit in enumerate(self.expert_units):
            if any(slot.name in tensors for slot in unit.slots):
                continue
            bases = [weight.name.removesuffix(".weight") for weight, _ in unit.stack] or [unit.base]
            names = [f"{base}.{part}" for base in bases for part in ("weight", "tq_packed")]
            names.append(f"{stack_base(unit.base)}.tq_packed")
            replaced = next((name for name in names if name in tensors), None)
            in_first = replaced is None or (unit.stack and number == 0)
            file = first_file if in_first else tensors[replaced].path.name
            units.setdefault(file, []).append(unit)
        return units

    def plan_shard(self, shard: Shard) -> tuple[PlannedShard, bool]:
        """Plan one shard. Return it, and whether the file on disk has its content already.

        Each tensor of the shard is copied, replaced or dropped; new units come last. Everything is
        made from the source when the bundle was or becomes lossless, and MTP when it was or becomes
        the source's. Otherwise no byte would tell whether a killed run had rewritten a weight or
        its scales already.
        """
        properties = quantizer_properties(shard.metadata.get("requantize_quantizer"))
        lossless = properties.keeps_source or self.quantizer.form.as_source
        everything = self.experts is None and lossless
        choices = self.quantizer.form.mtp, mtp.choice_of(shard.metadata.get("requantize_table"))
        all_mtp = self.experts is None and mtp.SOURCE in choices
        slots: list[TensorSpec] = []
        units: dict[str, ConversionUnit] = {}  # by the name of the weight
        unit_of: dict[str, ConversionUnit] = {}  # by the name of the new tensor
        for tensor in shard.tensors.values():
            if mtp.is_mtp(tensor.name) and choices[0] == mtp.DROPPED:
                continue
            anew = everything or (all_mtp and mtp.is_mtp(tensor.name))
            weight = self._weight_to_convert(tensor, anew)
            if weight is None:
                slots.append(TensorSpec(tensor.name, tensor.dtype, tensor.shape))
                continue
            unit = self.unit_of_tensor.get(tensor.name) or units.get(weight.name)
            unit = unit or self._unit(tensor, weight)
            if unit is not None:
                units[weight.name] = unit
                new = self._replacements(tensor, unit)
                slots += new
                unit_of.update({slot.name: unit for slot in new})
        for unit in self.new_units.get(shard.path.name, []):
            slots += unit.slots
            unit_of.update({slot.name: unit for slot in unit.slots})
        metadata = shard.metadata | {"format": "mlx"} | self.provenance
        if is_native(shard):
            slots.sort(key=lambda slot: self._source_order(slot, unit_of))
            metadata |= with_mlx_digest(self.quantizer) if everything else {}
        padded = header_dtypes(self.quantizer.form) if self.experts is None else {}
        layout = ShardLayout.of(slots, metadata, padded)
        converted = {unit_of[s.name].weight.name: unit_of[s.name] for s in layout.slots
                     if s.name in unit_of}  # fmt: skip
        copies = [shard.tensors[s.name] for s in layout.slots if s.name not in unit_of]
        planned = PlannedShard(shard.path.name, list(converted.values()), layout, copies)
        return planned, self._is_done(shard, planned, everything)

    def _weight_to_convert(self, tensor: Tensor, everything: bool) -> Tensor | None:
        """Return the source's weight that replaces a tensor of the bundle; None: it is copied."""
        base, _, part = tensor.name.rpartition(".")
        if stack := parse_stack(tensor.name):
            base = expert_base("layers", stack[0], 0, stack[1])
        in_module = part in PART_ORDER
        weight = self.source.tensors.get(f"{base}.weight" if in_module else tensor.name)
        if parse_expert(tensor.name) or stack:
            return weight if self.experts is None or base in self.experts else None
        if weight is None or everything or kind(weight.name) == "head":
            return weight
        return weight if is_control(tensor.name) else None

    def _unit(self, tensor: Tensor, weight: Tensor) -> ConversionUnit | None:
        """Return the unit of a tensor's weight, or None when the new tensors have other names."""
        stacked = self.quantizer.form.stacked and weight.name.startswith("layers.")
        if parse_stack(tensor.name) or (parse_expert(tensor.name) and stacked):
            return None
        scale = self.source.tensors.get(weight.name.removesuffix(".weight") + ".scale")
        return conversion_unit(weight, scale, self.quantizer.form)

    def _replacements(self, tensor: Tensor, unit: ConversionUnit) -> list[TensorSpec]:
        """Return the new tensors in place of one: none, that of its name, or also further ones.

        The unit's tensors that the bundle lacks come after its scales, or after its weight if it
        has no scales. Units of which the bundle has no tensor are in `new_units`.
        """
        present = self.bundle.tensors
        slots = [slot for slot in unit.slots if slot.name == tensor.name]
        is_new = not any(slot.name in present for slot in unit.slots)
        scales = f"{unit.base}.scales"
        if not is_new and tensor.name == (scales if scales in present else unit.weight.name):
            slots += [slot for slot in unit.slots if slot.name not in present]
        return slots

    def _source_order(
        self, slot: TensorSpec, unit_of: dict[str, ConversionUnit]
    ) -> tuple[str, int, str, int]:
        """Return the sort key that gives the order of `convert`, so that the bytes are the same."""
        base, _, part = slot.name.rpartition(".")
        weight = self.source.tensors.get(f"{base}.weight" if part in PART_ORDER else slot.name)
        if slot.name in unit_of:
            weight = unit_of[slot.name].weight
        if weight is None:
            return "", 0, slot.name, 0
        return weight.path.name, weight.offset, weight.name, PART_ORDER.get(part, 0)

    def _is_done(self, shard: Shard, planned: PlannedShard, everything: bool) -> bool:
        """Return True when the shard on disk has the planned tensors, in the planned format."""
        unmarked = not self.provenance.keys() & shard.metadata.keys()
        made = is_made_by(shard, self.provenance) or (self.trust_unmarked and unmarked)
        if contents(planned.layout.slots) != contents(shard.tensors.values()):
            return False
        changes = any(everything or unit.treatment == "expert" for unit in planned.units)
        return (not changes or is_copy(shard, self.source, self.quantizer)) or made


def contents(tensors: Iterable[TensorSpec | Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return sorted names, dtypes and shapes."""
    return sorted((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)


def is_native(shard: Shard) -> bool:
    """Return True for a shard that `convert` wrote."""
    return "convert_layout" in shard.metadata


def count_experts(plan: ConversionPlan) -> int:
    """Return the number of expert matrices that are quantized again."""
    units = [unit for shard in plan.todo for unit in shard.units if unit.treatment == "expert"]
    return sum({unit.weight.name: unit.number for unit in units}.values())


# --- Writing ------------------------------------------------------------------------------------


def replace_shards(plan: ConversionPlan, jobs: int) -> ErrorLog:
    """Write the plan's shards over the old ones. Raises UserError when the disk lacks room."""
    remedy = "free space on that volume, or use fewer --jobs"
    check_free_space(plan.folder, sum(plan.extra_disk(jobs)), "", remedy)
    return write_plan(plan, jobs, "requantize")


def complete(plan: ConversionPlan) -> bool:
    """Rebuild the index and the labels in config.json. Return True when either changed."""
    folder, bundle, form = plan.folder, plan.bundle, plan.quantizer.form
    changed = write_index(folder, {shard.file: shard.layout.slots for shard in plan.shards})
    config = dict(bundle.config)
    config.pop("quantization_config", None)
    slots = {slot.name: slot for shard in plan.shards for slot in shard.layout.slots}
    experts = {base: form.label(base) for base in expert_bases(plan.source)}
    config["quantization"] = labels.quantization(experts, slots)
    config[labels.RECORD] = quantizer_record(plan.quantizer)
    native = any(map(is_native, bundle.shards.values())) and (folder / JANG).is_file()
    turbo = labels.TURBO in (form.expert["mode"], config.get("weight_format"))
    if native or turbo:
        config = configs.replace_width_fields(config, form.expert)
        changed |= update_jang_config(folder / JANG, plan)
    changed |= write_sidecar(plan)
    for shard in plan.shards:
        if not shard.layout.slots:  # all its experts are in stacks now
            safe_paths.remove(folder, shard.file)
    if config != bundle.config:
        changed |= write_json(folder / "config.json", config)
    return changed


def update_jang_config(path: Path, plan: ConversionPlan) -> bool:
    """Write jang_config.json for the new format. Return True if it changed."""
    old = read_json(path) if path.is_file() else {}
    new = configs.updated_jang_config(old, plan.source, plan.quantizer.form)
    return old != new and write_json(path, new)


def write_sidecar(plan: ConversionPlan) -> bool:
    """Write TurboQuant's signs and codebooks, or remove that file from bundles in other formats.

    Returns True if it changed. The file is as jang_tools.build_jangtq_sidecar 2.5.50 writes it.
    """
    path = plan.folder / SIDECAR
    if not plan.quantizer.form.stacked:
        is_ours = path.is_file() and plan.bundle.config.get("weight_format") == "mxtq"
        if is_ours:
            safe_paths.remove(plan.folder, SIDECAR)
        return is_ours
    bases = expert_bases(plan.source)
    columns = {2 * plan.source.tensors[f"{base}.weight"].shape[1] for base in bases}
    return write_bytes(path, sidecar_bytes(columns), plan.folder)
