"""Pair each source tensor with its counterpart in the bundle: `Task` and `TensorResult`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.model.bundle_tensors import SCALE_DTYPES
from dsv4.model.fp8_blocks import block_of
from dsv4.model.names import GROUP, expert_base, kind, parse_expert
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.limits import COLUMNS
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.verification.checks.stored_formats import label_from_parts, module_parts, shape_of
from dsv4.verification.numbers.pruned import Kept
from dsv4.verification.scan import Scan


@dataclass
class TensorResult:
    """Result of level 2 for one tensor.

    what: expert, module, control or passthrough; how: the storage format. energy, error: sums of
    squares of the weights and of their errors. exact, explained, wrong: groups that equal the
    quantizer's bytes, that another device explains, and others; fragile: groups that another
    device may round differently; recomputed: the recorded quantizer's bytes were compared, not
    MLX's formula. faults: (name, where, found, expected); `report_groups` in aggregate.py decides
    about wrong_places and explained_places. promised: faults by name that are none unless the
    groups follow MLX's formula. steps: sum of the mean square errors, in steps of the source's
    range, of `measured` groups, those of blocks with a wrong group; products: their sums of the
    source's squares, of the bundle's and of their products. worst: the largest error in steps, at
    worst_at; an upper bound if worst_at is empty. disk: the tensor's name in the bundle, if it is
    another. lossless: groups that decode to the source's own values.
    """

    name: str
    what: str
    how: str
    numbers: int = 0
    groups: int = 0
    exact: int = 0
    fragile: int = 0
    explained: int = 0
    wrong: int = 0
    energy: float = 0.0
    error: float = 0.0
    worst: float = 0.0
    worst_at: str = ""
    zeros: int = 0
    zeros_lost: int = 0
    recomputed: bool = False
    disk: str = ""
    lossless: int = 0
    faults: list[tuple[str, str, str, str]] = field(default_factory=list)
    wrong_places: list[tuple[str, str, str]] = field(default_factory=list)
    explained_places: list[tuple[str, str, str]] = field(default_factory=list)
    promised: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)
    steps: float = 0.0
    measured: int = 0
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def relative(self) -> float:
        """RMS of the error relative to the RMS of the weights."""
        return float(np.sqrt(self.error / self.energy)) if self.energy else 0.0

    @property
    def correlation(self) -> float:
        """Cosine of the angle between the source's weights and the bundle's; 1 without weights."""
        given, made, both = self.products
        return both / float(np.sqrt(given * made)) if given * made else float(given == made)

    def add_fault(self, name: str, where: str, found: str, expected: str) -> None:
        """Add one fault of this tensor."""
        self.faults.append(self._fault(name, where, found, expected))

    def add_promised(self, name: str, where: str, found: str, expected: str) -> None:
        """Add a fault unless the tool promised nothing; the first of each name counts."""
        self.promised.setdefault(name, self._fault(name, where, found, expected))

    def _fault(self, name: str, where: str, found: str, expected: str) -> tuple[str, str, str, str]:
        return name, f"{self.display_name}: {where}", found, expected

    @property
    def display_name(self) -> str:
        """Its name, and in parentheses the name on disk if it is another."""
        return f"{self.name} ({self.disk})" if self.disk else self.name


@dataclass(frozen=True)
class Task:
    """One source tensor, its scale, and its counterpart in the bundle.

    parts: the bundle's tensors by suffix; what: as in `TensorResult`; label: how the parts store
    the values, None for unquantized ones.
    """

    origin: Tensor
    scale: Tensor | None
    parts: dict[str, Tensor]
    what: str
    label: dict[str, Any] | None

    @property
    def base(self) -> str:
        """The storage name without `.weight`."""
        return self.origin.name.removesuffix(".weight")

    @property
    def main(self) -> Tensor:
        """The tensor that holds the values or codes."""
        return self.parts.get("weight") or self.parts["tq_packed"]

    @property
    def columns(self) -> int:
        """Columns of the decoded matrix."""
        return self.origin.shape[-1] * (2 if self.what == "expert" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.nbytes for part in self.parts.values())


def is_decodable(source: Checkpoint, origin: Tensor) -> bool:
    """Return whether a source tensor can be decoded row by row: its scale, if any, fits it."""
    scale = source.tensors.get(f"{origin.name.removesuffix('.weight')}.scale")
    if scale is None:
        return origin.dtype != "F8_E4M3"
    if len(origin.shape) != 2 or not 0 < origin.shape[1] <= COLUMNS:
        return False
    out, columns = origin.shape
    if origin.dtype == "I8":
        fits = scale.shape == (out, 2 * columns // GROUP)
    else:
        fits = block_of(origin.shape, scale.shape) is not None
    return fits and scale.dtype in SCALE_DTYPES


def make_tasks(bundle: Scan, source: Checkpoint, kept: Kept) -> list[Task]:
    """Return a task for each source tensor with a complete counterpart; level 1 reported others.

    kept: the experts of pruned layers, as `kept_experts` returns them.
    """
    tasks = []
    for name, origin in source.tensors.items():
        renumbered = name_in_bundle(name, kept)
        task = make_task(bundle, source, renumbered, origin) if renumbered else None
        tasks += [task] if task else []
    return tasks


def name_in_bundle(name: str, kept: Kept) -> str | None:
    """Return the bundle's name of a source tensor: pruned layers renumber their experts.

    None for an expert that the bundle left out.
    """
    expert = parse_expert(name)
    if expert is None or f"{expert[0]}.{expert[1]}" not in kept:
        return name
    block, layer, number, matrix, part = expert
    numbers = kept[f"{block}.{layer}"] or []
    if number not in numbers:
        return None
    return f"{expert_base(block, layer, numbers.index(number), matrix)}.{part}"


def make_task(bundle: Scan, source: Checkpoint, name: str, origin: Tensor) -> Task | None:
    """Return the task of a source tensor, named `name` in the bundle; None if they do not fit."""
    what = kind(name)
    if what == "scale" or not is_decodable(source, origin):
        return None
    base = name.removesuffix(".weight")
    scale = source.tensors.get(f"{origin.name.removesuffix('.weight')}.scale")
    what = {"matrix": "module", "head": "module", "image": "passthrough"}.get(what, what)
    parts = module_parts(bundle, base) if what in ("expert", "module") else {}
    if name in bundle.tensors:
        parts.setdefault("weight", bundle.tensors[name])
    columns = origin.shape[-1] * (2 if what == "expert" else 1) if origin.shape else 0
    label = label_from_parts(parts, columns) if what in ("expert", "module") else None
    fit = parts and is_comparable(origin, parts, what, label, columns, bundle.is_ours)
    return Task(origin, scale, parts, what, label) if fit else None


def is_comparable(
    origin: Tensor,
    parts: dict[str, Tensor],
    what: str,
    label: dict[str, Any] | None,
    columns: int,
    ours: bool,
) -> bool:
    """Return whether the parts can be compared with the source tensor, row by row."""
    if label is not None:
        tensor = parts.get("weight") or parts["tq_packed"]
        is_matrix = len(origin.shape) == 2 and columns <= COLUMNS
        return is_matrix and shape_of(tensor, label, columns) == (origin.shape[0], columns)
    if len(parts) > 1:
        return False
    tensor = parts["weight"]
    if what in ("expert", "module") and (tensor.dtype not in FLOATS or (ours and what == "expert")):
        return False
    return tensor.shape == (*origin.shape[:-1], columns) if origin.shape else not tensor.shape
