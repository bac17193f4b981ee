"""Find holes: runs of zero bytes where a download left out a piece of a file."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from dsv4.storage.safetensors_file import Tensor


@numba.njit(nogil=True, cache=True)
def first_run(data: np.ndarray, least: int, before: int) -> tuple[int, int]:
    """Return the first run of `least` zeros in `data` (flat uint8) as (begin, begin + least).

    Without one, return the run of fewer zeros at the end of `data`, which may be empty.
    before: number of zeros before `data`. A run may begin among them, at a negative index.

    The search starts at the end of a possible run and goes back to its last byte that is not zero.
    The next run can only begin after that byte. No byte is read twice, and of most pages only one
    or two bytes are read.
    """
    begin, read = -before, 0  # bytes from `begin` to `read` are zeros
    while True:
        end = min(begin + least, len(data))
        at = end - 1
        while at >= read and data[at] == 0:
            at -= 1
        if at < read:
            return begin, end
        begin, read = at + 1, end


class HoleDetector:
    """Find holes in tensors that are read in pieces of any size, in order.

    most: (name, dtype, bytes of a tensor) → number of zero bytes in a row that is a hole, or None.
    """

    def __init__(self, most: Callable[[str, str, int], int | None]) -> None:
        self._most = most
        self._ends: dict[Tensor, tuple[int, int]] = {}  # end of what was read; zeros before it
        self.holes: dict[Tensor, int] = {}  # tensor → offset of the hole in the file

    def scan(self, tensor: Tensor, first: int, data: np.ndarray) -> None:
        """Scan the bytes of a tensor from byte `first` on."""
        least = self._most(tensor.name, tensor.dtype, tensor.nbytes)
        if least is None or tensor in self.holes:
            return
        end, zeros = self._ends.pop(tensor, (0, 0))
        begin, end = first_run(data, least, zeros if end == first else 0)
        if end - begin == least:
            self.holes[tensor] = tensor.offset + first + begin
        elif end > begin:
            self._ends[tensor] = first + end, end - begin
