"""Pieces of routed experts: read FP4 rows of the source, quantize them, write them to a shard."""

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
from dsv4.quantization.source_reader import (
    copy_tensor_pieces,
    read_blocks,
    read_scales,
)
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
    places: dict[str, int]  # part with rows → offset of its row 0 in the shard
    quantizer: Quantizer
    ledger: ErrorLog
    importance: np.ndarray | None = None  # of each column, from an imatrix

    def _row_bytes(self) -> dict[str, int]:
        """Return part → bytes of a row, for the parts that have rows. The codes come first."""
        return {p: n // self.weight.shape[0] for p, n in row_parts(self.weight, self.quantizer)}

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        row_bytes = self._row_bytes()
        return (self.last - self.first) * sum(row_bytes[part] for part in self.places)

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Quantize the rows and yield each part that this shard holds.

        Raises UserError for a group that the quantizer cannot represent.
        """
        rows, half = self.last - self.first, self.weight.shape[1]
        groups = self.scale.shape[1]
        scale = read_scales(buffers, self.scale, self.first * groups, rows * groups)
        sizes = self._row_bytes()
        codes, *others = sizes
        parts = {part: buffers.buffer(part, rows * sizes[part]) for part in others}
        weights = self.importance
        if weights is not None:
            weights = normalized(weights, self.weight.name)
        for at, packed in read_blocks(buffers, self.weight, self.first * half, rows * half, half):
            row, some = at // half, len(packed) // half
            done = row - self.first
            now = {p: data[done * sizes[p] :][: some * sizes[p]] for p, data in parts.items()}
            now[codes] = buffers.buffer("weight", some * sizes[codes])
            exponents = scale[done * groups :][: some * groups]
            tally = self._encode(row, packed, exponents, now, weights)
            if codes in self.places:
                self.ledger.add(self.weight.name, tally)
                yield self.places[codes] + row * sizes[codes], now[codes]
        for part in parts.keys() & self.places.keys():
            yield self.places[part] + self.first * sizes[part], parts[part]

    def _encode(
        self,
        row: int,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: dict[str, np.ndarray],
        weights: np.ndarray | None,
    ) -> ErrorStats:
        """Quantize rows from `row` on into `parts`. weights: of the columns, normalized."""
        try:
            return self.quantizer.encode(packed, exponents, parts, weights)
        except BadGroup as bad:
            below, group = divmod(bad.group, self.scale.shape[1])
            where = f"in row {row + below}, group {group}"
            raise UserError(
                f"{self.weight.path}: {self.weight.name}", f"{bad.found} {where}",
                bad.expected, "fetch the source again",
            ) from bad  # fmt: skip


@dataclass(frozen=True)
class ConstantPiece:
    """A few constant bytes."""

    data: bytes
    place: int

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        return len(self.data)

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield the bytes."""
        yield self.place, np.frombuffer(self.data, np.uint8)


def row_parts(weight: Tensor, quantizer: Quantizer) -> list[tuple[str, int]]:
    """Return (part, bytes) for each part of an expert that has as many rows as the weight."""
    out, half = weight.shape
    parts = parts_of(quantizer.label, out, 2 * half).items()
    return [(part, TensorSpec("", *of).nbytes) for part, of in parts if part != "tq_bits"]


class ErrorLog:
    """The errors of the quantized tensors by name. Threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tallies: dict[str, ErrorStats] = {}
        self.scales: dict[str, int] = {}  # FP8 scale bytes with which some runtimes round

    def add(self, name: str, tally: ErrorStats) -> None:
        with self._lock:
            self.tallies.setdefault(name, ErrorStats()).add(tally)

    def note_scales(self, name: str, number: int) -> None:
        if number:
            with self._lock:
                self.scales[name] = self.scales.get(name, 0) + number


def expert_unit_pieces(
    unit: ConversionUnit, places: dict[str, int], quantizer: Quantizer, ledger: ErrorLog
) -> list[Piece]:
    """Return the pieces of the parts of an expert, or of a stack, that a shard holds."""
    pieces: list[Piece] = []
    for number, (weight, scale) in enumerate(unit.stack or [(unit.weight, unit.scale)]):
        base = weight.name.removesuffix(".weight")
        one, importance = quantizer.for_tensor(base), quantizer.importance.get(base)
        sizes = dict(row_parts(weight, one))
        at = {p: place + number * sizes[p] for p, place in places.items() if p in sizes}
        pieces += expert_pieces(weight, scale, at, one, ledger, importance)
    for slot in unit.slots:
        if slot.name.endswith(".tq_bits") and "tq_bits" in places:
            bits = int(quantizer.label["bits"]).to_bytes(slot.nbytes, "little")
            pieces.append(ConstantPiece(bits, places["tq_bits"]))
    return pieces


def expert_pieces(
    weight: Tensor,
    scale: Tensor,
    places: dict[str, int],
    quantizer: Quantizer,
    ledger: ErrorLog,
    importance: np.ndarray | None,
) -> list[Piece]:
    """Return the pieces of one expert's parts. places: part → offset in the shard."""
    if quantizer.label == MXFP4:
        return copy_pieces(weight, scale, places, ledger)
    out, half = weight.shape
    rows = max(1, PIECE_BYTES // half)
    cuts = [(row, min(row + rows, out)) for row in range(0, out, rows)]
    return [
        QuantizePiece(weight, scale, first, last, places, quantizer, ledger, importance)
        for first, last in cuts
    ]


def copy_pieces(
    weight: Tensor, scale: Tensor, places: dict[str, int], ledger: ErrorLog
) -> list[Piece]:
    """Return pieces that copy codes and scale bytes. They raise UserError for a NaN scale."""

    def check(at: int, data: np.ndarray) -> None:
        if (data == 255).any():
            row, group = divmod(at + int(np.argmax(data == 255)), scale.shape[1])
            raise UserError(
                f"{weight.path}: {weight.name}",
                f"scale byte 255 (NaN) in row {row}, group {group}",
                "bytes from 0 to 254", "fetch the source again",
            )  # fmt: skip

    pieces: list[Piece] = []
    if "weight" in places:
        pieces += copy_tensor_pieces(weight, places["weight"])
        ledger.add(weight.name, ErrorStats())
    if "scales" in places:
        if scale.dtype == "F32":
            pieces += scale_pieces(scale, places["scales"])
        else:
            pieces += copy_tensor_pieces(scale, places["scales"], check)
    return pieces


@dataclass(frozen=True)
class ScalePiece:
    """Rows `first` to `last` - 1 of F32 scales as UE8M0 bytes."""

    scale: Tensor
    first: int
    last: int
    place: int  # of row 0 in the shard

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        return (self.last - self.first) * self.scale.shape[1]

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield the bytes. Raises UserError for a scale that is no power of two."""
        at = self.first * self.scale.shape[1]
        yield self.place + at, read_scales(buffers, self.scale, at, self.nbytes)


def scale_pieces(scale: Tensor, place: int) -> list[ScalePiece]:
    """Cut F32 scales into pieces of about COPY_BYTES of the source."""
    rows = max(1, COPY_BYTES // (4 * scale.shape[1]))
    cuts = range(0, scale.shape[0], rows)
    return [ScalePiece(scale, row, min(row + rows, scale.shape[0]), place) for row in cuts]
