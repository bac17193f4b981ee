"""How far each form lies from a source's routed experts, stack by stack, from a sample of them.

EXPERTS of a layer's experts, evenly spaced, give WEIGHTS weights each, a run of whole rows that
begins at another place in each. What an imatrix says of the columns counts. Flash has 132 stacks:
0.3 GB are read of its 151.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dsv4.errors import UserError
from dsv4.model.labels import MXFP4
from dsv4.model.load import expert_bases
from dsv4.model.names import GROUP, stack_of
from dsv4.quantization import least_squares
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.imatrix import Importance, normalized
from dsv4.quantization.mixture_plan import label_by_name
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Tensor

EXPERTS = 4
WEIGHTS = 1 << 20
# From 4.25 bits on mxfp4 is exact: no wider affine form is better.
CHOICES = (
    "affine2g128", "affine2g64", "affine2g32", "affine3g128", "affine3g64", "affine3g32", "mxfp4"
)  # fmt: skip

Read = Callable[[Tensor, int, int], np.ndarray]  # (tensor, first byte, bytes) → uint8

Run = tuple[str, np.ndarray, np.ndarray, np.ndarray | None]


def sampled_tensors(source: Checkpoint) -> dict[str, list[str]]:
    """Stack → the storage names of those of its matrices that are looked at."""
    stacks: dict[str, list[str]] = {}
    for base in expert_bases(source):
        stacks.setdefault(stack_of(base), []).append(base)
    return {s: bases[:: max(1, len(bases) // EXPERTS)][:EXPERTS] for s, bases in stacks.items()}


def sample_errors(
    source: Checkpoint,
    read: Read,
    importance: Importance,
    jobs: int,
    progress: Callable[[int], object] = lambda done: None,
) -> dict[str, dict[str, float]]:
    """Stack → form → mean squared error relative to the mean square of the weights, both weighed
    by the importance of the columns. Only forms whose groups the columns are whole groups of.

    Raises UserError for a scale byte of 255 and for values beyond F16.
    """

    def measure(item: tuple[str, list[str]]) -> tuple[str, dict[str, float]]:
        stack, bases = item
        runs = [read_sample(source, read, base, i, importance) for i, base in enumerate(bases)]
        progress(1)
        return stack, {form: _relative(runs, form) for form in possible_formats(source, bases[0])}

    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(measure, sampled_tensors(source).items()))


def possible_formats(source: Checkpoint, base: str) -> list[str]:
    """The forms that a matrix can have: its columns are whole groups."""
    columns = 2 * source.tensors[f"{base}.weight"].shape[1]
    return [form for form in CHOICES if columns % label_by_name(form)["group_size"] == 0]


def read_sample(
    source: Checkpoint, read: Read, base: str, which: int, importance: Importance
) -> Run:
    """(storage name, codes, exponents, importance) of some rows, the arrays flat uint8."""
    weight, scale = source.tensors[f"{base}.weight"], source.tensors[f"{base}.scale"]
    out, half = weight.shape
    rows = min(out, max(1, WEIGHTS // (2 * half)))
    first = (out - rows) * which // max(1, EXPERTS - 1)
    codes = read(weight, first * half, rows * half)
    groups = 2 * half // GROUP
    exponents = read(scale, first * groups, rows * groups)
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
