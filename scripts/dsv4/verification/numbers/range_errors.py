"""Measure errors of affine groups in steps of the source's range, whatever the stored scale is.

So errors of every affine quantizer can be compared, and a wrong scale does not hide them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import numpy as np

from dsv4.verification.numbers import kernels


@dataclass(frozen=True)
class RangeErrors:
    """Errors in steps, and sums of squares and products of weights.

    squares: sum of the groups' mean square errors; worst: the largest RMS error of a group, which
    is worst_at. given, made, both: sums of the source's squares, of the decoded weights' squares,
    and of their products.
    """

    squares: float
    worst: float
    worst_at: int
    given: float
    made: float
    both: float


def range_errors(
    values: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    bits: int,
    size: int,
    columns: int,
) -> RangeErrors:
    """Compare decoded weights with the source.

    Flat arrays of whole rows of `columns` weights: values float32, levels uint8 (n,), scales,
    biases float32 (n / size,); size: weights in a group. A group's step is its range, or its
    greatest magnitude, over the number of levels less one, and no less than the RMS of its row's
    steps. Groups with NaN or Inf are left out.
    """
    finite = np.isfinite(scales) & np.isfinite(biases)
    top = np.float32((1 << bits) - 1)
    found = _range_errors(values, levels, scales, biases, finite, top, size, columns // size)
    return RangeErrors(*found)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})
def _range_errors(values, levels, scales, biases, finite, top, size, groups):
    total, worst, worst_at = 0.0, 0.0, 0
    given, made, both = 0.0, 0.0, 0.0
    steps = np.empty(groups, np.float32)
    for row in range(len(scales) // groups):
        squares = 0.0
        for g in range(groups):
            start = (row * groups + g) * size
            low, high = kernels.min_max(values[start : start + size])
            steps[g] = max(high - low, high, -low) / top
            squares += steps[g] * steps[g]
        least = math.sqrt(squares / groups)
        for g in range(groups):
            group = row * groups + g
            if not finite[group]:
                continue
            scale, bias = scales[group], biases[group]
            x, y, xy = np.float32(0), np.float32(0), np.float32(0)
            error = np.float32(0)
            for i in range(group * size, (group + 1) * size):
                decoded = np.float32(levels[i]) * scale + bias
                miss = values[i] - decoded
                error += miss * miss
                x += values[i] * values[i]
                y += decoded * decoded
                xy += values[i] * decoded
            given, made, both = given + x, made + y, both + xy
            mean = error / size / max(steps[g], least, 1e-30) ** 2
            total += mean
            if mean > worst:
                worst, worst_at = mean, group
    return total, math.sqrt(worst), worst_at, given, made, both
