"""The best of hundreds of assignments for each of many groups, by a walk through them.

For an assignment of values to levels, the least squared error of a group of 32 weights is
E = Σv² - V²/32 - shared² / (32 · spread), with V = Σv, shared = 32·Σ(v·level) - V·Σlevel and
spread = 32·Σlevel² - (Σlevel)². So the best assignment has the greatest shared² / spread. In halves
all of these but shared² are whole numbers below 2^24, exact in float32 whatever the order of
additions.

From one assignment to the next only few levels change. A walk is a list of single changes: after
each of them the sums are mended by three multiplications and the result is compared with the best
so far, crosswise, without a division. What lies between two assignments of the list is one as well.
The inner loops run over groups: the compiler makes vectors of them, whatever the machine's width.

These loops stand for LLVM code by hand that kept sixteen groups in registers. `optimal` as a whole
takes 1.22 × its time for one tensor with scales rounded up, 1.28 × with OCP's rule (1.26 to 1.31,
as others use the machine); compiled for AVX2 alone 1.28 and 1.32, for SSE2 1.13 and 1.15
(2026-11-25, AMD EPYC, 2 cores, x86-64, shared, numba 0.68.1; the tensor of `scripts/lab/bench.py
--kernels`, old and new alternating in one process, 15 pairs, CPU time). What that took: each array
of a loop is an allocation of its own, or the compiler cannot tell them apart; and telling them
apart costs some 100 ns a pass, so that a pass takes four steps through 2,048 groups. Two steps
through 512 were 1.47 ×.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from dsv4.weights.assignments import VALUES

GROUPS = 2048  # side by side
SPLIT = 2.0**42 + 1  # leaves the highest 11 of a double's 53 bits (Veltkamp's splitting)
NEXT = 1 + 1.5 * 2.0**-11  # leads from any F16 number to the next, after rounding
SLACK = 1.0005  # when rounding to F16 costs more than this, look further than one step
N = len(VALUES)
_SINGLE = np.array(VALUES, np.float32)
_WHOLE = {"contract"}  # fused or not, sums and products of such whole numbers are the same


@dataclass(frozen=True)
class Walk:
    """Single changes that lead through assignments; step s changes one value's level.

    places: int64 (steps,), the index of the value; deltas: float32, its new level less its old
    one; squares: float32, 32 × the new level² less 32 × the old one; rows: int64 (steps, values),
    all levels after the step.
    """

    places: np.ndarray
    deltas: np.ndarray
    squares: np.ndarray
    rows: np.ndarray


def walk_through(rows: np.ndarray) -> tuple[Walk, int]:
    """The walk from all levels 0 through assignments (n, values), in their order.

    Returns it with the step that reaches the first assignment, which is not the first step; an even
    number of steps is left. Steps that change nothing fill up. Levels fall from the least value on
    and then rise from the greatest on, so that what lies between two assignments keeps the order of
    the values.
    """
    now, out, start = np.zeros(rows.shape[1], np.int64), [], 0

    def change(i: int, level: int) -> None:
        old, now[i] = now[i], level
        out.append((i, level - old, 32 * (level**2 - old**2), now.copy()))

    change(0, 0)
    for row in rows:
        for i in range(len(row)):
            if row[i] < now[i]:
                change(i, row[i])
        for i in reversed(range(len(row))):
            if row[i] > now[i]:
                change(i, row[i])
        start = start or len(out) - 1
    if (len(out) - start) % 2:
        change(0, now[0])
    places, deltas, squares, levels = zip(*out, strict=True)
    steps = np.array(places), np.array(deltas, np.float32), np.array(squares, np.float32)
    return Walk(*steps, np.array(levels)), start


class Sums(NamedTuple):
    """By group, float32 (n,): Σ level, 32 · Σ level², 32 · Σ value · level."""

    level: np.ndarray
    square: np.ndarray
    mixed: np.ndarray


class Best(NamedTuple):
    """By group, (n,), of the best step so far: shared², spread and Σ level, float32; which it is,
    int32."""

    power: np.ndarray
    spread: np.ndarray
    level: np.ndarray
    step: np.ndarray


@numba.njit(nogil=True, cache=True)
def go(words, levels, places, deltas, squares, first, start, stop, last):
    """Walk n groups from step `first` up to `stop`, comparing from step `start` on.

    words: int64 (2, n), the first sixteen codes of each group, and the others; levels: float32
    (steps, 16), those after each step; places, deltas, squares: as in Walk. stop - start is even
    and positive, and start - first is positive; last: the index of the greatest value. Returns
    int32 (5, n): the best step; the F16 bits of scale and bias, in halves; 1 if levels must be
    turned, else 0; 1 if rounding costs more than SLACK;
    float64 (7, n): Σ level, Σ level², Σ value · level, Σ value, Σ value², the greatest level, the
    squared error.
    """
    n = words.shape[1]
    counts, values, energies = np.empty((N + 1, n), np.float32), _zeros(n), _zeros(n)
    _count(words[0], words[1], counts, values, energies)
    best = _find(counts, values, places, deltas, squares, first, start, stop)
    whole, real = np.empty((5, n), np.int32), np.empty((7, n))
    for i in range(n):
        square = best.spread[i] + best.level[i] * best.level[i]
        shared = np.sqrt(best.power[i])  # exact, and positive, as levels rise with the values
        mixed = shared + best.level[i] * values[i]
        real[0, i], real[1, i], real[2, i] = best.level[i], square / 32, mixed / 32
        real[3, i], real[4, i] = values[i], energies[i]
    for i in range(n):
        whole[0, i], real[5, i] = best.step[i], levels[best.step[i], last]
    _fit(real, whole)
    return whole, real


@numba.njit(inline="always")
def _zeros(n):
    return np.zeros(n, np.float32)


# --- How often each value occurs ----------------------------------------------------------------


@numba.njit(inline="always")
def ones(word):
    """The number of bits that are set in a uint64, as float32: LLVM knows this way of counting."""
    twos = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    fours = (twos & pairs) + ((twos >> np.uint64(2)) & pairs)
    bytes_ = (fours + (fours >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.float32(np.int32((bytes_ * np.uint64(0x0101010101010101)) >> np.uint64(56)))


@numba.njit
def _count(low, high, counts, values, energies):
    """How often each value occurs in each group, into counts, float32 (16, n), of which the last
    row is that of -0, which 0 counts too; adds Σ value and Σ value² to values and energies."""
    planes = (
        _plane(low, high, 0), _plane(low, high, 1), _plane(low, high, 2), _plane(low, high, 3),
    )  # fmt: skip
    for magnitude in range(8):
        below, above = counts[7 - magnitude if magnitude else N], counts[7 + magnitude]
        _count_both(planes, magnitude, below, above, values, energies)


@numba.njit
def _plane(low, high, bit):
    """Bit `bit` of each of the 32 codes in two words, gathered in one word of 32 bits."""
    every, plane = 0x1111111111111111, np.empty(len(low), np.uint32)
    for i in range(len(plane)):
        both = ((low[i] >> bit) & every) | ((high[i] >> bit) & every) << 1
        plane[i] = both | both >> 30
    return plane


@numba.njit
def _count_both(planes, magnitude, below, above, values, energies):
    """How often minus and plus a magnitude occur. No array may lie in another's place, or vectors
    cannot be used."""
    one, two, four, minus = planes
    no_one, no_two = np.uint32((magnitude & 1) - 1), np.uint32((magnitude >> 1 & 1) - 1)
    no_four = np.uint32((magnitude >> 2) - 1)
    value = _SINGLE[7 + magnitude]
    for i in range(len(minus)):
        these = (one[i] ^ no_one) & (two[i] ^ no_two) & (four[i] ^ no_four)
        negative, all_ = ones(np.uint64(these & minus[i])), ones(np.uint64(these))
        positive = all_ - negative
        below[i], above[i] = negative, positive if magnitude else all_
        values[i] += value * (positive - negative)
        energies[i] += value * value * all_


# --- The walk -----------------------------------------------------------------------------------


@numba.njit
def _find(counts, values, places, deltas, squares, first, start, stop):
    """The walk itself: counts as of _count, values float32 (n,), Σ value; returns a Best."""
    n = len(values)
    sums = Sums(_zeros(n), _zeros(n), _zeros(n))
    best = Best(_zeros(n), np.ones(n, np.float32), _zeros(n), np.zeros(n, np.int32))
    changes = counts, places, deltas, squares
    for step in range(first, start):
        _pass(_change(step, changes), sums)
    for step in range(start, stop - 2, 4):
        two = _change(step, changes), _change(step + 1, changes)
        more = _change(step + 2, changes), _change(step + 3, changes)
        _compare_four(np.int32(step), two, more, values, sums, best)
    if (stop - start) % 4:
        two = _change(stop - 2, changes), _change(stop - 1, changes)
        _compare_two(np.int32(stop - 2), two, values, sums, best)
    return best


@numba.njit(inline="always")
def _change(step, changes):
    """A step: how often its value occurs, (n,), and what is added to Sums for each of them."""
    counts, places, deltas, squares = changes
    place, delta = places[step], deltas[step]
    return counts[place], (delta, squares[step], np.float32(32) * _SINGLE[place] * delta)


@numba.njit(fastmath=_WHOLE)
def _pass(change, sums):
    """Take a step without a comparison."""
    count, by = change
    for i in range(len(count)):
        now = sums.level[i], sums.square[i], sums.mixed[i]
        sums.level[i], sums.square[i], sums.mixed[i] = _mended(now, count[i], by)


@numba.njit(fastmath=_WHOLE)
def _compare_two(step, two, values, sums, best):
    """Take two steps, the first is number `step`, and keep what is better than the best so far."""
    (a, by_a), (b, by_b) = two
    for i in range(len(values)):
        now = sums.level[i], sums.square[i], sums.mixed[i]
        record = best.power[i], best.spread[i], best.level[i], best.step[i]
        now, record = _two(step, a[i], by_a, b[i], by_b, values[i], now, record)
        sums.level[i], sums.square[i], sums.mixed[i] = now
        best.power[i], best.spread[i], best.level[i], best.step[i] = record


@numba.njit(fastmath=_WHOLE)
def _compare_four(step, two, more, values, sums, best):
    """The same as _compare_two twice, reading and writing sums and best once."""
    (a, by_a), (b, by_b) = two
    (c, by_c), (d, by_d) = more
    for i in range(len(values)):
        now = sums.level[i], sums.square[i], sums.mixed[i]
        record = best.power[i], best.spread[i], best.level[i], best.step[i]
        now, record = _two(step, a[i], by_a, b[i], by_b, values[i], now, record)
        now, record = _two(np.int32(step + 2), c[i], by_c, d[i], by_d, values[i], now, record)
        sums.level[i], sums.square[i], sums.mixed[i] = now
        best.power[i], best.spread[i], best.level[i], best.step[i] = record


@numba.njit(inline="always", fastmath=_WHOLE)
def _two(step, count, by, next_count, next_by, value, sums, record):
    """Sums after two steps, and the better of the record and of the better step."""
    sums = _mended(sums, count, by)
    one = _candidate(sums, value, step)
    sums = _mended(sums, next_count, next_by)
    other = _candidate(sums, value, np.int32(step + 1))
    return sums, _better(record, _better(one, other))


@numba.njit(inline="always", fastmath=_WHOLE)
def _mended(sums, count, by):
    return sums[0] + count * by[0], sums[1] + count * by[1], sums[2] + count * by[2]


@numba.njit(inline="always", fastmath=_WHOLE)
def _candidate(sums, value, step):
    """What Best holds of a step."""
    level, square, mixed = sums
    shared = mixed - value * level
    return shared * shared, square - level * level, level, step


@numba.njit(inline="always", fastmath=_WHOLE)
def _better(one, other):
    """The one with the greater shared² / spread; the first of equals."""
    ahead = other[0] * one[1] > one[0] * other[1]
    return (
        other[0] if ahead else one[0],
        other[1] if ahead else one[1],
        other[2] if ahead else one[2],
        other[3] if ahead else one[3],
    )


# --- F16 ----------------------------------------------------------------------------------------


@numba.njit(error_model="numpy")
def _fit(real, whole):
    """What optimal._fit does before its far steps, for 32 weights in halves: `go` says of what.

    Operation for operation the same; a division by 32 is exact, and so is multiplying instead.
    """
    for i in range(real.shape[1]):
        first, second, mixed = real[0, i], real[1, i], real[2, i]
        values, squares, top = real[3, i], real[4, i], real[5, i]
        spread = second * 32 - first * first
        slope = (mixed * 32 - first * values) / spread
        least = squares - (values * values + slope * slope * spread) * (1 / 32)
        near = _half(slope)
        size = _half(near * NEXT) - near  # a slope is positive
        far = _half(near + (size if slope > near else -size))
        low, high = min(near, far), max(near, far)
        best = _rounded(low, first, second, mixed, values, squares)
        best = _less(best, _rounded(high, first, second, mixed, values, squares))
        second = top * top * 32 - top * 2 * first + second
        first, mixed = top * 32 - first, top * values - mixed
        best = _less(best, _rounded(-high, first, second, mixed, values, squares))
        best = _less(best, _rounded(-low, first, second, mixed, values, squares))
        error, scale, bias = best
        real[6, i] = error
        whole[1, i], whole[2, i] = _half_bits(scale), _half_bits(bias)
        whole[3, i], whole[4, i] = scale < 0, error > least * SLACK


@numba.njit(inline="always")
def _half(x):
    """The nearest F16 number, where it is a normal one: Veltkamp's splitting."""
    big = x * SPLIT
    return big - (big - x)


@numba.njit(inline="always")
def _half_bits(x):
    """int32: the 16 bits of an F16 number that is a normal one."""
    bits = np.float32(x).view(np.int32)
    return ((bits >> 13) & 0x3FFF) | ((bits >> 16) & 0xC000)


@numba.njit(inline="always")
def _rounded(scale, first, second, mixed, values, squares):
    """(error, scale, bias) with the F16 bias that is best for an F16 scale."""
    bias = _half((values - scale * first) * (1 / 32))
    error = squares - (scale * mixed + bias * values) * 2
    error = error + (scale * scale * second + scale * 2 * bias * first + bias * bias * 32)
    return error, scale, bias


@numba.njit(inline="always")
def _less(one, other):
    """The one with the smaller error; the first of equals."""
    behind = one[0] > other[0]
    return (
        other[0] if behind else one[0],
        other[1] if behind else one[1],
        other[2] if behind else one[2],
    )
