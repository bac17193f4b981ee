"""Level 2's kernels: a module's stored levels, scales and biases against the source's weights.

Decoding is written out here once more, apart from the engine that wrote the bundle: what the engine
got wrong, these kernels do not repeat. Two questions are asked of each group of 32 weights:

`bounds`    how far is each decoded weight from the source; is its level the nearest one; is a zero
            still zero? True of every sane affine quantizer, whoever ran it.
`formula`   is the group exactly what MLX's formula gives, or what it gives on a device that rounds
            a tie the other way or starts the maximum at 0 (MLX's Metal and CUDA kernels)?

All arrays are flat and contiguous; kernels run without the GIL.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from dsv4.model.names import GROUP

# Digits of the significand and the exponent of the smallest step, of the dtypes that scales have.
ROUNDING = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}
# What a formula's float32 rounding on another device can move a level by: 255 levels · 2^-20.
TIE = 2.5e-4
NONE = -1

# Places in the counts that `bounds` and `formula` return.
BAD_NUMBER, NOT_NEAREST, LOST_ZEROS, ZEROS, FIRST_BAD_NUMBER, FIRST_NOT_NEAREST, FIRST_LOST = range(
    7
)
WORST_AT, EXACT_GROUPS = 7, 8
EXACT, FRAGILE, EXPLAINED, WRONG, FIRST_EXPLAINED, FIRST_WRONG = range(6)


@numba.njit(nogil=True, cache=True)
def decode_fp4(codes, exponents, values):
    """codes uint8 (16n,), exponents uint8 (n,) → values float32 (32n,)."""
    for group in range(len(exponents)):
        power = np.float32(math.ldexp(0.5, np.int64(exponents[group]) - 127))
        for byte in range(16):
            both = np.int32(codes[16 * group + byte])
            for half in range(2):
                code = (both >> (4 * half)) & 15
                size = code & 7
                # Twice the magnitude: 0 1 2 3 4 6 8 12, a significand of two bits and a shift.
                twice = size if size < 2 else (2 | (size & 1)) << ((size >> 1) - 1)
                twice = -twice if code & 8 else twice
                values[32 * group + 2 * byte + half] = np.float32(twice) * power


@numba.njit(nogil=True, cache=True)
def decode_fp8(codes, table, powers, columns, first_row, values):
    """codes uint8 (rows · columns,), table float32 (256,), powers float32 (⌈out/128⌉, ⌈in/128⌉)."""
    for i in range(len(codes)):
        row, column = i // columns, i % columns
        values[i] = table[codes[i]] * powers[(first_row + row) >> 7, column >> 7]


@numba.njit(nogil=True, cache=True)
def unpack(words, bits, levels):
    """words uint8 (n · bits / 8,), a stream with the lowest bit first → levels uint8 (n,)."""
    if bits == 8:
        levels[:] = words
    elif bits == 4:
        for i in range(len(words)):
            levels[2 * i] = words[i] & 15
            levels[2 * i + 1] = words[i] >> 4
    else:
        mask = (1 << bits) - 1
        for i in range(len(levels)):
            bit = i * bits
            two = np.int64(words[bit >> 3])
            if (bit & 7) + bits > 8:
                two |= np.int64(words[(bit >> 3) + 1]) << 8
            levels[i] = (two >> (bit & 7)) & mask


# Sums may be taken in any order, and there is no NaN: the compiler may make vector code of a loop.
_FAST = {"reassoc", "nsz", "nnan", "contract"}


@numba.njit(inline="always")
def _misses(values, levels, start, scale, bias, reach, slack, top, miss, level):
    """Over one group: sums of squares of weights and errors, the largest error, and how many
    levels are not the nearest, how many weights are zero, how many of these are lost.

    One short loop for each, without branches; `miss` and `level` are scratch, float32 (32,).
    """
    squares, errors, far = np.float32(0), np.float32(0), np.float32(0)
    odd, zeros, lost = np.int32(0), np.int32(0), np.int32(0)
    sign = np.float32(1.0) if scale >= 0 else np.float32(-1.0)
    for i in range(GROUP):
        level[i] = np.float32(levels[start + i])
        value = values[start + i]
        miss[i] = value - (level[i] * scale + bias)
        squares += value * value
        errors += miss[i] * miss[i]
    for i in range(GROUP):
        far = max(far, abs(miss[i]))
    for i in range(GROUP):
        up = sign * miss[i]
        odd += (np.int32(up > reach) & np.int32(level[i] < top)) + (
            np.int32(up < -reach) & np.int32(level[i] > np.float32(0))
        )
    for i in range(GROUP):
        zeros += np.int32(values[start + i] == np.float32(0))
    for i in range(GROUP):
        lost += np.int32(values[start + i] == np.float32(0)) & np.int32(abs(miss[i]) > slack)
    return squares, errors, far, odd, zeros, lost


def bounds(
    values: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    bits: int,
    digits: int,
    lowest: int,
) -> tuple[np.ndarray, float, float, float]:
    """Decode and compare: values float32 (32n,), levels uint8 (32n,), scales, biases float32 (n,).

    Returns (counts int64 (9,), energy, error, worst): sums of the weights' and the errors' squares;
    the worst error in steps, WORST_AT its group's first weight. What rounding scale and bias to
    their dtype can do to a weight is taken off before anything is counted.
    """
    finite = np.isfinite(scales) & np.isfinite(biases)
    unit, smallest = np.float32(2.0**-digits), np.float32(2.0 ** max(lowest - 1, -149))
    counts, energy, error, worst = _bounds(
        values, levels, scales, biases, finite, np.float32((1 << bits) - 1), unit, smallest
    )
    if not finite.all():
        counts[BAD_NUMBER] = np.count_nonzero(~finite)
        counts[FIRST_BAD_NUMBER] = GROUP * int(np.argmin(finite))
    return counts, energy, error, worst


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _bounds(values, levels, scales, biases, finite, top, unit, smallest):
    counts = np.zeros(9, np.int64)
    counts[FIRST_BAD_NUMBER:EXACT_GROUPS] = NONE
    energy, error, worst = 0.0, 0.0, np.float32(0)
    miss, level = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    for group in range(len(scales)):
        if not finite[group]:
            continue
        scale, bias = scales[group], biases[group]
        start = GROUP * group
        step = abs(scale)
        slack = np.float32(1.01) * (
            top * max(step * unit, smallest) + max(abs(bias) * unit, smallest)
        )
        reach = np.float32(0.5) * step + slack
        squares, errors, far, odd, zeros, lost = _misses(
            values, levels, start, scale, bias, reach, slack, top, miss, level
        )
        energy += squares
        error += errors
        counts[ZEROS] += zeros
        counts[EXACT_GROUPS] += far == 0
        if lost:
            if counts[LOST_ZEROS] == 0:
                counts[FIRST_LOST] = start
            counts[LOST_ZEROS] += lost
        if odd and step > 0:
            if counts[NOT_NEAREST] == 0:
                counts[FIRST_NOT_NEAREST] = start
            counts[NOT_NEAREST] += odd
        if far - slack > worst * step:
            worst = (far - slack) / step if step > 0 else np.float32(np.inf)
            counts[WORST_AT] = start
    return counts, energy, error, worst


@numba.njit(inline="always")
def _ends(values, start, group):
    """The least and the greatest of one group; a comparison picks, so that NaN needs no care."""
    least, greatest = values[start], values[start]
    for i in range(1, group):
        value = values[start + i]
        least = value if value < least else least
        greatest = value if value > greatest else greatest
    return least, greatest


@numba.njit(inline="always")
def _rounded(x, digits, lowest):
    """x to the nearest number of a dtype, ties to even; overflow to infinity is F16's."""
    if x == 0 or not math.isfinite(x):
        return x
    ulp = math.ldexp(1.0, max(math.frexp(x)[1] - digits, lowest))
    near = np.rint(x / ulp) * ulp
    return near if digits != 11 or abs(near) <= 65504 else math.copysign(np.inf, near)


@numba.njit(inline="always")
def _near(stored, x, digits, lowest):
    """True when `stored` may be x rounded, x being uncertain by a few units of float32."""
    ulp = math.ldexp(1.0, max(math.frexp(x)[1] - digits, lowest)) if x != 0 else 0.0
    return abs(stored - x) <= 0.5 * ulp + abs(x) * 1e-6


@numba.njit(inline="always")
def _start(least, greatest, top):
    """MLX's first scale, the end that becomes the bias, and that end in steps, unrounded."""
    scale = max((greatest - least) / np.float32(top), np.float32(1e-7))
    low = abs(least) > abs(greatest)
    scale = scale if low else -scale
    edge = least if low else greatest
    return scale, edge, edge / scale


@numba.njit(nogil=True, cache=True)
def _explains(
    values, levels, start, stored_scale, stored_bias, least, greatest, top, digits, lowest, group
):
    """True when MLX's formula with these ends gives the group, ties rounded either way."""
    scale, edge, steps = _start(least, greatest, top)
    for q in (np.floor(steps), np.ceil(steps)):
        if abs(steps - q) > np.float32(0.5 + TIE):
            continue
        s, b = (edge / q, edge) if q != 0 else (scale, np.float32(0))
        if not (_near(stored_scale, s, digits, lowest) and _near(stored_bias, b, digits, lowest)):
            continue
        fits = True
        for i in range(group):
            exact = min(max((values[start + i] - b) / s, np.float32(0)), np.float32(top))
            fits &= abs(exact - levels[start + i]) <= 0.5 + TIE
        if fits:
            return True
    return False


@numba.njit(inline="always")
def _unlike(values, levels, start, scale, bias, top, exact):
    """How many levels of a group are not the rounded ones, and how many lie near a tie."""
    odd, ties = np.int32(0), np.int32(0)
    group = len(exact)
    for i in range(group):
        exact[i] = (values[start + i] - bias) / scale
    for i in range(group):
        level = min(max(np.rint(exact[i]), np.float32(0)), top)
        odd += np.int32(level != np.float32(levels[start + i]))
    for i in range(group):
        part = abs(abs(exact[i] - np.floor(exact[i])) - np.float32(0.5))
        ties += np.int32(part < np.float32(TIE))
    return odd, ties


@numba.njit(nogil=True, cache=True)
def formula(values, levels, scales, biases, bits, digits, lowest, size=GROUP):
    """Compare with mx.quantize of these values (MLX's CPU code, float32, groups of `size`).

    Formula: ml-explore/mlx, mlx/backend/cpu/quantized.cpp, quantize(), 0.31. Returns counts int64
    (6,): groups EXACT, FRAGILE (another device could round them otherwise), EXPLAINED (not exact,
    but so explained), WRONG (neither), and the first group of the last two.
    """
    counts = np.zeros(6, np.int64)
    counts[FIRST_EXPLAINED:] = NONE
    top = (1 << bits) - 1
    exact = np.empty(size, np.float32)
    for group in range(len(scales)):
        start = size * group
        least, greatest = _ends(values, start, size)
        scale, edge, steps = _start(least, greatest, top)
        q0 = np.rint(steps)
        fragile = least > 0 or greatest < 0 or abs(abs(steps - np.floor(steps)) - 0.5) < TIE
        bias = edge if q0 != 0 else np.float32(0)
        scale = edge / q0 if q0 != 0 else scale
        odd, ties = _unlike(values, levels, start, scale, bias, np.float32(top), exact)
        fragile |= ties > 0
        same = odd == 0
        same &= _rounded(np.float64(scale), digits, lowest) == scales[group]
        same &= _rounded(np.float64(bias), digits, lowest) == biases[group]
        counts[FRAGILE] += fragile
        if same:
            counts[EXACT] += 1
            continue
        zero = np.float32(0)
        told = _explains(
            values,
            levels,
            start,
            scales[group],
            biases[group],
            least,
            greatest,
            top,
            digits,
            lowest,
            size,
        )
        told = told or _explains(
            values,
            levels,
            start,
            scales[group],
            biases[group],
            min(least, zero),
            max(greatest, zero),
            top,
            digits,
            lowest,
            size,
        )
        place, first = (EXPLAINED, FIRST_EXPLAINED) if told else (WRONG, FIRST_WRONG)
        if counts[place] == 0:
            counts[first] = group
        counts[place] += 1
    return counts


def expected_group(values: np.ndarray, bits: int) -> tuple[float, float, np.ndarray]:
    """What MLX's CPU formula gives for a group of float32 weights: scale, bias, levels."""
    values = values.astype(np.float32)
    top = np.float32((1 << bits) - 1)
    scale, edge, steps = _start.py_func(values.min(), values.max(), top)
    q0 = np.rint(steps)
    scale, bias = (edge / q0, edge) if q0 != 0 else (scale, np.float32(0))
    return float(scale), float(bias), np.clip(np.rint((values - bias) / scale), 0, top).astype(int)
