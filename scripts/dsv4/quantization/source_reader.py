"""Read the source's tensors in pieces. Raise UserError for a hole that a download left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dsv4.errors import UserError
from dsv4.hub.provenance import is_published
from dsv4.model.names import most_zeros
from dsv4.quantization.fp4 import ue8m0_bytes
from dsv4.storage.holes import first_run
from dsv4.storage.safetensors_file import ITEMSIZE, Tensor
from dsv4.storage.shard_writer import BLOCK_BYTES, COPY_BYTES, Blocks, WorkerBuffers


def read_bytes(
    desk: WorkerBuffers, tensor: Tensor, first: int, nbytes: int, use: str
) -> np.ndarray:
    """Read `nbytes` bytes of a tensor from its byte `first`: uint8, in the buffer for `use`.

    Raises UserError for a file that ends too early and for a hole.
    """
    data = desk.buffer(use, nbytes)
    desk.read(tensor.path, tensor.offset + first, data)
    check_hole(tensor, tensor.offset + first, data)
    return data


def read_blocks(
    desk: WorkerBuffers, tensor: Tensor, first: int, nbytes: int, row: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the same bytes as (first byte, data), in whole rows of `row` bytes.

    A block has about BLOCK_BYTES, which stays in a core's cache until it is written. Holes are
    found across blocks too.
    """
    step = max(row, BLOCK_BYTES // row * row)
    room, zeros = desk.buffer("block", min(step, nbytes)), 0
    for at in range(first, first + nbytes, step):
        data = room[: min(step, first + nbytes - at)]
        desk.read(tensor.path, tensor.offset + at, data)
        zeros = check_hole(tensor, tensor.offset + at, data, zeros)
        yield at, data


def read_scales(desk: WorkerBuffers, scale: Tensor, first: int, count: int) -> np.ndarray:
    """Read `count` scales from number `first` on as UE8M0 bytes, uint8.

    Raises UserError as `read_bytes` and `ue8m0_bytes` do.
    """
    size = ITEMSIZE[scale.dtype]
    data = read_bytes(desk, scale, first * size, count * size, "exponents")
    return ue8m0_bytes(data, scale)


def check_hole(tensor: Tensor, offset: int, data: np.ndarray, before: int = 0) -> int:
    """Raise UserError if `data`, read at `offset` of a tensor's file, has a run of too many zeros.

    before: the number of zeros just before `data`. Returns the number at its end. A file with the
    hub's hash is as it was published, so its zeros are no hole.
    """
    least = most_zeros(tensor.name, tensor.dtype, tensor.nbytes)
    if least is None:
        return 0
    begin, end = first_run(data, least, before)
    if end - begin == least and is_published(tensor.path):
        return 0
    if end - begin == least:
        raise UserError(
            f"{tensor.path}: {tensor.name}",
            f"{least:,} zero bytes or more from byte {offset + begin:,} on",
            "numbers there: a download left a hole",
            "make download VERIFY_HASHES=1, which believes a file with the hub's hash",
        )  # fmt: skip
    return end - begin


@dataclass(frozen=True)
class CopyTensorPiece:
    """Copy `nbytes` bytes of a tensor from its byte `first`."""

    tensor: Tensor
    first: int
    nbytes: int
    place: int  # where the tensor's first byte lies in the new shard
    check: Callable[[int, np.ndarray], None] | None = None  # (first byte, data)

    def blocks(self, desk: WorkerBuffers) -> Blocks:
        """Yield the bytes as they are. Raises UserError for a hole."""
        for at, data in read_blocks(desk, self.tensor, self.first, self.nbytes):
            if self.check:
                self.check(at, data)
            yield self.place + at, data


def copy_tensor_pieces(
    tensor: Tensor, place: int, check: Callable[[int, np.ndarray], None] | None = None
) -> list[CopyTensorPiece]:
    """Cut a tensor of any size into pieces of at most COPY_BYTES."""
    return [
        CopyTensorPiece(tensor, first, min(COPY_BYTES, tensor.nbytes - first), place, check)
        for first in range(0, tensor.nbytes, COPY_BYTES)
    ]
