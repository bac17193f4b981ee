"""Decode rows of a source tensor, and of modules stored without biases, to float32.

| mode   | codes | scale                                          |
|--------|-------|------------------------------------------------|
| mxfp4  | E2M1  | UE8M0, for 32 columns                          |
| mxfp8  | E4M3  | UE8M0, for 32 columns                          |
| nvfp4  | E2M1  | E4M3, for 16 columns                           |
| source | E2M1  | F32 or UE8M0, for 32 columns                   |
|        | E4M3  | F32 or UE8M0, for a block, as of 128 × 128     |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dsv4.model.fp8_blocks import block_of
from dsv4.model.labels import SOURCE
from dsv4.model.names import GROUP
from dsv4.quantization.fp4 import UE8M0, ue8m0_bytes
from dsv4.quantization.fp8 import E4M3
from dsv4.storage.safetensors_file import Tensor
from dsv4.storage.tensor_reader import TensorReader, as_float32
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.tasks import Task, TensorResult

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by the low three bits of a code
MAGNITUDES = {4: E2M1, 8: E4M3[:127].astype(np.float32)}


def source_rows(
    task: Task, reader: TensorReader, first: int, last: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (codes uint8, exponents uint8, values float32), flat, of rows `first` to `last` - 1.

    The exponents are those of the rows for FP4, all of the tensor's for FP8, and none for others.
    """
    origin, scale = task.origin, task.scale
    codes = reader.rows(origin, first, last)
    values = np.empty((last - first) * task.columns, np.float32)
    exponents = np.empty(0, np.uint8)
    if task.what == "expert":
        exponents = ue8m0_bytes(reader.rows(scale, first, last), scale)
        kernels.decode_fp4(codes, exponents, values)
    elif origin.dtype == "F8_E4M3":
        exponents = ue8m0_bytes(reader.read(scale), scale)
        powers = UE8M0[exponents].reshape(scale.shape)
        block = block_of(origin.shape, scale.shape)
        kernels.decode_fp8(codes, E4M3, powers, block, task.columns, first, values)
    else:
        values = as_float32(codes, origin.dtype)
    return codes, exponents, values


def source_blocks(
    task: Task, reader: TensorReader, weights: int, result: TensorResult
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (first row, row after the last, values float32, flat), of about `weights` weights each.

    Stops with a fault at rows that hold NaN or Inf.
    """
    out, rows = task.origin.shape[0], max(1, weights // task.columns)
    for first in range(0, out, rows):
        last = min(first + rows, out)
        _, exponents, values = source_rows(task, reader, first, last)
        if (exponents == 255).any() or not np.isfinite(values).all():
            result.add_fault("source-broken", f"rows from {first}", "NaN or Inf", "numbers")
            return
        yield first, last, values


def stored_rows(
    parts: Mapping[str, Tensor],
    label: Mapping[str, Any],
    columns: int,
    reader: TensorReader,
    first: int,
    last: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (codes uint8, one a weight; scales float32, one a group; columns of a group), flat."""
    bits, weight = label["bits"], reader.rows(parts["weight"], first, last)
    codes = weight
    if bits == 4:
        codes = np.empty(2 * len(weight), np.uint8)
        kernels.unpack(weight, 4, codes)
    if label["mode"] != SOURCE:
        data = reader.rows(parts["scales"], first, last)
        table = np.abs(E4M3).astype(np.float32) if label["mode"] == "nvfp4" else UE8M0
        return codes, table[data], label["group_size"]
    scale = parts["scale"]
    if bits == 4:
        return codes, scales_to_float32(reader.rows(scale, first, last), scale), GROUP
    blocks = scales_to_float32(reader.read(scale), scale).reshape(scale.shape)
    height, width = block_of(parts["weight"].shape, scale.shape)
    rows, groups = np.arange(first, last) // height, np.arange(columns // GROUP)
    return codes, blocks[rows[:, None], groups * GROUP // width].reshape(-1), GROUP


def scales_to_float32(data: np.ndarray, scale: Tensor) -> np.ndarray:
    """Return scales, F32 or UE8M0, as float32."""
    return as_float32(data, "F32") if scale.dtype == "F32" else UE8M0[data]
