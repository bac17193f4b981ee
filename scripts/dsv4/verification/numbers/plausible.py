"""Find matrices of a bundle that cannot be weights by samples of their rows, without its source."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv4.model.labels import TURBO
from dsv4.model.names import columns_of, parse_expert
from dsv4.model.tensor_table import row_of
from dsv4.quantization.weight_samples import EXPERTS, Sample, unlike_their_kind
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.storage.tensor_reader import TensorReader, as_float32
from dsv4.verification.checks.stored_formats import label_at, module_parts, shape_of
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import MAGNITUDES, stored_rows
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

ROWS = 5  # of each sampled matrix
MATRICES = ("expert", "matrix", "head", "image")  # treatments


class RowReader(TensorReader):
    """Reads rows alone, and nothing ahead of them."""

    def rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        """Return rows `first` to `last` - 1 as bytes."""
        row = tensor.nbytes // tensor.shape[0]
        return self.read(tensor, first * row, (last - first) * row)


def check_plausible(bundle: Scan, findings: Findings) -> Check:
    """Report matrices that are constant, or a hundred times larger or smaller than their kind."""
    kinds: dict[str, list[Sample]] = defaultdict(list)
    expected = "values of weights"
    with contextlib.closing(RowReader()) as reader:
        for base in sampled_bases(bundle):
            sample = sample_module(bundle, base, reader)
            if sample is None:
                continue
            kinds[row_of(f"{base}.weight").name].append(sample)
            if sample.constant and base not in ("embed", "head"):
                findings.add("weights-implausible", base, "one value in all samples", expected)
    for samples in kinds.values():
        for fault in unlike_their_kind(samples):
            base, _, found = fault.partition(": ")
            findings.add("weights-implausible", base, found, expected)
    number = sum(map(len, kinds.values()))
    return Check("matrices with values of weights, by samples", number, optional=True)


def sampled_bases(bundle: Scan) -> Iterator[str]:
    """Yield the storage names of matrices, of routed experts the first EXPERTS of a layer."""
    for name in bundle.tensors:
        base, _, part = name.rpartition(".")
        row, expert = row_of(f"{base}.weight"), parse_expert(name)
        main = part in ("weight", "tq_packed") and row is not None and row.treatment in MATRICES
        if main and (expert is None or expert[2] < EXPERTS):
            yield base


def sample_module(bundle: Scan, base: str, reader: RowReader) -> Sample | None:
    """Sample a matrix by some of its rows; None for one whose parts fit no label."""
    label, parts = label_at(bundle, base), module_parts(bundle, base)
    main = parts.get("weight") or parts["tq_packed"]
    if len(main.shape) != 2 or not main.nbytes or (label is None and main.dtype not in FLOATS):
        return None
    columns = shape_of(main, label, columns_of(base, bundle.config))[1] if label else main.shape[1]
    numbers = np.unique(np.linspace(0, main.shape[0] - 1, ROWS).astype(int))
    rows = [decode_row(parts, label, columns, reader, int(n)) for n in numbers]
    values = np.concatenate(rows)
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return None
    constant = bool(values.min() == values.max()) and len(values) > 1
    if label and label["mode"] == TURBO:  # a row's length is all that is sampled
        constant = not values.any()
        values /= np.sqrt(columns)
    return Sample(base, float(np.sqrt(np.square(values).mean())), constant, on_grid=False)


def decode_row(
    parts: dict[str, Tensor],
    label: dict[str, Any] | None,
    columns: int,
    reader: RowReader,
    row: int,
) -> np.ndarray:
    """Return one row of a matrix, float32; of TurboQuant its length."""
    read = {part: reader.rows(tensor, row, row + 1) for part, tensor in parts.items()
            if tensor.shape and row < tensor.shape[0]}  # fmt: skip
    if label is None:
        return as_float32(read["weight"], parts["weight"].dtype)
    if label["mode"] == TURBO:
        return as_float32(read["tq_norms"], parts["tq_norms"].dtype)
    if label["mode"] == "affine":
        levels = np.empty(columns, np.uint8)
        kernels.unpack(read["weight"], label["bits"], levels)
        scales, biases = (as_float32(read[p], parts[p].dtype) for p in ("scales", "biases"))
        groups = levels.reshape(len(scales), -1)
        return (groups * scales[:, None] + biases[:, None]).reshape(-1)
    codes, scales, group = stored_rows(parts, label, columns, reader, row, row + 1)
    table = MAGNITUDES[label["bits"]]
    magnitudes = table[np.minimum(codes & ((1 << (label["bits"] - 1)) - 1), len(table) - 1)]
    signs = np.where(codes >> (label["bits"] - 1), -1, 1)
    return signs * magnitudes * np.repeat(scales, group)
