"""Runs of zero bytes: what a download manager leaves where a piece of a file never came."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv4.storage.shard import Tensor

PAGE = 4096
SAMPLES = 8  # bytes that are looked at in a run of the length that is asked for


def zero_run(data: np.ndarray, least: int) -> int | None:
    """Where in `data`, uint8 and flat, a run of at least `least` zero bytes begins; None if none.

    Looks at a few bytes of each stretch first: it costs next to nothing where there is no such run.

    >>> zero_run(np.array([1, *[0] * 64, 1], np.uint8), 64), zero_run(np.ones(99, np.uint8), 8)
    (1, None)
    """
    if len(data) < least or least < 1:
        return None
    step = max(1, least // SAMPLES)
    width = least // step  # so many multiples of `step` lie in any run of `least` bytes
    near = np.flatnonzero(data[::step] == 0)
    if len(near) < width:
        return None
    starts = near[: len(near) - width + 1]
    for start in starts[near[width - 1 :] - starts == width - 1]:
        begin, end = _around(data, int(start) * step)
        if end - begin >= least:
            return begin
    return None


def _around(data: np.ndarray, at: int) -> tuple[int, int]:
    """The run of zeros around byte `at`, which is zero: where it begins, where it ends."""
    before = np.flatnonzero(data[max(0, at - (1 << 20)) : at])
    begin = max(0, at - (1 << 20)) + int(before[-1]) + 1 if len(before) else max(0, at - (1 << 20))
    after = np.flatnonzero(data[at : at + (1 << 20)])
    return begin, at + int(after[0]) if len(after) else min(len(data), at + (1 << 20))


class Watch:
    """Looks for holes in what is read of tensors, each from its beginning, in pieces of any size.

    most: (name, dtype, bytes of a tensor) → how many zero bytes in a row are a hole, or None.
    """

    def __init__(self, most: Callable[[str, str, int], int | None]) -> None:
        self._most = most
        self._zeros: dict[Tensor, int] = {}  # at the end of what was read so far
        self.holes: dict[Tensor, int] = {}  # tensor → the byte of the file from which on

    def see(self, tensor: Tensor, first: int, data: np.ndarray) -> None:
        """Look at the bytes of a tensor from byte `first` on."""
        least = self._most(tensor.name, tensor.dtype, tensor.nbytes)
        if least is None or tensor in self.holes:
            return
        before = self._zeros.pop(tensor, 0)
        if not data.any():
            if before + len(data) >= least:
                self.holes[tensor] = tensor.offset + first - before
            else:
                self._zeros[tensor] = before + len(data)
        elif (at := zero_run(data, least)) is not None:
            self.holes[tensor] = tensor.offset + first + at
