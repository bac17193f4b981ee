"""Measure the error of each format on a sample of a source's routed experts, stack by stack.

The sample has EXPERTS experts of a layer, evenly spaced. Of each it has whole rows, about WEIGHTS
weights, from another first row on. Errors are weighted by the imatrix. Flash has
132 stacks: 0.3 GB of its 151 are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dsv4.errors import UserError
from dsv4.model import mtp
from dsv4.model.labels import MXFP4
from dsv4.model.names import GROUP, stack_of
from dsv4.quantization import least_squares
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.fp4 import ue8m0_bytes
from dsv4.quantization.imatrix import Importance, normalized
from dsv4.quantization.mixture_plan import label_by_name, planned_bases
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import ITEMSIZE, Tensor

EXPERTS = 4
WEIGHTS = 1 << 20
# mxfp4 is exact with 4.25 bits, so wider affine formats are not tried.
CHOICES = (
    "affine2g128", "affine2g64", "affine2g32", "affine3g128", "affine3g64", "affine3g32", "mxfp4"
)  # fmt: skip

Read = Callable[[Tensor, int, int], np.ndarray]  # (tensor, first byte, bytes) → uint8

Run = tuple[str, np.ndarray, np.ndarray, np.ndarray | None]


def sampled_tensors(source: Checkpoint, choice: str = mtp.AS_EXPERTS) -> dict[str, list[str]]:
    """Return stack → the storage names of its matrices in the sample.

    choice: how MTP is stored (model/mtp.py).
    """
    stacks: dict[str, list[str]] = {}
    for base in planned_bases(source, choice):
        stacks.setdefault(stack_of(base), []).append(base)
    return {s: bases[:: max(1, len(bases) // EXPERTS)][:EXPERTS] for s, bases in stacks.items()}


def sample_errors(
    source: Checkpoint,
    read: Read,
    importance: Importance,
    jobs: int,
    stacks: Mapping[str, list[str]],
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, dict[str, float]]:
    """Return stack → format → relative squared error, for the formats that the columns allow.

    stacks: as `sampled_tensors` returns them. The error is the mean squared error over the mean
    square of the weights, both weighted by the importance of the columns. Raises UserError for a
    scale byte of 255 and for values beyond F16.
    """

    def measure(item: tuple[str, list[str]]) -> tuple[str, dict[str, float]]:
        stack, bases = item
        runs = [read_sample(source, read, base, i, importance) for i, base in enumerate(bases)]
        progress(1)
        return stack, {form: _relative(runs, form) for form in possible_formats(source, bases[0])}

    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(measure, stacks.items()))


def possible_formats(source: Checkpoint, base: str) -> list[str]:
    """Return the formats with groups that divide the matrix' columns."""
    columns = 2 * source.tensors[f"{base}.weight"].shape[1]
    return [form for form in CHOICES if columns % label_by_name(form)["group_size"] == 0]


def read_sample(
    source: Checkpoint, read: Read, base: str, which: int, importance: Importance
) -> Run:
    """Read some rows: (storage name, codes, exponents, importance), codes and exponents flat uint8.

    which: the matrix' index in the sample.
    """
    weight, scale = source.tensors[f"{base}.weight"], source.tensors[f"{base}.scale"]
    out, half = weight.shape
    rows = min(out, max(1, WEIGHTS // (2 * half)))
    first = (out - rows) * which // max(1, EXPERTS - 1)
    codes = read(weight, first * half, rows * half)
    groups = 2 * half // GROUP
    size = ITEMSIZE[scale.dtype]
    exponents = ue8m0_bytes(read(scale, first * groups * size, rows * groups * size), scale)
    columns = importance.columns.get(base)
    return base, codes, exponents, None if columns is None else normalized(columns, base)


def _relative(runs: list[Run], form: str) -> float:
    label, energy, error = label_by_name(form), 0.0, 0.0
    if label == MXFP4:
        return 0.0
    for base, codes, exponents, importance in runs:
        groups = 2 * len(codes) // label["group_size"]
        parts = (
            np.empty(2 * len(codes) * label["bits"] // 8, np.uint8),
            np.empty(groups, np.uint16), np.empty(groups, np.uint16),
        )  # fmt: skip
        try:
            found = least_squares.quantize(
                codes, exponents, importance, (label["bits"], label["group_size"]), parts
            )
        except BadGroup as bad:
            raise UserError(base, bad.found, bad.expected, "fetch the source again") from bad
        energy += found.energy
        error += found.error
    return error / energy if energy else 0.0
