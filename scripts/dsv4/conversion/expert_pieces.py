"""Pieces of routed experts: read FP4 rows of the source, quantize them, yield a shard's bytes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from dsv4.errors import UserError
from dsv4.model.bundle_tensors import ConversionUnit
from dsv4.model.labels import MXFP4, parts_of
from dsv4.quantization.affine_table import BadGroup, ErrorStats
from dsv4.quantization.formats import Quantizer
from dsv4.quantization.imatrix import normalized
from dsv4.quantization.source_reader import copy_tensor_pieces, read_blocks, read_scales
from dsv4.storage.safetensors_file import Tensor, TensorSpec
from dsv4.storage.shard_writer import COPY_BYTES, Blocks, Piece, WorkerBuffers

PIECE_BYTES = 4 << 20  # of packed source codes


@dataclass(frozen=True)
class QuantizePiece:
    """Rows `first` to `last` - 1 of one expert, quantized into the parts that a shard holds."""

    weight: Tensor
    scale: Tensor
    first: int
    last: int
    offsets: dict[str, int]  # part with rows → offset of its row 0 in the shard
    quantizer: Quantizer
    errors: ErrorLog
    importance: np.ndarray | None = None  # of each column, from an imatrix

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        sizes = row_bytes(self.weight, self.quantizer)
        return (self.last - self.first) * sum(sizes[part] for part in self.offsets)

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Quantize the rows and yield each part that this shard holds.

        The codes are yielded for each block of rows that is read, the smaller parts at the end.
        Raises UserError for a group that the quantizer cannot represent.
        """
        rows, half = self.last - self.first, self.weight.shape[1]
        groups = self.scale.shape[1]
        scale = read_scales(buffers, self.scale, self.first * groups, rows * groups)
        sizes = row_bytes(self.weight, self.quantizer)
        codes, *others = sizes
        whole = {part: buffers.buffer(part, rows * sizes[part]) for part in others}
        importance = self.importance
        if importance is not None:
            importance = normalized(importance, self.weight.name)
        for at, packed in read_blocks(buffers, self.weight, self.first * half, rows * half, half):
            row, number = at // half, len(packed) // half
            begin, end = row - self.first, row - self.first + number
            parts = {p: data[begin * sizes[p] : end * sizes[p]] for p, data in whole.items()}
            parts[codes] = buffers.buffer("weight", number * sizes[codes])
            exponents = scale[begin * groups : end * groups]
            stats = self._encode(row, packed, exponents, parts, importance)
            if codes in self.offsets:
                self.errors.add(self.weight.name, stats)
                yield self.offsets[codes] + row * sizes[codes], parts[codes]
        for part in whole.keys() & self.offsets.keys():
            yield self.offsets[part] + self.first * sizes[part], whole[part]

    def _encode(
        self,
        row: int,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: dict[str, np.ndarray],
        importance: np.ndarray | None,
    ) -> ErrorStats:
        """Quantize rows from `row` on into `parts`. importance: normalized."""
        try:
            return self.quantizer.encode(packed, exponents, parts, importance)
        except BadGroup as bad:
            below, group = divmod(bad.group, self.scale.shape[1])
            where = f"in row {row + below}, group {group}"
            raise UserError(
                f"{self.weight.path}: {self.weight.name}", f"{bad.found} {where}",
                bad.expected, "fetch the source again",
            ) from bad  # fmt: skip


@dataclass(frozen=True)
class ConstantPiece:
    """Constant bytes at an offset of the shard."""

    data: bytes
    offset: int

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        return len(self.data)

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield the bytes."""
        yield self.offset, np.frombuffer(self.data, np.uint8)


def row_bytes(weight: Tensor, quantizer: Quantizer) -> dict[str, int]:
    """Return part → bytes of a row, for the parts of an expert that have rows. Codes come first."""
    out, half = weight.shape
    parts = parts_of(quantizer.label, out, 2 * half)
    specs = {part: TensorSpec("", *spec) for part, spec in parts.items() if part != "tq_bits"}
    return {part: spec.nbytes // out for part, spec in specs.items()}


class ErrorLog:
    """The errors of the quantized tensors by name. Threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.stats: dict[str, ErrorStats] = {}
        self.scales: dict[str, int] = {}  # FP8 scale bytes with which some runtimes round

    def add(self, name: str, stats: ErrorStats) -> None:
        """Add the errors of some rows of a tensor."""
        with self._lock:
            self.stats.setdefault(name, ErrorStats()).add(stats)

    def add_scales(self, name: str, number: int) -> None:
        """Add a number of extreme scale bytes of a tensor."""
        if number:
            with self._lock:
                self.scales[name] = self.scales.get(name, 0) + number


def expert_unit_pieces(
    unit: ConversionUnit, offsets: dict[str, int], quantizer: Quantizer, errors: ErrorLog
) -> list[Piece]:
    """Return the pieces of the parts of an expert, or of a stack, that a shard holds."""
    pieces: list[Piece] = []
    for number, (weight, scale) in enumerate(unit.stack or [(unit.weight, unit.scale)]):
        base = weight.name.removesuffix(".weight")
        one, importance = quantizer.for_tensor(base), quantizer.importance.get(base)
        sizes = {part: weight.shape[0] * size for part, size in row_bytes(weight, one).items()}
        inside = {part: offsets[part] + number * sizes[part] for part in sizes if part in offsets}
        pieces += expert_pieces(weight, scale, inside, one, errors, importance)
    for slot in unit.slots:
        if slot.name.endswith(".tq_bits") and "tq_bits" in offsets:
            bits = int(quantizer.label["bits"]).to_bytes(slot.nbytes, "little")
            pieces.append(ConstantPiece(bits, offsets["tq_bits"]))
    return pieces


def expert_pieces(
    weight: Tensor,
    scale: Tensor,
    offsets: dict[str, int],
    quantizer: Quantizer,
    errors: ErrorLog,
    importance: np.ndarray | None,
) -> list[Piece]:
    """Return the pieces of one expert's parts. offsets: part → offset in the shard."""
    if quantizer.label == MXFP4:
        return copy_pieces(weight, scale, offsets, errors)
    out, half = weight.shape
    rows = max(1, PIECE_BYTES // half)
    return [
        QuantizePiece(
            weight, scale, row, min(row + rows, out), offsets, quantizer, errors, importance
        )
        for row in range(0, out, rows)
    ]


def copy_pieces(
    weight: Tensor, scale: Tensor, offsets: dict[str, int], errors: ErrorLog
) -> list[Piece]:
    """Return pieces that copy codes and scale bytes. They raise UserError for a NaN scale."""

    def check(first: int, data: np.ndarray) -> None:
        if (data == 255).any():
            row, group = divmod(first + int(np.argmax(data == 255)), scale.shape[1])
            raise UserError(
                f"{weight.path}: {weight.name}",
                f"scale byte 255 (NaN) in row {row}, group {group}",
                "bytes from 0 to 254", "fetch the source again",
            )  # fmt: skip

    pieces: list[Piece] = []
    if "weight" in offsets:
        pieces += copy_tensor_pieces(weight, offsets["weight"])
        errors.add(weight.name, ErrorStats())
    if "scales" in offsets:
        if scale.dtype == "F32":
            pieces += scale_pieces(scale, offsets["scales"])
        else:
            pieces += copy_tensor_pieces(scale, offsets["scales"], check)
    return pieces


@dataclass(frozen=True)
class ScalePiece:
    """Rows `first` to `last` - 1 of F32 scales as UE8M0 bytes."""

    scale: Tensor
    first: int
    last: int
    offset: int  # of row 0 in the shard

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        return (self.last - self.first) * self.scale.shape[1]

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield the bytes. Raises UserError for a scale that is no power of two."""
        at = self.first * self.scale.shape[1]
        yield self.offset + at, read_scales(buffers, self.scale, at, self.nbytes)


def scale_pieces(scale: Tensor, offset: int) -> list[ScalePiece]:
    """Cut F32 scales into pieces of about COPY_BYTES of the source."""
    rows = max(1, COPY_BYTES // (4 * scale.shape[1]))
    cuts = range(0, scale.shape[0], rows)
    return [ScalePiece(scale, row, min(row + rows, scale.shape[0]), offset) for row in cuts]
