"""Plan a mixture for a size: choose each layer's expert formats with the least error.

The error of a layer is the sum of its three projections' mean squared errors. Each is relative to
the mean square of its weights, and weighted by the imatrix if there is one. All main layers count
the same. MTP layers do not count, because no server computes with them. An error of weights does
not show how much a layer matters to the model. The choice itself is exact (knapsack.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.conversion.recorded_format import RecordedFormat, quantizer_for
from dsv4.conversion.shard_metadata import converted_by
from dsv4.errors import UserError
from dsv4.model import mtp
from dsv4.model.bundle_tensors import PlannedShard, conversion_units, plan_shards
from dsv4.model.labels import parts_of
from dsv4.model.load import expert_bases
from dsv4.model.names import PROJECTION, stack_of
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.quantization import knapsack
from dsv4.quantization.error_sampling import CHOICES
from dsv4.quantization.formats import Quantizer, QuantizerOptions, get_quantizer
from dsv4.quantization.imatrix import EVEN
from dsv4.quantization.mixture_plan import label_by_name
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Tensor, TensorSpec

PROJECTIONS = tuple(PROJECTION.values())  # gate, down, up
# The shapes of a layer for which vMLX 1.6.81 has fused Metal kernels (affine_moe_decode), and the
# source's own numbers, in the order of PROJECTIONS.
FUSED = (
    ("affine2g64", "affine2g32", "affine2g64"),
    ("affine3g64", "affine2g32", "affine2g64"),
)
EXACT = ("mxfp4",) * 3
MARGIN = 16  # bytes by which a header entry may be longer than in another plan

Errors = Mapping[str, Mapping[str, float]]  # stack → form → relative squared error
Forms = dict[str, str]  # stack → form


@dataclass(frozen=True)
class SizeFit:
    """A plan for a size.

    forms: by stack. nbytes: of the bundle. error: the sum of the main layers' errors. least: that
    sum without the preference for fused shapes.
    """

    forms: Forms
    nbytes: int
    error: float
    least: float


class SizePlanner:
    """Choose the formats of one source's experts by size and error."""

    def __init__(
        self,
        source: Checkpoint,
        errors: Errors,
        shard_bytes: int,
        name: str = "mixture",
        choice: str = mtp.AS_EXPERTS,
    ) -> None:
        """name: of the quantizer, which determines the format of all other tensors.

        choice: how MTP is stored (model/mtp.py).
        """
        self._source, self._errors, self._shard_bytes = source, errors, shard_bytes
        self._name, self._mtp = name, choice
        self._bytes = stack_bytes(source, errors)
        self._layers = list(dict.fromkeys(stack.rpartition(".")[0] for stack in errors))
        cheap = {stack: min(sizes, key=sizes.get) for stack, sizes in self._bytes.items()}
        number = 3 * len(expert_bases(source))
        # The bytes of everything but the experts, and of the headers with some margin.
        self._rest = self.nbytes(cheap) + MARGIN * number - self._experts(cheap)
        self.smallest = self._rest + self._experts(cheap)

    def nbytes(self, forms: Forms) -> int:
        """Return the exact bytes of a bundle's shards."""
        labels = {stack: label_by_name(form) for stack, form in forms.items()}
        quantizer = get_quantizer(self._name, EVEN, labels, self._mtp)
        shards = shards_of(self._source.tensors, quantizer, self._shard_bytes)
        return sum(shard.size for shard in shards)

    def _experts(self, forms: Forms) -> int:
        return sum(self._bytes[stack][form] for stack, form in forms.items())

    def fit(self, size: int, any_shape: bool = False) -> SizeFit:
        """Return the plan of at most `size` bytes with the least error.

        Where the size allows, each layer has a fused shape or is exact, unless any_shape is set.
        Raises UserError, with the least possible size, when there is no such plan.
        """
        if size < self.smallest:
            raise UserError(
                f"a bundle of {format_bytes(size)}", f"{format_bytes(self.smallest)} at least",
                "a size that can be reached", "ask for a larger one",
            )  # fmt: skip
        best = self._choose(size, False)
        fused = None if any_shape else self._choose(size, True)
        forms = fused or best
        return SizeFit(forms, self.nbytes(forms), self.error(forms), self.error(best))

    def error(self, forms: Forms) -> float:
        """Return the sum of errors of the main layers."""
        return sum(self._errors[s][form] for s, form in forms.items() if s.startswith("layers."))

    def _choose(self, size: int, fused: bool) -> Forms | None:
        shapes = {layer: self._shapes(layer, fused) for layer in self._layers}
        if not all(shapes.values()):
            return None
        items = [[self._option(layer, shape) for shape in of] for layer, of in shapes.items()]
        if knapsack.min_size(items) > size - self._rest:
            return None
        picks = zip(shapes.items(), knapsack.choose(items, size - self._rest), strict=True)
        return {
            f"{layer}.{projection}": form
            for (layer, of), pick in picks
            for projection, form in zip(PROJECTIONS, of[pick], strict=True)
        }

    def _shapes(self, layer: str, fused: bool) -> list[tuple[str, ...]]:
        """Return the possible shapes of a layer: a format for each of PROJECTIONS."""
        forms = [list(self._errors[f"{layer}.{projection}"]) for projection in PROJECTIONS]
        wanted = (*FUSED, EXACT) if fused else itertools.product(*forms)
        return [s for s in wanted if all(f in of for f, of in zip(s, forms, strict=True))]

    def _option(self, layer: str, shape: tuple[str, ...]) -> knapsack.Option:
        stacks = {f"{layer}.{p}": form for p, form in zip(PROJECTIONS, shape, strict=True)}
        return self._experts(stacks), self.error(stacks)


def stack_bytes(source: Checkpoint, errors: Errors) -> dict[str, dict[str, int]]:
    """Return stack → form → bytes of all its experts' parts."""
    sizes = {stack: dict.fromkeys(forms, 0) for stack, forms in errors.items()}
    for base in expert_bases(source):
        out, half = source.tensors[f"{base}.weight"].shape
        by_form = sizes.get(stack_of(base), {})
        for form in by_form:
            parts = parts_of(label_by_name(form), out, 2 * half).values()
            by_form[form] += sum(TensorSpec("", *part).nbytes for part in parts)
    return sizes


def plan_document(fit: SizeFit, errors: Errors, head: dict[str, Any]) -> dict[str, Any]:
    """Return the plan as a file holds it. head: the settings, and how errors were measured."""
    experts: dict[str, dict[str, str]] = {}
    for stack, form in fit.forms.items():
        layer, _, projection = stack.rpartition(".")
        experts.setdefault(layer, {})[projection] = form
    return head | {"bytes": fit.nbytes, "experts": experts, "squared_errors": errors}


def describe_fit(fit: SizeFit) -> str:
    """Return the plan as text."""
    main = {stack: form for stack, form in fit.forms.items() if stack.startswith("layers.")}
    forms = Counter(main.values())
    rms = (fit.error / max(1, len(main))) ** 0.5
    lines = [
        f"size: {format_bytes(fit.nbytes)}, of the least error that this size can have",
        "stacks of experts: " + ", ".join(f"{n} {form}" for form, n in sorted(forms.items())),
        f"relative RMS error of the main layers: {rms:.1%}",
    ]
    layers = [tuple(main[f"{layer}.{p}"] for p in PROJECTIONS)
              for layer in dict.fromkeys(stack.rpartition(".")[0] for stack in main)]  # fmt: skip
    if fused := sum(shape in FUSED for shape in layers):
        least = (fit.least / max(1, len(main))) ** 0.5
        lines[0] = f"size: {format_bytes(fit.nbytes)}"
        lines.append(
            f"{fused} of {len(layers)} layers in a shape for which vMLX has fused kernels; without "
            f"that the error could be {least:.1%}: --any-shape"
        )
    return "\n".join(lines)


def shards_of(
    tensors: Mapping[str, Tensor], quantizer: Quantizer, shard_bytes: int
) -> list[PlannedShard]:
    """Return a bundle's shards with their exact sizes. No data of the source is read."""
    return plan_shards(tensors, quantizer.form, converted_by(None, quantizer), shard_bytes)


def uniform(name: str, form: str, choice: str) -> Quantizer:
    """Return the quantizer of a mixture whose stacks all have one format."""
    return get_quantizer(name, EVEN, dict.fromkeys(PROJECTIONS, label_by_name(form)), choice)


def unloaded_bytes(source: Checkpoint, name: str, choice: str) -> int:
    """Return the bytes of MTP in a mixture, which no server loads; as-experts: the least."""
    units = conversion_units(source.tensors, uniform(name, CHOICES[0], choice).form)
    return mtp.unloaded_bytes(slot for unit in units for slot in unit.slots)


def planned_shards(
    source: Checkpoint,
    options: QuantizerOptions,
    recorded: RecordedFormat | None,
    shard_bytes: int,
    size: int | None,
) -> tuple[list[PlannedShard], int]:
    """Return the shards of a bundle with resolved options, and 0. source: without dropped MTP.

    Before the file of a mixture plan exists, return the smallest shards that it can have, and the
    bytes that it may take. size: the bundle's bytes that were asked for, if any. recorded: see
    `read_recorded_format`. Raises UserError as `quantizer_for` and `plan_shards` do.
    """

    def shards(quantizer: Quantizer) -> list[PlannedShard]:
        return shards_of(source.tensors, quantizer, shard_bytes)

    needs_plan = quantizer_properties(options.name).needs_plan
    if needs_plan and size is not None and not options.plan.is_file():
        least, most = (uniform(options.name, CHOICES[i], options.mtp) for i in (0, -1))
        return shards(least), max(1, min(size, sum(shard.size for shard in shards(most))))
    if options.imatrix or options.plan:
        return shards(quantizer_for(options, source, recorded)[0]), 0
    stacks = recorded.stacks if recorded and recorded.name == options.name else None
    return shards(get_quantizer(options.name, EVEN, stacks, options.mtp)), 0
