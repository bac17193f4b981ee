"""4-bit affine with the least squared error that F16 scales and biases allow, group by group.

`mx.quantize` sees only a group's least and greatest value. This looks at all of them: a group whose
values lie on a lattice of 16 points (nearly half of them do) gets that lattice and is exact; for
the others the assignments of values to levels that can be the best (assignments.py) are all
tried with their least-squares scales and biases, many groups at a time (walk.py), and the
winner is rounded to F16. Same format, same size, same speed of inference as mx.quantize; but zeros
are not promised to stay zeros.

Rounding: the scale to both of its F16 neighbours, for each the bias that is then the best one, with
the lattice held at its lower or at its upper end; of these four the best is taken, and twelve more
steps to each side are tried where that costs more than 0.05% of the error. Below 2^-14 F16 has
fewer bits, and the result is only near the optimum.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np

from dsv4.weights import walk
from dsv4.weights.affine import Tally
from dsv4.weights.assignments import VALUES, exact_step, kept_sections
from dsv4.weights.exact import bad_exponent
from dsv4.weights.fp4 import E2M1, UE8M0
from dsv4.weights.vectors import ENERGY_BITS, look_up
from dsv4.weights.walk import NEXT, SLACK, SPLIT, ones

N = len(VALUES)
LANES = 512  # assignments of one range, at most
# Exponent bytes with which all scales and biases are normal F16 numbers, so that a power of two
# only moves their exponents.
PLAIN_FIRST, PLAIN_LAST = 115, 139


class Arrays(NamedTuple):
    """What the kernel looks up; a mask has bit i set when the group holds VALUES[i].

    kinds: int16 (32768,), by mask: the row of the exact lattice, or -1 - range.
    lattices: int64 (rows, 2): (least value, step) of each exact lattice.
    halves: int64 (rows, 3): the F16 bits of step and least value, and -1 if that is not 0, else 0.
    rows: uint8 (rows, 64), two lookups by code (vectors.look_up): the level; the value's square.
      Exact lattices come first, then two for each step of a walk: upward, and turned.
    levels: float32 (steps, 16), by value: the levels after each step of the walks.
    places, deltas, squares: the steps of all walks (walk.Walk).
    walks: int64 (ranges, 5): first step, first to be compared, end, first row, index of the
      greatest value.
    lanes: int64 (ranges,), how many assignments there are.
    assignments: float32 (ranges, 15, LANES); values outside a range have level 0.
    units: float64 (256,), by exponent byte: what one half is worth, 2^(e - 128).
    """

    kinds: np.ndarray
    lattices: np.ndarray
    halves: np.ndarray
    rows: np.ndarray
    levels: np.ndarray
    places: np.ndarray
    deltas: np.ndarray
    squares: np.ndarray
    walks: np.ndarray
    lanes: np.ndarray
    assignments: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class Table:
    """What the kernel looks up, and 16 hex digits that change when any group's answer could."""

    arrays: Arrays
    digest: str


def build_table() -> Table:
    """Read the assignments and find the exact lattice of every set of values that has one."""
    kept = kept_sections()
    assignments = np.zeros((len(kept), N, LANES), np.float32)
    lanes = np.zeros(len(kept), np.int64)
    for which, ((low, high), sections) in enumerate(kept.items()):
        rows = np.concatenate(sections)
        assignments[which, VALUES.index(low) : VALUES.index(high) + 1, : len(rows)] = rows.T
        lanes[which] = len(rows)
    kinds, lattices = _lattices(list(kept))
    exact = (np.array(VALUES) - lattices[:, :1]) / lattices[:, 1:]
    halves = np.column_stack([
        lattices[:, 1].astype(np.float16).view(np.uint16),
        lattices[:, 0].astype(np.float16).view(np.uint16),
        -(lattices[:, 0] != 0).astype(np.int64),
    ]).astype(np.int64)  # fmt: skip
    steps, walks = _walks(kept, len(lattices))
    levels = np.zeros((len(steps.rows), 16), np.float32)
    levels[:, :N] = steps.rows
    last = walks[:, 4].repeat(np.diff([*walks[:, 0], len(steps.rows)]))
    turned = steps.rows[np.arange(len(last)), last][:, None] - steps.rows
    both = np.stack([steps.rows, turned], axis=1).reshape(-1, N)
    arrays = Arrays(
        kinds, lattices, halves, _by_code(np.vstack([exact, both])), levels,
        steps.places, steps.deltas, steps.squares, walks, lanes, assignments,
        np.append(UE8M0[:255].astype(np.float64) / 2, 0),
    )  # fmt: skip
    digest = hashlib.sha256(b"2")
    for array in arrays._replace(places=2 * arrays.places):  # bundles bear digests made like this
        digest.update(np.ascontiguousarray(array).tobytes())
    return Table(arrays, digest.hexdigest()[:16])


def _lattices(ranges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """`kinds` and `lattices` of the arrays."""
    kinds, found = np.zeros(1 << N, np.int16), {}
    for mask in range(1, 1 << N):
        values = [value for i, value in enumerate(VALUES) if mask >> i & 1]
        step = exact_step(values)
        if step:
            kinds[mask] = found.setdefault((values[0], step), len(found))
        else:
            kinds[mask] = -1 - ranges.index((values[0], values[-1]))
    return kinds, np.array(list(found))


def _walks(
    kept: dict[tuple[int, int], list[np.ndarray]], first_row: int
) -> tuple[walk.Walk, np.ndarray]:
    """One walk for all ranges, one after the other, and `walks` of the arrays."""
    parts, walks, first = [], [], 0
    for (low, high), (plain, _) in kept.items():
        outside = ((0, 0), (VALUES.index(low), N - 1 - VALUES.index(high)))
        steps, start = walk.walk_through(np.pad(plain, outside))
        parts.append(steps)
        end = first + len(steps.rows)
        walks.append((first, first + start, end, first_row + 2 * first, VALUES.index(high)))
        first = end
    columns = zip(*((w.places, w.deltas, w.squares, w.rows) for w in parts), strict=True)
    return walk.Walk(*map(np.concatenate, columns)), np.array(walks)


def _by_code(levels: np.ndarray) -> np.ndarray:
    """Rows for vectors.look_up, uint8 (n, 64), of levels (n, 15) by value; nobody reads those of
    values that are absent."""
    out = np.zeros((len(levels), 64), np.uint8)
    out[:, :16] = np.clip(np.rint(levels), 0, 15)[:, _PLACES]
    out[:, 16:32] = np.rint(4 * E2M1.astype(np.float64) ** 2)
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
    importance: float64, positive, one for each column of a row; or empty, when all count the same.
    Runs without the GIL. Raises BadGroup for an exponent of 255 and for values beyond F16.
    """
    if len(importance):
        found = _quantize_weighted(
            table.arrays, packed, exponents, importance, weight, scales, biases
        )
    else:
        found = _quantize(table.arrays, packed, exponents, weight, scales, biases)
    bad, underflows, energy, error = found
    if bad >= 0:
        raise bad_exponent(bad, int(exponents[bad]))
    return Tally(energy, error, underflows)


# --- One group: codes to numbers of each value --------------------------------------------------

_LOW_BITS = 0x1111111111111111
_PLANE = 0x3333333333333333
_PLACES = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0])  # code → index in VALUES
_VALUES = np.array(VALUES, np.float64)


@numba.njit(inline="always")
def _plane(low, high, bit):
    """Bit `bit` of each of the 32 codes in two words, gathered in one."""
    return ((low >> bit) & _LOW_BITS) | (((high >> bit) & _LOW_BITS) << 1)


@numba.njit(inline="always")
def _mask(low, high):
    """Which values occur."""
    minus, four = _plane(low, high, 3), _plane(low, high, 2)
    two, one = _plane(low, high, 1), _plane(low, high, 0)
    mask = ((~four & ~two & ~one & _PLANE) != 0) << 7
    for magnitude in range(1, 8):
        these = (four if magnitude & 4 else ~four) & (two if magnitude & 2 else ~two)
        these &= (one if magnitude & 1 else ~one) & _PLANE
        mask |= ((these & minus) != 0) << (7 - magnitude)
        mask |= ((these & ~minus) != 0) << (7 + magnitude)
    return mask


@numba.njit(inline="always")
def _count(low, high, counts, at):
    """How often each value occurs, into counts[at]."""
    minus, four = _plane(low, high, 3), _plane(low, high, 2)
    two, one = _plane(low, high, 1), _plane(low, high, 0)
    zeros = 32
    for magnitude in range(1, 8):
        these = (four if magnitude & 4 else ~four) & (two if magnitude & 2 else ~two)
        these &= (one if magnitude & 1 else ~one) & _PLANE
        below = np.int32(ones(np.uint64(these & minus)))
        above = np.int32(ones(np.uint64(these))) - below
        counts[at, 7 - magnitude], counts[at, 7 + magnitude] = below, above
        zeros -= below + above
    counts[at, 7] = zeros


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

    levels: (ranges, 15, LANES); weights: float64 (15,). sums, float64 (3, LANES), takes each lane's
    Σ weight · level, Σ weight · level² and Σ weight · value · level. errors and keys are one
    buffer, as float32 and as int32: an error of 0 or more orders like the integer with its bits,
    whose lowest nine give way to the lane.
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

_NORMAL, _STEP, _LARGEST = 2.0**-14, 2.0**24, 65504.0
_FAR = 12  # so many steps further


@numba.njit(error_model="numpy")
def _to_half(x):
    """The F16 number nearest to x, as a double; more than 65504 when there is none."""
    if abs(x) < _NORMAL:
        return np.rint(x * _STEP) / _STEP
    big = x * SPLIT
    return big - (big - x)


@numba.njit(error_model="numpy")
def _steps_from(x, steps):
    """The F16 number `steps` steps above x, which is one of them."""
    size = abs(_to_half(x * NEXT) - x) if abs(x) >= _NORMAL else 1 / _STEP
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
    (error, scale, bias, 1 if levels must be turned to top - level else 0); scale NaN when F16 has
    none.
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
    if answer[0] > least * SLACK:
        answer = _try(upward, 0, slope, -_FAR, _FAR, answer)
        answer = _try(downward, 1, -slope, -_FAR, _FAR, answer)
    return answer


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


@numba.njit(error_model="numpy")
def _finish(group, exponent, unit, counts, weights, row, packed, weight, scales, biases):
    """Fit an assignment's F16 scale and bias and write the group, at any exponent.

    row: float64 (15,), the levels, changed. Returns (bad or not, underflow or not, error).
    """
    single, by_code = np.empty(1, np.float32), np.empty(16, np.int64)
    top = 0.0
    for value in range(N):
        if counts[value] != 0:
            top = max(top, row[value])
    _, scale, bias, turned = _fit(_sums(weights, row), top, unit)
    if exponent == 255 or np.isnan(scale):
        return True, False, 0.0
    if turned:
        for value in range(N):
            row[value] = top - row[value]
    if abs(scale) < _NORMAL and scale != 0:
        _nearest(scale / unit, bias / unit, row)
    error = 0.0
    for value in range(N):
        if counts[value] != 0:
            wrong = scale * row[value] + bias - _VALUES[value] * unit
            error += counts[value] * wrong * wrong
    scales[group] = _half_bits(scale, single, single.view(np.int32))
    biases[group] = _half_bits(bias, single, single.view(np.int32))
    _write(packed, group, row, by_code, weight)
    return False, scale == 0 and top > 0, error


@numba.njit(error_model="numpy")
def _on_lattice(arrays, kind, group, exponent, packed, weights, counts, weight, scales, biases):
    """A group with an exact lattice whose exponent is near an end of F16; as _finish returns."""
    least, step = arrays.lattices[kind, 0], arrays.lattices[kind, 1]
    unit, row = arrays.units[exponent], np.empty(N)
    for value in range(N):  # values that are absent get levels that nobody reads
        row[value] = (_VALUES[value] - least) / step
    scale, bias = step * unit, least * unit
    if _NORMAL <= scale <= _LARGEST and abs(bias) <= _LARGEST:
        single, by_code = np.empty(1, np.float32), np.empty(16, np.int64)
        scales[group] = _half_bits(scale, single, single.view(np.int32))
        biases[group] = _half_bits(bias, single, single.view(np.int32))
        _write(packed, group, row, by_code, weight)
        return False, False, 0.0
    if scale > _LARGEST:  # two levels so far apart: half the step
        row *= 2
    return _finish(group, exponent, unit, counts, weights, row, packed, weight, scales, biases)


# --- All groups ---------------------------------------------------------------------------------

_BLOCK = 1 << 15
_ENERGY = (1 << ENERGY_BITS) - 1


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _quantize(arrays, packed, exponents, weight, scales, biases):
    """(first bad group or -1, underflows, sum of squares, sum of squared errors).

    Block by block: groups with an exact lattice at once, the others sorted by range and then
    walk.GROUPS at a time.
    """
    bad, underflows, energy, error = len(exponents), 0, 0.0, 0.0
    keys = len(arrays.walks)
    kinds, many = np.empty(_BLOCK, np.int64), np.zeros(keys + 1, np.int64)
    lists = np.empty((keys + 1, _BLOCK), np.int32)
    for start in range(0, len(exponents), _BLOCK):
        _sort(arrays, packed[2 * start : 2 * (start + _BLOCK)], kinds, lists, many)
        for key in range(keys + 1):
            mine = lists[key, : many[key]]
            if key == keys:
                found = _exact(
                    arrays, start, mine, kinds, packed, exponents, weight, scales, biases
                )
            else:
                found = _walked(arrays, start, mine, key, packed, exponents, weight, scales, biases)
            bad, underflows = min(bad, found[0]), underflows + found[1]
            energy, error = energy + found[2], error + found[3]
    return bad if bad < len(exponents) else -1, underflows, energy, error


@numba.njit(error_model="numpy")
def _sort(arrays, words, kinds, lists, many):
    """Each group's kind (Arrays.kinds), and the groups by range, those with a lattice last."""
    last, n = len(many) - 1, len(words) >> 1
    for i in range(n):
        kinds[i] = _mask(words[2 * i], words[2 * i + 1])
    many[:] = 0
    for i in range(n):  # without a branch, which would be a coin's throw
        kind = np.int64(arrays.kinds[kinds[i]])
        kinds[i] = kind
        key = -1 - kind if kind < 0 else last
        lists[key, many[key]] = i
        many[key] += 1


@numba.njit(error_model="numpy")
def _exact(arrays, start, mine, kinds, packed, exponents, weight, scales, biases):
    """Groups start + mine, which have an exact lattice; returns as _quantize, len for no bad one.

    Between PLAIN_FIRST and PLAIN_LAST an exponent is added to the lattice's F16 bits.
    """
    bad, underflows, energy, error = len(exponents), 0, 0.0, 0.0
    numbers = np.zeros((1, 16), np.int32)
    for at in range(len(mine)):
        group, kind = start + np.int64(mine[at]), kinds[mine[at]]
        exponent = np.int64(exponents[group])
        unit = arrays.units[exponent]
        if PLAIN_FIRST <= exponent <= PLAIN_LAST:
            shift = (exponent - 128) << 10
            scales[group] = arrays.halves[kind, 0] + shift
            biases[group] = arrays.halves[kind, 1] + (shift & arrays.halves[kind, 2])
            energies = look_up(packed, group, arrays.rows, kind, weight)
            energy += (energies & _ENERGY) * (unit * unit)
            continue
        _count(packed[2 * group], packed[2 * group + 1], numbers, 0)
        wrong, lost, more = _on_lattice(
            arrays, kind, group, exponent, packed, numbers[0], numbers[0], weight, scales, biases
        )
        bad = min(bad, group) if wrong else bad
        underflows, error = underflows + lost, error + more
        energy += _energy(numbers[0]) * (unit * unit)
    return bad, underflows, energy, error


@numba.njit(error_model="numpy")
def _walked(arrays, start, mine, key, packed, exponents, weight, scales, biases):
    """Groups start + mine, all of one range, through its walk; returns as _exact."""
    bad, underflows, energy, error = len(exponents), 0, 0.0, 0.0
    first, begin, stop, row, last = arrays.walks[key]
    numbers = np.zeros((1, 16), np.int32)
    for at in range(0, len(mine), walk.GROUPS):
        here = min(walk.GROUPS, len(mine) - at)
        codes = np.empty((2, here), np.int64)
        for i in range(here):
            group = start + np.int64(mine[at + i])
            codes[0, i], codes[1, i] = packed[2 * group], packed[2 * group + 1]
        whole, real = walk.go(
            codes, arrays.levels, arrays.places, arrays.deltas, arrays.squares,
            first, begin, stop, last,
        )  # fmt: skip
        for i in range(here):
            group, step = start + np.int64(mine[at + i]), np.int64(whole[0, i])
            exponent = np.int64(exponents[group])
            unit = arrays.units[exponent]
            energy += real[4, i] * (unit * unit)
            if PLAIN_FIRST <= exponent <= PLAIN_LAST:
                if whole[4, i]:
                    _look_further(whole, real, i)
                shift = (exponent - 128) << 10
                scales[group] = whole[1, i] + shift
                biases[group] = whole[2, i] + shift
                turned = row + 2 * (step - first) + whole[3, i]
                look_up(packed, group, arrays.rows, turned, weight)
                error += max(real[6, i], 0.0) * (unit * unit)
                continue
            _count(codes[0, i], codes[1, i], numbers, 0)
            wrong, lost, more = _finish(
                group, exponent, unit, numbers[0], numbers[0],
                arrays.levels[step, :N].astype(np.float64), packed, weight, scales, biases,
            )  # fmt: skip
            bad = min(bad, group) if wrong else bad
            underflows, error = underflows + lost, error + more
    return bad, underflows, energy, error


@numba.njit(error_model="numpy")
def _look_further(whole, real, i):
    """Replace scale, bias, turned and error of group i (walk.go) by those of _fit."""
    sums = 32.0, real[0, i], real[1, i], real[2, i], real[3, i], real[4, i]
    error, scale, bias, turned = _fit(sums, real[5, i], 1.0)
    single = np.empty(1, np.float32)
    whole[1, i] = _half_bits(scale, single, single.view(np.int32))
    whole[2, i] = _half_bits(bias, single, single.view(np.int32))
    whole[3, i], real[6, i] = turned, error


@numba.njit(inline="always")
def _energy(counts):
    """The sum of squares of a group, in halves."""
    energy = 0.0
    for value in range(N):
        energy += counts[value] * _VALUES[value] ** 2
    return energy


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _quantize_weighted(arrays, packed, exponents, importance, weight, scales, biases):
    """As _quantize, where columns count unequally: all assignments, one group at a time."""
    underflows, energy, error = 0, 0.0, 0.0
    numbers, row, errors = np.zeros((1, 16), np.int32), np.empty(N), np.empty(LANES, np.float32)
    counts = numbers[0]
    weights, sums = np.empty(N), np.empty((3, LANES))
    keys = errors.view(np.int32)
    for group in range(len(exponents)):
        low, high = packed[2 * group], packed[2 * group + 1]
        exponent = np.int64(exponents[group])
        unit = arrays.units[exponent]
        kind = np.int64(arrays.kinds[_mask(low, high)])
        _count(low, high, numbers, 0)
        energy += _energy(counts) * unit**2
        _weigh(low, high, importance, 32 * group % len(importance), weights)
        if kind >= 0:
            wrong, lost, more = _on_lattice(
                arrays, kind, group, exponent, packed, weights, counts, weight, scales, biases
            )
        else:
            which = -1 - kind
            lanes = arrays.lanes[which]
            lane = _best(arrays.assignments, which, lanes, weights, sums, errors, keys)
            for value in range(N):
                row[value] = arrays.assignments[which, value, lane]
            _settle(weights, row)
            wrong, lost, more = _finish(
                group, exponent, unit, counts, weights, row, packed, weight, scales, biases
            )
        if wrong:
            return group, underflows, energy, error
        underflows += lost
        error += more
    return -1, underflows, energy, error
