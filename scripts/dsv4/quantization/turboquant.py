"""TurboQuant: rotate each row at random and code its numbers with one codebook.

A row of d weights is multiplied by fixed signs and by an orthonormal Walsh-Hadamard matrix. After
that its numbers, divided by the row's norm, are distributed as one coordinate of a random point on
the unit sphere, whatever the weights were. So one codebook fits all rows of that length. A row
is stored as its norm in F16 and a code for each number. (Zandieh and others, TurboQuant,
arXiv:2504.19874; on disk as jang_tools.turboquant.linear, `tq_quantize_weight`, 2.5.50 has it.)

The bytes are jang's for the decoded float32 with MLX on a CPU, which sums a row sequentially.
Metal sums in another order, which changes a few norms by one step of F16.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.affine_table import BadGroup, ErrorStats, bad_exponent
from dsv4.quantization.fp4 import E2M1, UE8M0

BITS, EACH = 2, 16  # bits of a code; codes in a word of 32 bits
SEED = 42  # of the signs
POINTS, ROUNDS = 10_000, 200  # points of the codebook's grid; most rounds of its search
LANES = 16  # rows that are rotated together, to fill the processor's vectors


@functools.cache
def signs(columns: int) -> np.ndarray:
    """Return the random signs of a row: float32 (columns,), 1 or -1."""
    chosen = np.random.default_rng(SEED).choice([-1.0, 1.0], size=columns)
    return chosen.astype(np.float32)


@functools.cache
def codebook(columns: int) -> np.ndarray:
    """Return the levels of normalized rows, float32 (4,), ascending.

    Lloyd's algorithm on a grid, for the density of one coordinate on the unit sphere in `columns`
    dimensions. After jang_tools.turboquant.codebook, `compute_codebook`, 2.5.50.
    """
    grid = np.linspace(-1.0, 1.0, POINTS)
    density = _density(grid, columns)
    reach = 3.0 / math.sqrt(columns)
    levels = np.linspace(-reach, reach, 1 << BITS)
    for _ in range(ROUNDS):
        cells = np.searchsorted(grid, [-1.0, *(levels[:-1] + levels[1:]) / 2.0])
        ends = [*cells[1:], POINTS]
        better = np.array([
            _centroid(grid[first:end], density[first:end], level)
            for first, end, level in zip(cells, ends, levels, strict=True)
        ])  # fmt: skip
        if np.allclose(levels, better, atol=1e-10):
            break
        levels = better
    return np.sort(levels).astype(np.float32)


def _density(grid: np.ndarray, columns: int) -> np.ndarray:
    """Return the density (1 - x²)^((d - 3) / 2), normalized to integral 1, float64."""
    constant = math.lgamma(columns / 2.0) - 0.5 * math.log(math.pi)
    constant -= math.lgamma((columns - 1) / 2.0)
    inside = np.log(np.maximum(1.0 - grid**2, 1e-30))
    density = np.exp(constant + (columns - 3) / 2.0 * inside)
    return density / np.trapezoid(density, grid)


def _centroid(grid: np.ndarray, density: np.ndarray, level: float) -> float:
    """Return the mean of a cell's points; `level` if the cell has fewer than two."""
    if len(grid) <= 1:
        return level
    mass = np.trapezoid(density, grid)
    return float(np.trapezoid(grid * density, grid) / max(mass, 1e-10))


def quantize(
    packed: np.ndarray, exponents: np.ndarray, words: np.ndarray, norms: np.ndarray
) -> ErrorStats:
    """Quantize whole rows to codes and norms. Arrays are contiguous; the last two are written.

    packed: uint8 (n · d / 2,), FP4 codes as the source has them; exponents: uint8 (n · d / 32,);
    words: uint32 (n · d / 16,), the first code in the lowest bits; norms: float16 (n,).
    Rows too small for an F16 norm decode to zeros and are counted.
    Raises BadGroup for an exponent of 255 and for a norm that F16 cannot hold.
    """
    bad = np.flatnonzero(exponents == 255)
    if len(bad):
        raise bad_exponent(int(bad[0]), 255)
    columns = 2 * len(packed) // len(norms)
    levels = codebook(columns)
    middles = (levels[:-1] + levels[1:]) / np.float32(2)
    lengths, misses = np.empty(len(norms), np.float32), np.empty(len(norms), np.float32)
    _quantize(packed, exponents, E2M1, UE8M0, signs(columns), _sizes(columns), levels, middles,
              words, lengths, misses)  # fmt: skip
    with np.errstate(over="ignore"):
        norms[:] = lengths
    if not np.isfinite(norms).all():
        row = int(np.argmin(np.isfinite(norms)))
        ours = exponents[row * columns // GROUP :][: columns // GROUP]
        raise BadGroup(row * columns // GROUP + int(np.argmax(ours)),
                       f"a row of norm {lengths[row]:.4g}", "one that F16 can hold")  # fmt: skip
    lost = (norms == 0) & (lengths > 0)
    energies = np.square(lengths, dtype=np.float64)
    error = float(np.where(lost, energies, energies * misses).sum())
    return ErrorStats(float(energies.sum()), error, int(lost.sum()))


@functools.cache
def _sizes(columns: int) -> np.ndarray:
    """Return the sizes (powers of two) of the parts of a row that are rotated, largest first."""
    return np.array([1 << i for i in reversed(range(columns.bit_length())) if columns >> i & 1])


@numba.njit(nogil=True, cache=True)
def _quantize(
    packed, exponents, values, powers, signs, sizes, levels, middles, words, lengths, misses
):
    """Write words, lengths (float32 norms) and misses (squared errors of normalized rows)."""
    columns = len(signs)
    row = np.empty((columns, LANES), np.float32)
    for first in range(0, len(lengths), LANES):
        count = min(LANES, len(lengths) - first)
        _decode(packed, exponents, first, count, values, powers, signs, row)
        start = 0
        for size in sizes:
            _rotate(row[start : start + size])
            start += size
        length = _norms(row)
        miss = _code(row, length, levels, middles, words, first, count)
        lengths[first : first + count] = length[:count]
        misses[first : first + count] = miss[:count]


@numba.njit(nogil=True, cache=True)
def _decode(packed, exponents, first, count, values, powers, signs, row):
    """Decode FP4 rows from `first` on, times their signs, each into a lane of `row`."""
    half = len(signs) // 2
    for lane in range(count):
        codes = packed[(first + lane) * half : (first + lane + 1) * half]
        scales = exponents[(first + lane) * half // 16 : (first + lane + 1) * half // 16]
        for group in range(half // 16):
            power = powers[scales[group]]
            for i in range(16 * group, 16 * group + 16):
                row[2 * i, lane] = values[codes[i] & 15] * power * signs[2 * i]
                row[2 * i + 1, lane] = values[codes[i] >> 4] * power * signs[2 * i + 1]


@numba.njit(nogil=True, cache=True)
def _rotate(row):
    """Apply the orthonormal Walsh-Hadamard transform to every lane, in place."""
    flat = row.reshape(-1)
    half = LANES
    while half < len(flat):
        for begin in range(0, len(flat), 2 * half):
            _add_and_subtract(flat[begin : begin + half], flat[begin + half : begin + 2 * half])
        half *= 2
    norm = np.float32(1.0 / math.sqrt(len(row)))
    for i in range(len(flat)):
        flat[i] *= norm


@numba.njit(nogil=True, cache=True)
def _add_and_subtract(one, other):
    """Replace (a, b) by (a + b, a - b), in place."""
    for i in range(len(one)):
        a, b = one[i], other[i]
        one[i], other[i] = a + b, a - b


@numba.njit(nogil=True, cache=True)
def _norms(row):
    """Return the norm of each lane, float32 (LANES,), summed sequentially in float32."""
    total = np.zeros(LANES, np.float32)
    for i in range(len(row)):
        for lane in range(LANES):
            total[lane] += row[i, lane] * row[i, lane]
    return np.sqrt(total)


@numba.njit(nogil=True, cache=True)
def _code(row, length, levels, middles, words, first, count):
    """Pack each number's code (the number of middles below it). Return the squared errors."""
    width = len(row) // EACH
    miss, word = np.zeros(LANES, np.float32), np.empty(LANES, np.uint32)
    safe = np.maximum(length, np.float32(1e-10))
    for at in range(width):
        word[:] = 0
        for i in range(EACH):
            _code_lanes(row[EACH * at + i], safe, levels, middles, np.uint32(BITS * i), word, miss)
        for lane in range(count):
            words[(first + lane) * width + at] = word[lane]
    return miss


@numba.njit(nogil=True, cache=True)
def _code_lanes(number, safe, levels, middles, shift, word, miss):
    """Add the codes of one number of each row to their word, and the squared errors to `miss`."""
    low, middle, high = middles[0], middles[1], middles[2]
    for lane in range(LANES):
        x = number[lane] / safe[lane]
        code = np.int32(x > low) + np.int32(x > middle) + np.int32(x > high)
        word[lane] |= np.uint32(code) << shift
        off = x - levels[code]
        miss[lane] += off * off
