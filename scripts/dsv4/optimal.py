"""4-bit affine with the least squared error that F16 scales and biases allow, group by group.

`mx.quantize` sees only a group's least and greatest value. This looks at all of them: a group whose
values lie on a lattice of 16 points (nearly half of them do) gets that lattice and is exact; for
the others every assignment of values to levels that can be the best (dsv4/assignments.py) is tried
with its least-squares scale and bias, and the winner is rounded to F16. Same format, same size,
same speed of inference as mx.quantize; but zeros are not promised to stay zeros.

Rounding: the scale to both of its F16 neighbours, for each the bias that is then the best one, with
the lattice held at its lower or at its upper end; of these four the best is taken, and twelve more
steps to each side are tried where that costs more than 0.05% of the error. Below 2^-14 F16 has
fewer bits, and the result is only near the optimum.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from dsv4.affine import Tally
from dsv4.assignments import VALUES, exact_step, kept_assignments
from dsv4.exact import bad_exponent
from dsv4.fp4 import UE8M0

N = len(VALUES)
LANES = 512  # assignments of one range, at most
EQUAL = 256  # the later ones win only where columns count unequally
COMMON = 112  # more than ever won among groups of ordinary weights: these come first
UNEVEN = 10  # a value that often: try the rare assignments too
NONE = -1


@dataclass(frozen=True)
class Table:
    """What the kernel looks up; a mask has bit i set when the group holds VALUES[i].

    lattices: int64 (32768, 2), by mask: (least value, step) of the exact lattice, or (range, 0).
    levels: float32 (ranges, 15, LANES), the assignments; values outside a range have level 0.
    lanes: int64 (ranges,), how many assignments there are.
    units: float64 (256,), by exponent byte: what one half is worth, 2^(e - 128).
    digest: 16 hex digits that change when another assignment could be chosen.
    """

    lattices: np.ndarray
    levels: np.ndarray
    lanes: np.ndarray
    units: np.ndarray
    digest: str


def build_table() -> Table:
    """Read the assignments and find the exact lattice of every set of values that has one."""
    kept = kept_assignments()
    levels = np.zeros((len(kept), N, LANES), np.float32)
    for which, ((low, high), rows) in enumerate(kept.items()):
        levels[which, VALUES.index(low) : VALUES.index(high) + 1, : len(rows)] = rows.T
    lanes = np.array([len(rows) for rows in kept.values()])
    lattices = _lattices(list(kept))
    units = np.append(UE8M0[:255].astype(np.float64) / 2, 0)
    digest = hashlib.sha256(
        b"1" + levels.astype("<f4").tobytes() + lattices.astype("<i8").tobytes()
    )
    return Table(lattices, levels, lanes, units, digest.hexdigest()[:16])


def _lattices(ranges: list[tuple[int, int]]) -> np.ndarray:
    out = np.zeros((1 << N, 2), np.int64)
    for mask in range(1, 1 << N):
        values = [value for i, value in enumerate(VALUES) if mask >> i & 1]
        step = exact_step(values)
        out[mask] = (values[0], step) if step else (ranges.index((values[0], values[-1])), 0)
    return out


def quantize(
    table: Table,
    packed: np.ndarray,
    exponents: np.ndarray,
    importance: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
) -> Tally:
    """Quantize n whole groups; the arrays are contiguous, the last three are written.

    packed, weight: int64 (2n,), sixteen codes or levels each, the lowest nibble is the first
    column, little-endian; exponents: uint8 (n,); scales, biases: uint16 (n,), the bits of F16;
    importance: positive, one for each column of a row, float64; or, when all count the same, empty
    and float32.
    Runs without the GIL. Raises BadGroup for an exponent of 255 and for values beyond F16.
    """
    bad, underflows, energy, error = _quantize(
        packed, exponents, importance, table.lattices, table.levels, table.lanes, table.units,
        weight, scales, biases,
    )  # fmt: skip
    if bad >= 0:
        raise bad_exponent(bad, int(exponents[bad]))
    return Tally(energy, error, underflows)


# --- One group: codes to numbers of each value --------------------------------------------------

_LOW_BITS = 0x1111111111111111
_PLANE = 0x3333333333333333
_PLACES = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0])  # code → index in VALUES
_VALUES = np.array(VALUES, np.float64)


@intrinsic
def _ones(typing_context, word):
    """The number of bits that are set in an int64."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), generate


@numba.njit(inline="always")
def _plane(low, high, bit):
    """Bit `bit` of each of the 32 codes in two words, gathered in one."""
    return ((low >> bit) & _LOW_BITS) | (((high >> bit) & _LOW_BITS) << 1)


@numba.njit(inline="always")
def _count(low, high, counts):
    """How often each value occurs, into counts; returns (mask, the greatest count)."""
    minus, four = _plane(low, high, 3), _plane(low, high, 2)
    two, one = _plane(low, high, 1), _plane(low, high, 0)
    mask, most, zeros = 0, 0, 32
    for magnitude in range(1, 8):
        these = (four if magnitude & 4 else ~four) & (two if magnitude & 2 else ~two)
        these &= (one if magnitude & 1 else ~one) & _PLANE
        below = _ones(these & minus)
        above = _ones(these) - below
        counts[7 - magnitude], counts[7 + magnitude] = below, above
        mask |= (below != 0) << (7 - magnitude) | (above != 0) << (7 + magnitude)
        most = max(most, below, above)
        zeros -= below + above
    counts[7] = zeros
    return mask | (zeros != 0) << 7, max(most, zeros)


@numba.njit(inline="always")
def _weigh(low, high, importance, first, weights):
    """The importance of the columns that hold each value, added up, into weights."""
    weights[:] = 0
    for column in range(16):
        weights[_PLACES[(low >> 4 * column) & 15]] += importance[first + column]
        weights[_PLACES[(high >> 4 * column) & 15]] += importance[first + 16 + column]


# --- One group: the best assignment -------------------------------------------------------------


_FAST = {"fastmath": True, "error_model": "numpy"}  # division without a branch: vectors
_SINGLE = _VALUES.astype(np.float32)
_MANY = np.float32(1e6)


@numba.njit(**_FAST)
def _best(levels, which, lanes, weights, sums, errors, keys):
    """The lane whose assignment leaves the least squared error, among the first `lanes`.

    levels: (ranges, 15, LANES); weights: (15,), float32 when they are whole numbers, so that all
    sums are exact, else float64. sums, (3, LANES) of the same dtype, takes each lane's Σ weight ·
    level, Σ weight · level² and Σ weight · value · level. errors and keys are one buffer, as
    float32 and as int32: an error of 0 or more orders like the integer with its bits, whose lowest
    nine give way to the lane.
    """
    total, values, squares = weights[0] * 0, weights[0] * 0, weights[0] * 0
    for value in range(N):
        moment = weights[value] * _SINGLE[value]
        total, values = total + weights[value], values + moment
        squares += moment * _SINGLE[value]
    sums[:, :lanes] = 0
    for value in range(0, N, 5):
        _add_five(levels, which, lanes, weights, value, sums)
    whole = total * squares - values * values
    least = total * total / _MANY
    for lane in range(lanes):
        spread = total * sums[1, lane] - sums[0, lane] * sums[0, lane]
        shared = total * sums[2, lane] - sums[0, lane] * values
        errors[lane] = max(whole - shared * (shared / max(spread, least)), whole * 0)
    best = np.int32(0x7FFFFFFF)
    for lane in range(lanes):
        best = min(best, np.int32((keys[lane] & -LANES) | lane))
    return best & (LANES - 1)


@numba.njit(inline="always", **_FAST)
def _add_five(levels, which, lanes, weights, i, sums):
    """Add what five values contribute; one at a time, memory would be the limit."""
    a, b, c, d, e = weights[i], weights[i + 1], weights[i + 2], weights[i + 3], weights[i + 4]
    a_moment, b_moment, c_moment = a * _SINGLE[i], b * _SINGLE[i + 1], c * _SINGLE[i + 2]
    d_moment, e_moment = d * _SINGLE[i + 3], e * _SINGLE[i + 4]
    for lane in range(lanes):
        p, q, r = levels[which, i, lane], levels[which, i + 1, lane], levels[which, i + 2, lane]
        s, t = levels[which, i + 3, lane], levels[which, i + 4, lane]
        sums[0, lane] += a * p + b * q + c * r + d * s + e * t
        sums[1, lane] += a * p * p + b * q * q + c * r * r + d * s * s + e * t * t
        sums[2, lane] += a_moment * p + b_moment * q + c_moment * r + d_moment * s + e_moment * t


@numba.njit(inline="always")
def _sums(weights, row):
    """(Σ weight, Σ level, Σ level², Σ value · level, Σ value, Σ value²), weighted, in halves."""
    total = first = second = mixed = sums = squares = 0.0
    for value in range(N):
        weight, level = np.float64(weights[value]), row[value]
        moment = weight * _VALUES[value]
        total += weight
        first += weight * level
        second += weight * level * level
        mixed += moment * level
        sums += moment
        squares += moment * _VALUES[value]
    return total, first, second, mixed, sums, squares


@numba.njit(inline="always")
def _nearest(scale, bias, row):
    """The nearest level of each value, into row."""
    for value in range(N):
        level = np.rint((_VALUES[value] - bias) / scale)
        row[value] = min(max(level, 0.0), 15.0)


@numba.njit(error_model="numpy")
def _settle(weights, row):
    """Levels and least squares by turns, until no level changes: row becomes a local optimum."""
    before = np.empty(N)
    for _ in range(20):
        total, first, second, mixed, values, _ = _sums(weights, row)
        spread = total * second - first * first
        if spread <= 0:
            return
        slope = (total * mixed - first * values) / spread
        before[:] = row
        _nearest(slope, (values - slope * first) / total, row)
        if (before == row).all():
            return


# --- One group: F16 -----------------------------------------------------------------------------

_SPLIT = 2.0**42 + 1  # leaves the highest 11 of a double's 53 bits (Veltkamp's splitting)
_NORMAL, _STEP, _LARGEST = 2.0**-14, 2.0**24, 65504.0
_NEXT = 1 + 1.5 * 2.0**-11  # leads from any F16 number to the next, after rounding
_SLACK, _FAR = 1.0005, 12  # when rounding costs more than this, look so many steps further


@numba.njit(error_model="numpy")
def _to_half(x):
    """The F16 number nearest to x, as a double; more than 65504 when there is none."""
    if abs(x) < _NORMAL:
        return np.rint(x * _STEP) / _STEP
    big = x * _SPLIT
    return big - (big - x)


@numba.njit(error_model="numpy")
def _steps_from(x, steps):
    """The F16 number `steps` steps above x, which is one of them."""
    size = abs(_to_half(x * _NEXT) - x) if abs(x) >= _NORMAL else 1 / _STEP
    return _to_half(x + steps * size)


@numba.njit(error_model="numpy")
def _try(sums, turned, slope, first_step, last_step, answer):
    """Try the F16 scales some steps from `slope`, each with its best bias; returns the best yet.

    sums: as _sums gives them, values in units of the source; answer: (error, scale, bias, turned).
    """
    total, first, second, mixed, values, squares = sums
    nearest = _to_half(slope)
    for steps in range(first_step, last_step + 1):
        scale = _steps_from(nearest, steps) if steps else nearest
        bias = _to_half((values - scale * first) / total)
        if abs(scale) <= _LARGEST and abs(bias) <= _LARGEST:
            error = squares - 2 * (scale * mixed + bias * values)
            error += scale * scale * second + 2 * scale * bias * first + bias * bias * total
            if error < answer[0]:
                answer = (error, scale, bias, turned)
    return answer


@numba.njit(error_model="numpy")
def _fit(sums, top, unit):
    """The best F16 scale and bias for an assignment.

    sums: as _sums gives them; top: the highest level in use; unit: what a half is worth. Returns
    (scale, bias, 1 if levels must be turned to top - level else 0); scale NaN when F16 has none.
    """
    total, first, second, mixed, values, squares = sums
    mixed, values, squares = mixed * unit, values * unit, squares * unit * unit
    spread = total * second - first * first
    slope = (total * mixed - first * values) / spread if spread > 0 else 0.0
    least = squares - (values * values + slope * slope * spread) / total
    upward = total, first, second, mixed, values, squares
    downward = (
        total, total * top - first, total * top * top - 2 * top * first + second,
        top * values - mixed, values, squares,
    )  # fmt: skip
    beside = 1 if slope > _to_half(slope) else -1
    answer = (np.inf, np.nan, np.nan, 0)
    answer = _try(upward, 0, slope, min(beside, 0), max(beside, 0), answer)
    answer = _try(downward, 1, -slope, min(-beside, 0), max(-beside, 0), answer)
    if answer[0] > least * _SLACK:
        answer = _try(upward, 0, slope, -_FAR, _FAR, answer)
        answer = _try(downward, 1, -slope, -_FAR, _FAR, answer)
    return answer[1], answer[2], answer[3]


@numba.njit(inline="always")
def _half_bits(x, single, bits):
    """The 16 bits of an F16 number given as a double; single and bits are one buffer of 4 bytes."""
    if abs(x) < _NORMAL:
        return np.int64(abs(x) * _STEP) | (0x8000 if x < 0 else 0)
    single[0] = x
    word = np.int64(bits[0])
    return ((word >> 13) & 0x3FFF) | ((word >> 16) & 0xC000)


@numba.njit(inline="always")
def _write(packed, group, row, by_code, weight):
    """Replace each code of a group by the level of its value."""
    for code in range(16):
        by_code[code] = np.int64(row[_PLACES[code]])
    for half in range(2 * group, 2 * group + 2):
        codes, word = packed[half], 0
        for shift in range(0, 64, 4):
            word |= by_code[(codes >> shift) & 15] << shift
        weight[half] = word


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _quantize(
    packed, exponents, importance, lattices, levels, lanes, units, weight, scales, biases
):
    """(first bad group or -1, underflows, sum of squares, sum of squared errors)."""
    underflows, energy, error = 0, 0.0, 0.0
    counts, row, errors = np.empty(N, np.float32), np.empty(N), np.empty(LANES, np.float32)
    weights, sums = np.empty(N, importance.dtype), np.empty((3, LANES), importance.dtype)
    keys, single, by_code = errors.view(np.int32), np.empty(1, np.float32), np.empty(16, np.int64)
    bits = single.view(np.int32)
    for group in range(len(exponents)):
        low, high, unit = packed[2 * group], packed[2 * group + 1], units[exponents[group]]
        mask, most = _count(low, high, counts)
        least, step = lattices[mask, 0], lattices[mask, 1]
        scale, bias = step * unit, least * unit
        for value in range(N):
            energy += counts[value] * (_VALUES[value] * unit) ** 2
        if step and _NORMAL <= scale <= _LARGEST and abs(bias) <= _LARGEST:
            inverse = 1 / step
            for value in range(N):  # values that are absent get levels that nobody reads
                row[value] = (_VALUES[value] - least) * inverse
        else:
            if len(importance):
                _weigh(low, high, importance, 32 * group % len(importance), weights)
            else:
                weights[:] = counts
            if step:
                for value in range(N):
                    row[value] = (_VALUES[value] - least) / step
            else:
                few = COMMON if most < UNEVEN else EQUAL
                few = LANES if len(importance) else few
                lane = _best(levels, least, min(few, lanes[least]), weights, sums, errors, keys)
                for value in range(N):
                    row[value] = levels[least, value, lane]
                if len(importance):
                    _settle(weights, row)
            top = 0.0
            for value in range(N):
                if counts[value] != 0:
                    top = max(top, row[value])
            if scale > _LARGEST:  # two levels so far apart: half the step
                row *= 2
                top *= 2
            scale, bias, turned = _fit(_sums(weights, row), top, unit)
            if exponents[group] == 255 or np.isnan(scale):
                return group, underflows, energy, error
            if turned:
                for value in range(N):
                    row[value] = top - row[value]
            if abs(scale) < _NORMAL and scale != 0:
                _nearest(scale / unit, bias / unit, row)
            underflows += scale == 0 and top > 0
            for value in range(N):
                if counts[value] != 0:
                    wrong = scale * row[value] + bias - _VALUES[value] * unit
                    error += counts[value] * wrong * wrong
        scales[group] = _half_bits(scale, single, bits)
        biases[group] = _half_bits(bias, single, bits)
        _write(packed, group, row, by_code, weight)
    return -1, underflows, energy, error
