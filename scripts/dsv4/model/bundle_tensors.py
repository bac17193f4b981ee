"""Plan a bundle from the headers of its source.

For every tensor of the source the plan has its treatment, the tensors of the bundle that it becomes
(names, dtypes, shapes) and their shard. Only headers are needed, which the hub serves too. `make
check`, a dry run, the stages and verify use this one plan, so they agree about every byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4.errors import UserError
from dsv4.model import mtp
from dsv4.model.fp8_blocks import block_of
from dsv4.model.labels import DEFAULT, MXFP4, MXFP8, TURBO, parts_of
from dsv4.model.names import GROUP, kind, parse_expert, stack_base, stack_of, treatment
from dsv4.storage import limits
from dsv4.storage.safetensors_file import FLOATS, ShardLayout, Tensor, TensorSpec

SHARD_BYTES = 5_000_000_000  # the largest shard, unless another size is asked for
SCALE_DTYPES = ("F8_E8M0", "U8", "F32")  # of FP4 and FP8: powers of two
ENTRY_BYTES = 110  # what a tensor takes in a header at most, beside its name
TABLE = "scripts/dsv4/model/tensor_table.py"


@dataclass(frozen=True)
class StorageFormat:
    """How a bundle stores its numbers.

    expert: the label of the routed experts. mixture: other labels, by stack ("layers.3.down_proj")
    or by projection. as_source: all other tensors keep the source's numbers too: FP8 as mxfp8, BF16
    in F16. bfloats: the tensors that stay BF16 because F16 would change a value. Only values tell
    them, but both dtypes take the same bytes, so sizes are known from headers. mtp: a choice of
    mtp.py.
    """

    expert: dict[str, Any]
    as_source: bool = False
    bfloats: frozenset[str] = frozenset()
    mixture: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    mtp: str = mtp.AS_EXPERTS

    def keeps_mtp(self, name: str) -> bool:
        """Return True for a tensor of MTP that is kept as in the source."""
        return self.mtp == mtp.SOURCE and mtp.is_mtp(name)

    def label(self, base: str) -> dict[str, Any]:
        """Return the label of one routed-expert matrix, by its storage name."""
        if self.keeps_mtp(base):
            return MXFP4
        stack = stack_of(base)
        in_all = self.mixture.get(stack.rpartition(".")[2], self.expert)
        return self.mixture.get(stack, in_all)

    def description(self) -> str:
        """Return the formats of the routed experts as text."""
        forms = dict.fromkeys(
            f"{label['mode']} {label['bits']} bits"
            + f" in groups of {label['group_size']}" * (label["group_size"] != GROUP)
            for label in (self.mixture or {"": self.expert}).values()
        )
        return " and ".join(sorted(forms))

    @property
    def stacked(self) -> bool:
        """True when each part of a main layer's experts is one tensor, as vMLX reads TurboQuant."""
        return self.expert["mode"] == TURBO


@dataclass(frozen=True)
class ConversionUnit:
    """A weight of the source with its scale, and its tensors in the bundle, which share a shard.

    Of a stack of experts, `weight` and `scale` are those of expert 0, and `stack` has all of them.
    """

    treatment: str
    weight: Tensor
    scale: Tensor | None
    slots: tuple[TensorSpec, ...]
    stack: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def number(self) -> int:
        """The number of weights of the source."""
        return len(self.stack) or 1

    @property
    def base(self) -> str:
        """The storage name without the part."""
        return self.weight.name.removesuffix(".weight")

    @property
    def max_bytes(self) -> int:
        """An upper limit of the bytes in a shard, header entries included."""
        return sum(slot.nbytes + len(slot.name) + ENTRY_BYTES for slot in self.slots)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the source that it reads."""
        if self.stack:
            return [tensor for pair in self.stack for tensor in pair]
        return [self.weight] + ([self.scale] if self.scale else [])


@dataclass(frozen=True)
class PlannedShard:
    """One shard of the bundle: file name, units, and the offset of each tensor.

    copies: tensors of an older bundle's shard that are copied into this one.
    """

    file: str
    units: list[ConversionUnit]
    layout: ShardLayout
    copies: list[Tensor] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.layout.size

    @property
    def sources(self) -> set[str]:
        """The names of the source shards that it needs."""
        return {tensor.path.name for unit in self.units for tensor in unit.tensors}


def conversion_unit(weight: Tensor, scale: Tensor | None, form: StorageFormat) -> ConversionUnit:
    """Return the unit of one weight in a bundle of that format.

    Raises UserError for a name, dtype or shape that has no treatment.
    """
    what = known_treatment(weight)
    base = weight.name.removesuffix(".weight")
    exact = form.as_source or form.keeps_mtp(base)
    if what == "expert":
        out, half = weight.shape
        label = form.label(base)
        if 2 * half % label["group_size"]:
            raise UserError(f"{weight.path}: {weight.name}", f"{2 * half} columns",
                       f"whole groups of {label['group_size']}", "use smaller groups")  # fmt: skip
        parts = parts_of(label, out, 2 * half)
    elif exact and weight.dtype == "F8_E4M3":
        check_matrix(weight, scale)
        parts, what = parts_of(MXFP8, *weight.shape), "fp8"
    elif what == "matrix" and not exact:
        check_matrix(weight, scale)
        parts = parts_of(DEFAULT, *weight.shape)
    else:
        dtype = unquantized_dtype(weight, what, form)
        return ConversionUnit(what, weight, None, (TensorSpec(weight.name, dtype, weight.shape),))
    slots = tuple(TensorSpec(f"{base}.{part}", *of) for part, of in parts.items())
    return ConversionUnit(what, weight, scale, slots)


def group_stacks(units: list[ConversionUnit]) -> list[ConversionUnit]:
    """Gather every main layer's experts into stacks, each at the position of its first expert.

    The first stack is put first, because jang_tools 2.5.50 looks for one in the first shard only.
    """
    stacks: dict[str, list[ConversionUnit]] = {}
    for unit in units:
        at = stack_base(unit.base) if unit.treatment == "expert" else unit.base
        stacks.setdefault(at, []).append(unit)
    made = [
        stack_unit(at, members) if at != members[0].base else members[0]
        for at, members in stacks.items()
    ]
    return sorted(made, key=lambda unit: unit is not next((u for u in made if u.stack), None))


def stack_unit(at: str, members: list[ConversionUnit]) -> ConversionUnit:
    """Return one unit for a layer's experts, in the order of their numbers."""
    members = sorted(members, key=lambda unit: parse_expert(unit.weight.name) or ())
    slots = []
    for slot in members[0].slots:
        part = slot.name.rpartition(".")[2]
        dtype, shape = slot.dtype, (len(members), *slot.shape)
        if part == "tq_bits":  # one for all, and of another dtype than an expert's own
            dtype, shape = "U8", slot.shape
        slots.append(TensorSpec(f"{at}.{part}", dtype, shape))
    pairs = tuple((unit.weight, unit.scale) for unit in members)
    return ConversionUnit("expert", *pairs[0], tuple(slots), pairs)


def missing_weights(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the weights of the source that have no counterpart in a bundle's tensors."""
    return [name for name in names if name not in tensors and not _in_turbo(name, tensors)]


def _in_turbo(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return True for a routed expert whose codes of TurboQuant are in a bundle."""
    base = name.removesuffix(".weight")
    return parse_expert(name) is not None and f"{stack_base(base)}.tq_packed" in tensors


def known_treatment(tensor: Tensor) -> str:
    """Return a tensor's treatment. Raises UserError for a name that the table lacks."""
    what = treatment(tensor.name)
    if what is None:
        raise UserError(
            f"{tensor.path}: {tensor.name}", "a name that this recipe does not know",
            "the names of DeepSeek-V4",
            f"add a row to {TABLE}",
        )  # fmt: skip
    return what


def check_matrix(weight: Tensor, scale: Tensor | None) -> None:
    """Raise UserError for a matrix, or for FP8 a scale, that cannot be decoded."""
    where, shape = f"{weight.path}: {weight.name}", list(weight.shape)
    if weight.dtype not in ("F8_E4M3", *FLOATS):
        forms = f"F8_E4M3 or one of {', '.join(FLOATS)}"
        raise UserError(where, weight.dtype, forms, "see Converting in scripts/README.md")
    if len(shape) != 2 or shape[1] % GROUP or not shape[1]:
        todo = "this recipe quantizes rows of whole groups only"
        raise UserError(where, f"shape {shape}", f"two axes, columns in groups of {GROUP}", todo)
    if weight.dtype != "F8_E4M3":
        return
    found = "no scale" if scale is None else f"a scale {scale.dtype} {list(scale.shape)}"
    bytes_ = scale is not None and scale.dtype in SCALE_DTYPES
    if not bytes_ or block_of(weight.shape, scale.shape) is None:
        expected = f"F8_E8M0, one for each block of {shape}"
        raise UserError(where, found, expected, "fetch the source again")


def unquantized_dtype(tensor: Tensor, what: str, form: StorageFormat) -> str:
    """Return the dtype of a tensor that is not quantized. Raises UserError for 8-bit floats."""
    if tensor.dtype in FLOATS:
        if what == "control":
            return "F32"
        if what == "image":
            return tensor.dtype
        if form.as_source:
            kept = tensor.dtype != "BF16" or tensor.name in form.bfloats
        else:
            kept = what == "head" or form.keeps_mtp(tensor.name)
        return tensor.dtype if kept else "F16"
    if tensor.dtype[0] in "IU" and (form.as_source or what == "passthrough"):
        return tensor.dtype
    raise UserError(
        f"{tensor.path}: {tensor.name}", tensor.dtype, f"one of {', '.join(FLOATS)}",
        "fetch the source again",
    )  # fmt: skip


def conversion_units(tensors: Mapping[str, Tensor], form: StorageFormat) -> list[ConversionUnit]:
    """Return a unit for each weight in the source's order. Raises as `conversion_unit`."""
    ordered = sorted(tensors.values(), key=lambda t: (t.path.name, t.offset, t.name))
    units = []
    for tensor in ordered:
        if known_treatment(tensor) != "scale":
            scale = tensors.get(tensor.name.removesuffix(".weight") + ".scale")
            units.append(conversion_unit(tensor, scale, form))
    return group_stacks(units) if form.stacked else units


def plan_shards(
    tensors: Mapping[str, Tensor],
    form: StorageFormat,
    metadata: dict[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> list[PlannedShard]:
    """Return the bundle's shards, of at most `shard_bytes` each.

    A larger unit has a shard of its own. Raises UserError as `conversion_unit` does, and for more
    shards than a folder may have files.
    """
    groups: list[list[ConversionUnit]] = []
    room = 0
    for unit in conversion_units(tensors, form):
        if not groups or room + unit.max_bytes > shard_bytes:
            groups.append([])
            room = len(str(metadata)) + ENTRY_BYTES
        groups[-1].append(unit)
        room += unit.max_bytes
    if len(groups) > limits.FILES // 2:
        raise UserError("SHARD_BYTES", f"{shard_bytes:,} bytes, {len(groups):,} shards", "at most "
                   f"{limits.FILES // 2:,} shards", "choose larger ones; 5e9 is usual")  # fmt: skip
    return [
        PlannedShard(
            f"model-{i:05d}-of-{len(groups):05d}.safetensors",
            group,
            ShardLayout.of(
                (slot for unit in group for slot in unit.slots), metadata, header_dtypes(form)
            ),
        )
        for i, group in enumerate(groups, 1)
    ]


def header_dtypes(form: StorageFormat) -> dict[str, str]:
    """Return dtypes whose header entries are padded to another's length: sizes stay the same."""
    return {"F16": "BF16"} if form.as_source else {}


def weights_of(names: Iterable[str]) -> list[str]:
    """Return the names of weights: all names but those of scales."""
    return [name for name in names if kind(name) != "scale"]
