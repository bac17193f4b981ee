"""Quantize all tensors except the routed experts: matrices to 8-bit affine, the others to F16.

A matrix is FP8 with a scale for each block, or BF16, F16 or F32. It is decoded to float32
some rows at a time and quantized by `mx.quantize` on MLX's CPU backend, so that every machine
writes the same bytes. Scales and biases are rounded to F16, as upstream's converter does
(jang_tools.dsv4.convert_dsv4_jangtq, convert, 2.5.9).
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dsv4.errors import UserError
from dsv4.model.fp8_blocks import block_of
from dsv4.model.labels import DEFAULT, parts_of
from dsv4.model.names import GROUP
from dsv4.quantization import fp8
from dsv4.quantization.source_reader import read_bytes, read_scales
from dsv4.storage.safetensors_file import ITEMSIZE, NUMPY_DTYPE, Tensor, TensorSpec
from dsv4.storage.shard_writer import Blocks, WorkerBuffers
from dsv4.storage.tensor_reader import as_float32

PIECE_ELEMENTS = 1 << 20  # decoded at a time: 4 MB of float32

_one_at_a_time = threading.Lock()  # MLX has one CPU stream; it is not used from two threads


def quantize(values: np.ndarray) -> dict[str, np.ndarray]:
    """Quantize float32 (rows, columns) to weight uint32, scales and biases float16.

    A scale or bias beyond F16 becomes infinity. The caller must check for it.
    """
    import mlx.core as mx  # here, because importing it takes longer than most runs' planning

    with _one_at_a_time:
        quantized = mx.quantize(mx.array(values), **DEFAULT, stream=mx.cpu)
        mx.eval(*quantized)
        weight, scales, biases = (np.array(part) for part in quantized)
    with np.errstate(over="ignore"):
        return {
            "weight": weight,
            "scales": scales.astype(np.float16),
            "biases": biases.astype(np.float16),
        }


def digest() -> str:
    """Return 16 hex digits that change if the installed MLX quantizes to 8 bits differently.

    The input is 2,048 groups of a fixed sequence, of magnitude 2^-16 to 2^15, some one-sided.
    """
    steps = np.arange(2048 * GROUP, dtype=np.int64)
    values = (steps * 2654435761 % 2**32 / 2**31 - 1).astype(np.float32).reshape(2048, -1)
    values[::7] = np.abs(values[::7])
    values[3::7] = -np.abs(values[3::7])
    values *= np.exp2(np.arange(2048) % 32 - 16).astype(np.float32)[:, None]
    parts = quantize(values.reshape(512, -1))
    return hashlib.sha256(b"".join(part.tobytes() for part in parts.values())).hexdigest()[:16]


@dataclass(frozen=True)
class MatrixPiece:
    """Rows `first` to `last` - 1 of one matrix; `first` begins a block of FP8."""

    weight: Tensor
    scale: Tensor | None
    first: int
    last: int
    places: dict[str, int]  # part → where its row 0 lies in the new shard

    @cached_property
    def _row_bytes(self) -> dict[str, int]:
        out, columns = self.weight.shape
        parts = parts_of(DEFAULT, out, columns)
        return {part: TensorSpec("", *of).nbytes // out for part, of in parts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return (self.last - self.first) * sum(self._row_bytes[part] for part in self.places)

    def decode(self, desk: WorkerBuffers) -> np.ndarray:
        """Read the rows as float32 (rows, columns). Raises UserError for a NaN or an infinity."""
        rows, columns = self.last - self.first, self.weight.shape[1]
        stride = columns * ITEMSIZE[self.weight.dtype]
        data = read_bytes(desk, self.weight, self.first * stride, rows * stride, "codes")
        if self.scale is None:
            values = as_float32(data, self.weight.dtype).reshape(rows, columns)
        else:
            values = fp8.decode(data.reshape(rows, columns), self._scales(desk), self.scale.name)
        self._check_finite(values.min(), values.max(), "a NaN or an infinity in the source")
        return values

    def _scales(self, desk: WorkerBuffers) -> np.ndarray:
        """Read the scale bytes of these rows' blocks, uint8 (rows, columns) of blocks."""
        height, _ = block_of(self.weight.shape, self.scale.shape)
        first, last = self.first // height, -(-self.last // height)
        blocks = self.scale.shape[1]
        data = read_scales(desk, self.scale, first * blocks, (last - first) * blocks)
        return data.reshape(last - first, blocks)

    def blocks(self, desk: WorkerBuffers) -> Blocks:
        """Decode and quantize the rows, and yield the three parts."""
        parts = quantize(self.decode(desk))
        with np.errstate(over="ignore"):
            largest = [np.abs(parts[part]).max() for part in ("scales", "biases")]
        self._check_finite(*largest, "values too large for an F16 scale or bias")
        for part, place in self.places.items():
            yield place + self.first * self._row_bytes[part], parts[part]

    def _check_finite(self, one: np.floating, other: np.floating, found: str) -> None:
        if not (np.isfinite(one) and np.isfinite(other)):
            raise UserError(
                f"{self.weight.path}: {self.weight.name}",
                f"{found} in rows {self.first} to {self.last - 1}",
                "finite values",
                "fetch the source again",
            )


def matrix_pieces(
    weight: Tensor, scale: Tensor | None, places: dict[str, int]
) -> list[MatrixPiece]:
    """Cut a matrix into runs of rows of about PIECE_ELEMENTS, of whole blocks if it is FP8."""
    out, columns = weight.shape
    scale = scale if weight.dtype == "F8_E4M3" else None
    height = block_of(weight.shape, scale.shape)[0] if scale else 1
    rows = max(1, PIECE_ELEMENTS // columns // height) * height
    return [
        MatrixPiece(weight, scale, row, min(row + rows, out), places) for row in range(0, out, rows)
    ]


@dataclass(frozen=True)
class FloatPiece:
    """`count` elements of a tensor from element `first`, as `dtype`: F16 (ties to even) or F32.

    exact: raise UserError if rounding changes a value.
    """

    tensor: Tensor
    first: int
    count: int
    place: int  # where the tensor's first element lies in the new shard
    dtype: str
    exact: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return ITEMSIZE[self.dtype] * self.count

    def blocks(self, desk: WorkerBuffers) -> Blocks:
        """Yield the rounded values. Raises UserError for a value that F16 cannot hold."""
        size = ITEMSIZE[self.tensor.dtype]
        data = read_bytes(desk, self.tensor, size * self.first, size * self.count, "codes")
        with np.errstate(over="ignore"):
            given = as_float32(data, self.tensor.dtype)
            values = given.astype(NUMPY_DTYPE[self.dtype])
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.tensor.path}: {self.tensor.name}", f"a value that {self.dtype} cannot hold",
                "finite values, up to 65,504 in F16", "fetch the source again",
            )  # fmt: skip
        if self.exact and not np.array_equal(values, given):
            raise UserError(
                f"{self.tensor.path}: {self.tensor.name}", f"values that {self.dtype} lacks",
                "those that were there when the run was planned", "check the disk, begin again",
            )  # fmt: skip
        yield self.place + ITEMSIZE[self.dtype] * self.first, values


def float_pieces(tensor: Tensor, place: int, dtype: str, exact: bool = False) -> list[FloatPiece]:
    """Cut a tensor of any size into pieces of PIECE_ELEMENTS. dtype: F16 or F32."""
    elements = tensor.nbytes // ITEMSIZE[tensor.dtype]
    return [
        FloatPiece(tensor, first, min(PIECE_ELEMENTS, elements - first), place, dtype, exact)
        for first in range(0, elements, PIECE_ELEMENTS)
    ]
