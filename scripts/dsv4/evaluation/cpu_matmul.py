"""Multiply float32 by packed matrices on a CPU: decode them and use NumPy's BLAS.

MLX's CPU kernels for packed matrices and attention are made for a few tokens. A pass in float32
replaces them, as its result does not depend on the kernel. Passes in the served dtype, and those on
a GPU, use MLX's kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from dsv4.quantization import fp4

ROWS = 16  # from so many rows on, decoding a matrix is faster

packed_product, gathered_product = mx.quantized_matmul, mx.gather_qmm
attention = mx.fast.scaled_dot_product_attention


@contextlib.contextmanager
def using_blas(wanted: bool) -> Iterator[None]:
    """Replace three functions of MLX by those below for a while, if `wanted`."""
    if wanted:
        mx.quantized_matmul, mx.gather_qmm = _packed, _gathered
        mx.fast.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        mx.quantized_matmul, mx.gather_qmm = packed_product, gathered_product
        mx.fast.scaled_dot_product_attention = attention


def on_cpu() -> bool:
    """Return True when MLX's default device is a CPU."""
    return mx.default_device().type == mx.cpu


def matmul(x: mx.array, matrix: mx.array) -> mx.array:
    """Multiply x (…, in) by a matrix (out, in), both float32; return (…, out)."""
    return mx.array(np.asarray(x) @ np.asarray(matrix).T) if on_cpu() else x @ matrix.T


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, **form: Any
) -> np.ndarray:
    """Decode packed matrices (…, out, packed) to float32 (…, out, in).

    form: bits, group_size and mode. Raises UserError for a NaN scale of FP4.
    """
    if form.get("mode") == "mxfp4":
        rows = [np.asarray(part).reshape(-1, part.shape[-1]) for part in (weight, scales)]
        values = fp4.decode(rows[0].view(np.int8), rows[1], "a matrix in FP4")
        return values.reshape(*weight.shape[:-1], -1)
    return np.asarray(mx.dequantize(weight, scales, biases, **form).astype(mx.float32))


def _packed(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None,
    transpose: bool = True, **form: Any,
) -> mx.array:  # fmt: skip
    """As mx.quantized_matmul."""
    if x.dtype != mx.float32 or not transpose or x.size < ROWS * x.shape[-1] * w.size // _size(w):
        return packed_product(x, w, scales, biases, transpose=transpose, **form)
    return mx.array(
        np.matmul(np.asarray(x), dequantize(w, scales, biases, **form).swapaxes(-1, -2))
    )


def _size(matrices: mx.array) -> int:
    return matrices.shape[-1] * matrices.shape[-2]


def _gathered(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None, *,
    rhs_indices: mx.array, transpose: bool = True, sorted_indices: bool = False, **form: Any,
) -> mx.array:  # fmt: skip
    """As mx.gather_qmm; rows (n, 1, in) that are sorted by expert, one matrix after another."""
    experts = np.asarray(rhs_indices)
    numbers, firsts = np.unique(experts, return_index=True)
    if not sorted_indices or x.dtype != mx.float32 or len(experts) < ROWS * len(numbers):
        return gathered_product(
            x, w, scales, biases, rhs_indices=rhs_indices, transpose=transpose,
            sorted_indices=sorted_indices, **form,
        )  # fmt: skip
    rows, out = np.asarray(x), np.empty((len(experts), 1, w.shape[-2]), np.float32)
    for number, first, last in zip(numbers, firsts, [*firsts[1:], len(experts)], strict=True):
        one = [part if part is None else part[int(number)] for part in (w, scales, biases)]
        np.matmul(rows[first:last, 0], dequantize(*one, **form).T, out=out[first:last, 0])
    return mx.array(out)


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None,
    sinks: mx.array | None = None, **more: Any,
) -> mx.array:  # fmt: skip
    """As mx.fast.scaled_dot_product_attention, head by head: q (batch, heads, rows, in)."""
    batch, heads, number, _ = q.shape
    if q.dtype != mx.float32 or not isinstance(mask, mx.array) or more or number < ROWS:
        return attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **more)
    shape = (batch, heads, number, k.shape[2])
    queries, keys, values = (np.asarray(part) for part in (q, k, v))
    masks = np.broadcast_to(np.asarray(mask), shape)
    out = np.empty((*shape[:3], v.shape[-1]), np.float32)
    for one, head in np.ndindex(batch, heads):
        pair = head * k.shape[1] // heads
        scores = (queries[one, head] * np.float32(scale)) @ keys[one, pair].T
        seen = masks[one, head]
        if seen.dtype == bool:
            scores[~seen] = -np.inf
        else:
            scores += seen
        sink = -np.inf if sinks is None else np.float32(sinks[head].item())
        top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
        np.exp(np.subtract(scores, top, out=scores), out=scores)
        whole = scores.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        np.divide(scores @ values[one, pair], whole, out=out[one, head])
    return mx.array(out)
