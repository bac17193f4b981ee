"""Read the source's tensors piece by piece, and stop where a download left a hole in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dsv4.errors import UserError
from dsv4.model.names import most_zeros
from dsv4.storage.holes import first_run
from dsv4.storage.safetensors_file import Tensor
from dsv4.storage.shard_writer import BLOCK_BYTES, COPY_BYTES, ShardWriter, WorkerBuffers


def read_bytes(
    desk: WorkerBuffers, tensor: Tensor, first: int, nbytes: int, use: str
) -> np.ndarray:
    """`nbytes` bytes of a tensor from its byte `first`, uint8, in the desk's buffer for `use`.

    Raises UserError when the file ends before, and for a hole.
    """
    data = desk.buffer(use, nbytes)
    desk.read(tensor.path, tensor.offset + first, data)
    check_hole(tensor, tensor.offset + first, data)
    return data


def read_blocks(
    desk: WorkerBuffers, tensor: Tensor, first: int, nbytes: int, row: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """The same bytes as (first byte, data), whole rows of `row` bytes, about BLOCK_BYTES at a time.

    So little stays in a core's own cache until it is written. A hole is found across blocks too.
    """
    step = max(row, BLOCK_BYTES // row * row)
    room, zeros = desk.buffer("block", min(step, nbytes)), 0
    for at in range(first, first + nbytes, step):
        data = room[: min(step, first + nbytes - at)]
        desk.read(tensor.path, tensor.offset + at, data)
        zeros = check_hole(tensor, tensor.offset + at, data, zeros)
        yield at, data


def check_hole(tensor: Tensor, offset: int, data: np.ndarray, before: int = 0) -> int:
    """Raise UserError when `data`, of a tensor and read at `offset` of its file, has too many
    zeros.

    before: how many zeros the tensor has just before `data`. Returns how many it ends with.
    """
    least = most_zeros(tensor.name, tensor.dtype, tensor.nbytes)
    if least is None:
        return 0
    begin, end = first_run(data, least, before)
    if end - begin == least:
        raise UserError(
            f"{tensor.path}: {tensor.name}",
            f"{least:,} zero bytes or more from byte {offset + begin:,} on",
            "numbers there: a download left a hole", "fetch this file again",
        )  # fmt: skip
    return end - begin


@dataclass(frozen=True)
class CopyTensorPiece:
    """`nbytes` bytes of a tensor from its byte `first`, as they are."""

    tensor: Tensor
    first: int
    nbytes: int
    place: int  # where the tensor's first byte lies in the new shard
    check: Callable[[int, np.ndarray], None] | None = None  # (first byte, data)

    @property
    def nbytes_read(self) -> int:
        """The bytes that it reads."""
        return self.nbytes

    def write(self, target: ShardWriter, desk: WorkerBuffers) -> None:
        """Copy them. Raises UserError for a hole."""
        for at, data in read_blocks(desk, self.tensor, self.first, self.nbytes):
            if self.check:
                self.check(at, data)
            target.write(self.place + at, data)


def copy_tensor_pieces(
    tensor: Tensor, place: int, check: Callable[[int, np.ndarray], None] | None = None
) -> list[CopyTensorPiece]:
    """Cut a tensor of any size into pieces of at most COPY_BYTES."""
    return [
        CopyTensorPiece(tensor, first, min(COPY_BYTES, tensor.nbytes - first), place, check)
        for first in range(0, tensor.nbytes, COPY_BYTES)
    ]
