"""Quantize to affine, 2 to 8 bits, groups of 32, 64 or 128: scale and bias of least squared error.

`mx.quantize` spreads the levels from a group's least to its greatest value. With few bits that is
far from the best: a few weights at the ends cost all others a coarser step. Here each group starts
from several ranges that clip its ends by different shares; each is refined by alternating rounding
(the nearest level of each weight) and least squares (the best scale and bias for these levels), and
the best of them is refined further. With four bits or more, one range starts with a power of two as
its step, which represents many groups of FP4 numbers exactly. Then scale and bias are rounded to
F16, the levels are computed for them, and the error is measured with them.

Columns may be weighted by an importance. Groups are independent. LANES of them are processed side
by side, which the compiler vectorizes without changing the order of any sum: the bytes are the same
on every machine.

Alternating rounding and least squares is Lloyd's algorithm (1957, published as IEEE Trans. Inf.
Theory 28, 1982) with equally spaced levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.affine_table import ErrorStats, bad_exponent
from dsv4.quantization.fp4 import UE8M0

VERSION = "1"  # of the bytes
LANES = 32  # groups processed side by side: their data fits into a core's L1 cache
LATTICE = 0.0  # marks a range whose step is a power of two, not a share of the group's range
# Shares of the range that are cut off at either end: with few levels, more is cut off.
_CUTS = {2: (0.02, 0.12, 0.25), 3: (0.0, 0.07, 0.15)}
_OTHER_CUTS = (0.0, 0.05)
_LEAST_STEP = np.float32(1e-20)
_NEVER = np.float32(np.inf)


def search(bits: int, size: int) -> tuple[np.ndarray, int]:
    """Return the ranges to start from, and the turns of refinement for each and for the best.

    A range is two shares, float32 (n, 2): the one that is cut off below, and the one that is left.
    Ranges that cut off much at one end and least at the other are left out: they take a fifth of
    the time for a three-hundredth of the error. 4 bits in groups of 32 have ranges of their own,
    each with one turn: five turns in all instead of twelve, with the same error.
    """
    if (bits, size) == (4, 32):
        shares, turns = [(0, 1), (0, 0.97), (0.03, 0.97)], 1
    else:
        cuts = list(enumerate(_CUTS.get(bits, _OTHER_CUTS)))
        shares = [(low, 1 - low - high) for i, low in cuts for j, high in cuts if abs(i - j) < 2]
        turns = 2
    return np.array(shares + [(0, LATTICE)] * (bits > 3), np.float32), turns


@dataclass(frozen=True)
class Errors:
    """Of some rows: plain sums, and energy and error weighted by the columns' importance."""

    tally: ErrorStats
    energy: float
    error: float


def quantize(
    packed: np.ndarray,
    exponents: np.ndarray,
    importance: np.ndarray | None,
    form: tuple[int, int],
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> Errors:
    """Quantize whole rows; all arrays are contiguous and flat.

    packed: uint8, two codes a byte; exponents: uint8, one for 32 columns; importance: one positive
    number for each column of a row, or None for equal weights; form: bits and columns of a group;
    parts: weight uint8, scales and biases uint16 (bits of F16), which are written.
    Runs without the GIL. Raises BadGroup, by the group of 32 columns, for an exponent of 255 and
    for a scale or bias beyond F16.
    """
    bits, size = form
    weight, scales, biases = parts
    if (bad := np.flatnonzero(exponents == 255)).size:
        raise bad_exponent(int(bad[0]), 255)
    columns = np.ones(size) if importance is None else importance
    columns = columns.astype(np.float32)
    tops = exponents.reshape(-1, size // GROUP).max(axis=1)
    found = np.empty((3, len(tops)), np.float32)
    rows = (packed.view(np.int32), exponents, tops, columns)
    _fit(*rows, UE8M0, size, (1 << bits) - 1, *search(bits, size), found)
    stored = np.empty((2, len(tops)), np.float32)
    stored[0], scales[:] = _half(found[0], tops)
    # The bias is corrected for the scale's rounding, at the mean level.
    stored[1], biases[:] = _half(found[1] + (found[0] - stored[0]) * found[2], tops)
    if (bad := np.flatnonzero(~np.isfinite(stored).all(axis=0))).size:
        group = int(bad[0]) * (size // GROUP)
        raise bad_exponent(group, int(tops[bad[0]]))
    sums = _write(*rows, UE8M0, size, bits, stored, weight.view(np.uint32))
    lost = int(np.count_nonzero((stored[0] == 0) & (found[0] != 0)))
    return Errors(ErrorStats(sums[0], sums[1], lost), sums[2], sums[3])


def _half(values: np.ndarray, tops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round numbers in units of 2^(top - 127) to F16. Return them in these units, and the bits."""
    with np.errstate(over="ignore", under="ignore"):
        units = UE8M0[tops]
        rounded = (values * units).astype(np.float16)
        return rounded.astype(np.float32) / units, rounded.view(np.uint16)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _read(packed, exponents, tops, columns, powers, size, first, values, weights):
    """Read groups from `first` on as columns: values in units of 2^(top - 127), and weights.

    packed: int32, eight codes a word, the lowest first.
    values, weights: float32 (size, LANES). Lanes beyond the last group repeat it.
    Weights that are the same for every group are written with the first groups only.
    """
    row, parts, words = len(columns), size // 32, size // 8
    codes, units = np.empty((words, LANES), np.int32), np.empty((parts, LANES), np.float32)
    for lane in range(LANES):
        group = min(first + lane, len(tops) - 1)
        for part in range(parts):
            below = np.int64(tops[group]) - np.int64(exponents[group * parts + part])
            half = powers[127 - below] * np.float32(0.5) if below <= 127 else np.float32(0)
            units[part, lane] = half  # because _doubled gives twice the value
        for word in range(words):
            codes[word, lane] = packed[group * words + word]
        if row > size or first == 0:
            column = group * size % row
            for i in range(size):
                weights[i, lane] = columns[column + i]
    for i in range(size):
        for lane in range(LANES):
            code = (codes[i // 8, lane] >> (4 * (i % 8))) & 15
            values[i, lane] = _doubled(code) * units[i // 32, lane]


@numba.njit(inline="always")
def _doubled(code):
    """Return twice the value of an E2M1 code: 0, 1, 2, 3, 4, 6, 8, 12 and their negatives, -0 too.

    By arithmetic, because the compiler does not vectorize table lookups.
    """
    size = np.int32(code & 7)
    size += max(np.int32(size - 4), np.int32(0)) + 2 * max(np.int32(size - 6), np.int32(0))
    value = np.float32(np.int32(size))
    return -value if code > 7 else value


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sweep(values, weights, size, inverse, shift, cap, sums):
    """Round values w to levels q and sum over each group: u q, u q², u q w, with weights u.

    inverse, shift: float32 (LANES,); level = w · inverse + shift, clipped to 0 and `cap`, rounded
    down. It takes four columns at a time, so that sums are loaded and stored less often.
    """
    zero = np.float32(0)
    for lane in range(LANES):
        sums[0, lane] = sums[1, lane] = sums[2, lane] = zero
    for i in range(0, size, 4):
        for lane in range(LANES):
            a, b = inverse[lane], shift[lane]
            w0, w1, w2, w3 = (
                values[i, lane],
                values[i + 1, lane],
                values[i + 2, lane],
                values[i + 3, lane],
            )
            q0 = np.float32(np.int32(min(max(w0 * a + b, zero), cap)))
            q1 = np.float32(np.int32(min(max(w1 * a + b, zero), cap)))
            q2 = np.float32(np.int32(min(max(w2 * a + b, zero), cap)))
            q3 = np.float32(np.int32(min(max(w3 * a + b, zero), cap)))
            u0, u1 = weights[i, lane] * q0, weights[i + 1, lane] * q1
            u2, u3 = weights[i + 2, lane] * q2, weights[i + 3, lane] * q3
            sums[0, lane] += (u0 + u1) + (u2 + u3)
            sums[1, lane] += (u0 * q0 + u1 * q1) + (u2 * q2 + u3 * q3)
            sums[2, lane] += (u0 * w0 + u1 * w1) + (u2 * w2 + u3 * w3)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _turn(values, weights, size, top, whole, sums, step, low, left):
    """Do one turn of rounding and least squares: update step and low; left is their error.

    whole: float32 (5, LANES), over each group: u, u w, u w², the least and the greatest w.
    """
    half = np.float32(0.5)
    for lane in range(LANES):
        inverse = np.float32(1) / step[lane]
        sums[3, lane] = inverse
        sums[4, lane] = half - low[lane] * inverse
    _sweep(values, weights, size, sums[3], sums[4], top + half, sums)
    for lane in range(LANES):
        u, uw = whole[0, lane], whole[1, lane]
        uq, uqq, uqw = sums[0, lane], sums[1, lane], sums[2, lane]
        spread, slope = u * uqq - uq * uq, u * uqw - uq * uw
        some = (spread > 0) & (slope > 0)
        scale = slope / (spread if some else np.float32(1))
        bias = (uw - scale * uq) / u
        step[lane] = scale if some else step[lane]
        low[lane] = bias if some else low[lane]
        left[lane] = whole[2, lane] - scale * uqw - bias * uw if some else _NEVER


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _sum_up(values, weights, size, whole):
    """Compute `whole` for `_turn`."""
    for lane in range(LANES):
        whole[0, lane] = whole[1, lane] = whole[2, lane] = np.float32(0)
        whole[3, lane] = whole[4, lane] = values[0, lane]
    for i in range(size):
        for lane in range(LANES):
            w, u = values[i, lane], weights[i, lane]
            whole[0, lane] += u
            whole[1, lane] += u * w
            whole[2, lane] += u * w * w
            whole[3, lane] = min(whole[3, lane], w)
            whole[4, lane] = max(whole[4, lane], w)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _begin(begins, k, top, whole, step, low):
    """Set step and low to the k-th range of `search`."""
    for lane in range(LANES):
        reach = whole[4, lane] - whole[3, lane]
        step[lane] = max(reach * begins[k, 1] / top, _LEAST_STEP)
        low[lane] = whole[3, lane] + reach * begins[k, 0]
    if begins[k, 1] == LATTICE:
        steps = step.view(np.int32)  # a float32's upper bits are its power of two
        for lane in range(LANES):
            reach = whole[4, lane] - whole[3, lane]
            step[lane] = reach / top if reach > 0 else step[lane]
            steps[lane] = (steps[lane] + 0x7FFFFF) & 0x7F800000  # the next one, or itself


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _fit(packed, exponents, tops, columns, powers, size, most, begins, turns, found):
    """Fill found, float32 (3, groups): scale and bias in units of 2^(top - 127), and mean level.

    A group of one value has scale 0. If no turn finds a scale, because the weights of a group are
    so uneven that sums of float32 lose the small ones, levels go from the least value to the
    greatest.
    """
    values, weights = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    whole, sums = np.empty((5, LANES), np.float32), np.empty((5, LANES), np.float32)
    step, low, left = (
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    best = np.empty((3, LANES), np.float32)
    top = np.float32(most)
    for first in range(0, len(tops), LANES):
        _read(packed, exponents, tops, columns, powers, size, first, values, weights)
        _sum_up(values, weights, size, whole)
        best[0], best[1], best[2] = _NEVER, np.float32(0), whole[3]
        for k in range(len(begins) + 1):
            if k < len(begins):
                _begin(begins, k, top, whole, step, low)
            else:
                for lane in range(LANES):
                    step[lane] = max(best[1, lane], _LEAST_STEP)
                    low[lane] = best[2, lane]
            for _ in range(turns):
                _turn(values, weights, size, top, whole, sums, step, low, left)
            for lane in range(LANES):
                better = left[lane] < best[0, lane]
                best[0, lane] = left[lane] if better else best[0, lane]
                best[1, lane] = step[lane] if better else best[1, lane]
                best[2, lane] = low[lane] if better else best[2, lane]
        for lane in range(min(LANES, len(tops) - first)):
            one = whole[3, lane] == whole[4, lane]
            if best[0, lane] == _NEVER:  # no turn helped: levels from the least to the greatest
                best[1, lane] = (whole[4, lane] - whole[3, lane]) / top
            found[0, first + lane] = np.float32(0) if one else best[1, lane]
            found[1, first + lane] = whole[3, lane] if one else best[2, lane]
            mean = (whole[1, lane] / whole[0, lane] - best[2, lane]) / best[1, lane]
            found[2, first + lane] = np.float32(0) if one else mean


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _write(packed, exponents, tops, columns, powers, size, bits, stored, weight):
    """Write the levels for the stored scales and biases, packed as MLX does.

    That is a stream of bits, the first level lowest (mlx/backend/cpu/quantized.cpp, `quantize`,
    0.31). Return sums of squares of weights and errors, plain and weighted.
    """
    values, weights = np.empty((size, LANES), np.float32), np.empty((size, LANES), np.float32)
    levels = np.empty((size, LANES), np.int32)
    scale, bias = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    squares, totals = np.empty((4, LANES), np.float32), np.zeros(4, np.float64)
    for first in range(0, len(tops), LANES):
        _read(packed, exponents, tops, columns, powers, size, first, values, weights)
        for lane in range(LANES):
            group = min(first + lane, len(tops) - 1)
            scale[lane], bias[lane] = stored[0, group], stored[1, group]
        _levels(values, weights, size, (1 << bits) - 1, scale, bias, levels, squares)
        for lane in range(min(LANES, len(tops) - first)):
            square = np.float64(powers[tops[first + lane]]) ** 2
            for which in range(4):
                totals[which] += squares[which, lane] * square
        _pack(levels, size, bits, first, min(LANES, len(tops) - first), weight)
    return totals


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _levels(values, weights, size, most, scale, bias, levels, squares):
    """Compute the nearest levels, and each group's four sums of squares."""
    top, zero = np.float32(most), np.float32(0)
    squares[:] = zero
    for i in range(size):
        for lane in range(LANES):
            w, u = values[i, lane], weights[i, lane]
            step = scale[lane] if scale[lane] > 0 else np.float32(np.inf)
            level = min(max(np.rint((w - bias[lane]) / step), zero), top)
            miss = w - (level * scale[lane] + bias[lane])
            levels[i, lane] = np.int32(level)
            squares[0, lane] += w * w
            squares[1, lane] += miss * miss
            squares[2, lane] += u * w * w
            squares[3, lane] += u * miss * miss


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _pack(levels, size, bits, first, groups, weight):
    """Pack the levels of `groups` groups from `first` on: 32 levels make `bits` words."""
    words = np.empty((bits + 1, LANES), np.int64)
    for part in range(size // 32):
        words[:] = 0
        for i in range(32):
            word, place = i * bits // 32, i * bits % 32
            for lane in range(LANES):
                words[word, lane] |= np.int64(levels[32 * part + i, lane]) << place
        for word in range(bits):
            for lane in range(groups):
                at = ((first + lane) * (size // 32) + part) * bits + word
                weight[at] = words[word, lane] & 0xFFFFFFFF
            for lane in range(LANES):
                words[word + 1, lane] |= words[word, lane] >> 32
