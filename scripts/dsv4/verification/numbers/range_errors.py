"""Measure errors of affine groups in steps of the source's range, whatever the stored scale is.

So errors of every affine quantizer can be compared, and a wrong scale does not hide them.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from dsv4.verification.numbers import kernels


def range_errors(
    values: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    bits: int,
    size: int,
    columns: int,
) -> tuple[float, float, int]:
    """Return (sum of the groups' mean squares, largest RMS of a group, that group), in steps.

    Flat arrays of whole rows of `columns` weights: values float32, levels uint8 (n,), scales,
    biases float32 (n / size,); size: weights in a group. A group's step is its range, or its
    greatest magnitude, over the number of levels less one, and no less than the RMS of its row's
    steps. Groups with NaN or Inf are left out.
    """
    finite = np.isfinite(scales) & np.isfinite(biases)
    top = np.float32((1 << bits) - 1)
    return _range_errors(values, levels, scales, biases, finite, top, size, columns // size)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})
def _range_errors(values, levels, scales, biases, finite, top, size, groups):
    total, worst, worst_at = 0.0, 0.0, 0
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
            group, error = row * groups + g, np.float32(0)
            if not finite[group]:
                continue
            scale, bias = scales[group], biases[group]
            for i in range(group * size, (group + 1) * size):
                miss = values[i] - (np.float32(levels[i]) * scale + bias)
                error += miss * miss
            mean = error / size / max(steps[g], least, 1e-30) ** 2
            total += mean
            if mean > worst:
                worst, worst_at = mean, group
    return total, math.sqrt(worst), worst_at
