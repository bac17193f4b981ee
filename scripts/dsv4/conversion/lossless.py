"""Store FP8 matrices as mxfp8, and BF16 tensors as F16 where that is exact.

MLX's mxfp8 is the source's FP8 with a scale for each row and 32 columns instead of each block: the
same codes, the block's byte repeated. The dtype of a tensor determines the dtype in which runtimes
compute. F16 is finer, so a BF16 tensor becomes F16 if each of its values is an F16 number. That
depends on the values, so they are read before the plan is made.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4.conversion.expert_pieces import ErrorLog
from dsv4.conversion.shard_metadata import fingerprint
from dsv4.errors import UserError
from dsv4.model.bundle_tensors import weights_of
from dsv4.model.fp8_blocks import block_of
from dsv4.model.names import GROUP, kind
from dsv4.quantization.formats import Quantizer, with_bf16_overflow
from dsv4.quantization.fp8 import expand_scales
from dsv4.quantization.source_reader import read_blocks, read_scales
from dsv4.storage.atomic import write_json
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.safetensors_file import Tensor
from dsv4.storage.shard_writer import Blocks, WorkerBuffers
from dsv4.storage.tensor_reader import as_float32
from dsv4.text import join_some

RECORD = ".bfloats.json"  # the result of `count_f16_overflow`, beside the unfinished shards
SLICE_BYTES = 16 << 20
PIECE_BYTES = 2 << 20  # of FP8 codes
# Runtimes that decode to BF16 round what has a smaller scale byte and overflow with a larger one.
LEAST, GREATEST = 3, 246

Read = Callable[[Tensor, int, int], np.ndarray]  # (tensor, first byte, bytes) → uint8


# --- The planning pass --------------------------------------------------------------------------


def with_measured_overflow(
    quantizer: Quantizer, source: Checkpoint, read: Read, record: Path, jobs: int
) -> Quantizer:
    """Return the quantizer with the BF16 tensors that F16 cannot represent.

    A `record` of the same source is used if there is one. Raises UserError for NaN or infinity.
    """
    mark = fingerprint(source)
    known = read_json(record) if record.is_file() else {}
    if known.get("source") == mark and isinstance(known.get("beyond"), dict):
        return with_bf16_overflow(quantizer, known["beyond"])
    return with_bf16_overflow(quantizer, count_f16_overflow(source, read, jobs))


def write_record(record: Path, source: Checkpoint, quantizer: Quantizer) -> None:
    """Write the result of the planning pass, so that a continued run has the same plan."""
    if quantizer.form.as_source:
        write_json(record, {"source": fingerprint(source), "beyond": dict(quantizer.beyond)})


def bf16_names(source: Checkpoint) -> list[str]:
    """Return the names of the BF16 weights that may become F16: no controls, nothing of images."""
    weights = weights_of(source.tensors)
    kept = ("control", "image")
    return [n for n in weights if source.tensors[n].dtype == "BF16" and kind(n) not in kept]


def count_f16_overflow(source: Checkpoint, read: Read, jobs: int) -> dict[str, int]:
    """Return BF16 tensor → number of values that F16 cannot represent, where there are any."""
    names = bf16_names(source)
    tensors = sorted((source.tensors[n] for n in names), key=lambda t: (t.path.name, t.offset))
    cuts = [(t, first) for t in tensors for first in range(0, t.nbytes, SLICE_BYTES)]

    def count(cut: tuple[Tensor, int]) -> tuple[str, int]:
        tensor, first = cut
        data = read(tensor, first, min(SLICE_BYTES, tensor.nbytes - first))
        return tensor.name, f16_overflow(data, tensor)

    found: dict[str, int] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for name, n in pool.map(count, cuts):
            found[name] = found.get(name, 0) + n
    return {name: n for name, n in found.items() if n}


def f16_overflow(data: np.ndarray, tensor: Tensor) -> int:
    """Count BF16 values that F16 cannot represent. Raises UserError for NaN or infinity."""
    bits = data.view(np.uint16)
    exponent = bits >> 7 & 0xFF
    # 8 significant bits: 2^-17 and more is exact, subnormal in F16 or not; so is 0, of either sign.
    suspects = bits[((exponent < 127 - 17) | (exponent > 127 + 15)) & (bits & 0x7FFF != 0)]
    if (exponent == 255).any():
        raise UserError(f"{tensor.path}: {tensor.name}", "a NaN or an infinity", "finite values",
                   "fetch the source again")  # fmt: skip
    values = as_float32(suspects.view(np.uint8), "BF16")
    with np.errstate(over="ignore"):
        return int((values.astype(np.float16) != values).sum())


def message(quantizer: Quantizer, source: Checkpoint) -> str:
    """Return a line about the tensors that stay BF16, "" for a quantizer that is not lossless."""
    if not quantizer.form.as_source:
        return ""
    number = len(bf16_names(source))
    line = f"BF16: {number - len(quantizer.beyond):,} tensors are exact in F16 and become F16"
    if not quantizer.beyond:
        return line
    most = sorted(quantizer.beyond.items(), key=lambda item: -item[1])
    named = join_some(f"{name} ({n:,} values)" for name, n in most)
    return f"{line}; {len(most):,} have values that F16 lacks and stay BF16: {named}"


# --- Pieces -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fp8Piece:
    """Rows `first` to `last` - 1 of an FP8 matrix, copied. `first` begins a block."""

    weight: Tensor
    scale: Tensor
    first: int
    last: int
    places: dict[str, int]  # part → offset of its row 0 in the shard
    ledger: ErrorLog

    @property
    def nbytes(self) -> int:
        """The number of bytes written."""
        columns = self.weight.shape[1]
        row = {"weight": columns, "scales": columns // GROUP}
        return (self.last - self.first) * sum(row[part] for part in self.places)

    def blocks(self, buffers: WorkerBuffers) -> Blocks:
        """Yield the codes as they are and the scales repeated.

        Raises UserError for a NaN in either.
        """
        rows, columns = self.last - self.first, self.weight.shape[1]
        if "weight" in self.places:
            for at, codes in read_blocks(
                buffers, self.weight, self.first * columns, rows * columns, columns
            ):
                self._check((codes & 127) == 127, codes, "code", columns, at // columns)
                yield self.places["weight"] + at, codes
        if "scales" in self.places:
            across = self.scale.shape[1]
            height, _ = block_of(self.weight.shape, self.scale.shape)
            top, bottom = self.first // height, -(-self.last // height)
            data = read_scales(buffers, self.scale, top * across, (bottom - top) * across)
            self._check(data == 255, data, "scale byte", across, top)
            groups = expand_scales(data.reshape(-1, across), rows, columns)
            odd = int(((data < LEAST) | (data > GREATEST)).sum())
            self.ledger.add_scales(self.scale.name, odd)
            yield self.places["scales"] + self.first * (columns // GROUP), groups

    def _check(self, bad: np.ndarray, data: np.ndarray, what: str, width: int, first: int) -> None:
        """Raise UserError if `bad` has a true value. width: codes or scales in a row."""
        if bad.any():
            at = int(np.argmax(bad))
            row, column = divmod(at, width)
            kind = "row" if what == "code" else "block row"
            raise UserError(
                f"{self.weight.path}: {self.weight.name}",
                f"{what} {data[at]:#04x} (NaN) in {kind} {first + row}, column {column}",
                "numbers", "fetch the source again",
            )  # fmt: skip


def fp8_pieces(
    weight: Tensor, scale: Tensor, places: dict[str, int], ledger: ErrorLog
) -> list[Fp8Piece]:
    """Return the pieces of an FP8 matrix, each of whole blocks."""
    out, columns = weight.shape
    height, _ = block_of(weight.shape, scale.shape)
    rows = max(1, PIECE_BYTES // columns // height) * height
    return [
        Fp8Piece(weight, scale, row, min(row + rows, out), places, ledger)
        for row in range(0, out, rows)
    ]
