"""Read the source's tensors piece by piece, and stop where a download left a hole in one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv4.model.names import most_zeros
from dsv4.stop import Stop
from dsv4.storage.rewrite import COPY_BYTES, Desk, Target
from dsv4.storage.shard import Tensor
from dsv4.storage.zeros import zero_run


def read_bytes(desk: Desk, tensor: Tensor, first: int, nbytes: int, use: str) -> np.ndarray:
    """`nbytes` bytes of a tensor from its byte `first`, uint8, in the desk's buffer for `use`.

    Raises Stop when the file ends before, and for a hole.
    """
    data = desk.buffer(use, nbytes)
    desk.read(tensor.path, tensor.offset + first, data)
    check_hole(tensor, tensor.offset + first, data)
    return data


def check_hole(tensor: Tensor, offset: int, data: np.ndarray) -> None:
    """Raise Stop when `data`, of a tensor and read at `offset` of its file, has too many zeros."""
    least = most_zeros(tensor.name, tensor.dtype, tensor.nbytes)
    if least is not None and (at := zero_run(data, least)) is not None:
        raise Stop(
            f"{tensor.path}: {tensor.name}",
            f"{least:,} zero bytes or more from byte {offset + at:,} on",
            "numbers there: a download left a hole", "fetch this file again",
        )  # fmt: skip


@dataclass(frozen=True)
class SamePiece:
    """`nbytes` bytes of a tensor from its byte `first`, as they are."""

    tensor: Tensor
    first: int
    nbytes: int
    place: int  # where the tensor's first byte lies in the new shard

    @property
    def nbytes_read(self) -> int:
        """The bytes that it reads."""
        return self.nbytes

    def write(self, target: Target, desk: Desk) -> None:
        """Copy them. Raises Stop for a hole."""
        data = read_bytes(desk, self.tensor, self.first, self.nbytes, "copy")
        target.write(self.place + self.first, data)


def same_pieces(tensor: Tensor, place: int) -> list[SamePiece]:
    """Cut a tensor of any size into pieces of at most COPY_BYTES."""
    return [
        SamePiece(tensor, first, min(COPY_BYTES, tensor.nbytes - first), place)
        for first in range(0, tensor.nbytes, COPY_BYTES)
    ]
