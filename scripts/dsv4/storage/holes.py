"""Runs of zero bytes: what a download manager leaves where a piece of a file never came."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from dsv4.storage.safetensors_file import Tensor


@numba.njit(nogil=True, cache=True)
def first_run(data: np.ndarray, least: int, before: int) -> tuple[int, int]:
    """Find the first `least` zeros in a row in `data`, uint8 and flat: (begin, begin + least).

    Where there are none, it is the zeros that `data` ends with, fewer than `least`, maybe none.
    before: how many zeros lie before `data`; a run may begin among them, at a negative index.

    A run that begins at `begin` has no other byte up to its end, so that end is looked at first,
    and from there back to the last byte that is no zero: the next run can only begin behind it. No
    byte is looked at twice, and of most pages one or two are.
    """
    begin, seen = -before, 0  # what was seen so far is zeros from `begin` on
    while True:
        end = min(begin + least, len(data))
        at = end - 1
        while at >= seen and data[at] == 0:
            at -= 1
        if at < seen:
            return begin, end
        begin, seen = at + 1, end


class HoleDetector:
    """Looks for holes in what is read of tensors, in pieces of any size, one after another.

    most: (name, dtype, bytes of a tensor) → how many zero bytes in a row are a hole, or None.
    """

    def __init__(self, most: Callable[[str, str, int], int | None]) -> None:
        self._most = most
        self._ends: dict[Tensor, tuple[int, int]] = {}  # how far it was read; zeros before that
        self.holes: dict[Tensor, int] = {}  # tensor → the byte of the file from which on

    def scan(self, tensor: Tensor, first: int, data: np.ndarray) -> None:
        """Look at the bytes of a tensor from byte `first` on."""
        least = self._most(tensor.name, tensor.dtype, tensor.nbytes)
        if least is None or tensor in self.holes:
            return
        end, zeros = self._ends.pop(tensor, (0, 0))
        begin, end = first_run(data, least, zeros if end == first else 0)
        if end - begin == least:
            self.holes[tensor] = tensor.offset + first + begin
        elif end > begin:
            self._ends[tensor] = first + end, end - begin
