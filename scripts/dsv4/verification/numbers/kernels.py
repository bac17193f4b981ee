"""Kernels of level 2: compare levels, scales and biases of affine modules with the source.

They do not share decoding code with the converter, so that they do not repeat its mistakes. Two
checks of each group of weights:

`check_bounds`    the error of each decoded weight; whether its level is the nearest one; whether
                  zeros decode to zero. Every reasonable affine quantizer passes.
`check_formula`   whether the group is exactly what MLX's formula gives on a CPU, or on a device
                  that rounds a tie the other way or starts the maximum at 0 (MLX's Metal and CUDA
                  kernels).

All arrays are flat and contiguous; kernels run without the GIL.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from dsv4.model.names import GROUP

# Bits of the significand, and the exponent of the smallest step, of each dtype of scales.
ROUNDING = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149)}
# The largest move of a level by another device's float32 rounding: 255 levels · 2^-20.
TIE = 2.5e-4
NONE = -1

# Indices of the counts that `check_bounds` and `check_formula` return.
BAD_NUMBER, NOT_NEAREST, LOST_ZEROS, ZEROS = range(4)
FIRST_BAD_NUMBER, FIRST_NOT_NEAREST, FIRST_LOST, WORST_AT, EXACT_GROUPS = range(4, 9)
EXACT, FRAGILE, EXPLAINED, WRONG, FIRST_EXPLAINED, FIRST_WRONG = range(6)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_UE8M0 = np.array([2.0 ** (byte - 127) for byte in range(255)] + [np.inf], np.float32)


@numba.njit(nogil=True, cache=True)
def decode_fp4(codes, exponents, values):
    """Decode FP4: codes uint8 (16n,), exponents uint8 (n,) → values float32 (32n,)."""
    for group in range(len(exponents)):
        power = _UE8M0[exponents[group]]
        for byte in range(16):
            both = codes[16 * group + byte]
            values[32 * group + 2 * byte] = _E2M1[both & 15] * power
            values[32 * group + 2 * byte + 1] = _E2M1[both >> 4] * power


@numba.njit(nogil=True, cache=True)
def decode_fp8(codes, table, powers, block, columns, first_row, values):
    """Decode FP8 rows from `first_row` on into values float32 (rows · columns,).

    codes uint8 (rows · columns,), table float32 (256,), powers float32, one for each block;
    block: its rows and columns.
    """
    height, width = block
    for row in range(len(codes) // columns):
        for across in range(powers.shape[1]):
            power = powers[(first_row + row) // height, across]
            start, end = row * columns + across * width, row * columns + columns
            for i in range(start, min(start + width, end)):
                values[i] = table[codes[i]] * power


@numba.njit(nogil=True, cache=True)
def unpack(words, bits, levels):
    """Unpack words uint8 (n · bits / 8,), the lowest bit first → levels uint8 (n,)."""
    mask = np.uint64((1 << bits) - 1)
    if bits == 8:
        for i in range(len(words)):
            levels[i] = words[i]
        return
    if bits == 4:
        for i in range(len(words)):
            levels[2 * i] = words[i] & 15
            levels[2 * i + 1] = words[i] >> 4
        return
    if bits == 2:
        for i in range(len(words)):
            levels[4 * i], levels[4 * i + 1] = words[i] & 3, (words[i] >> 2) & 3
            levels[4 * i + 2], levels[4 * i + 3] = (words[i] >> 4) & 3, words[i] >> 6
        return
    for eight in range(len(levels) // 8):
        word = np.uint64(0)
        for byte in range(bits):
            word |= np.uint64(words[bits * eight + byte]) << np.uint64(8 * byte)
        for i in range(8):
            levels[8 * eight + i] = (word >> np.uint64(bits * i)) & mask


# Sums may be taken in any order, and there is no NaN, so that the compiler may vectorize loops.
_FAST = {"reassoc", "nsz", "nnan", "contract"}


# The compiler vectorizes a maximum of integers, but not of floats. The bits of float32 numbers,
# read as integers, have the numbers' order; those of negative numbers the reverse.
_SIZE = np.int32(0x7FFFFFFF)  # all bits but the sign


@numba.njit(inline="always")
def largest(values):
    """Return the largest magnitude of float32 values; 0 if there are none."""
    bits, far = values.view(np.int32), np.int32(0)
    for i in range(len(bits)):
        size = np.int32(bits[i] & _SIZE)
        far = size if size > far else far
    return np.int32(far).view(np.float32)


# `_group_errors` counts three things in one float32 sum, which is exact for groups of 128.
_ZERO, _NOT_NEAREST, _LOST = np.float32(1), np.float32(1 << 8), np.float32(1 << 16)


@numba.njit(inline="always")
def _group_errors(values, levels, scale, bias, reach, slack, top, miss):
    """Return one group's sums of squares of weights and errors, the largest error, and a count.

    The count adds _ZERO for each zero of the source, _LOST for each that does not decode to zero,
    and _NOT_NEAREST for each level that is not the nearest. Short loops without branches and with
    few sums are vectorized; `miss` is scratch, float32 (size of a group,).
    """
    squares, errors, count = np.float32(0), np.float32(0), np.float32(0)
    none = np.float32(0)
    sign = np.float32(1.0) if scale >= 0 else np.float32(-1.0)
    for i in range(len(miss)):
        value = values[i]
        miss[i] = value - (np.float32(levels[i]) * scale + bias)
        squares += value * value
        errors += miss[i] * miss[i]
    for i in range(len(miss)):
        up, level = sign * miss[i], np.float32(levels[i])
        other = ((up > reach) & (level < top)) | ((up < -reach) & (level > none))
        zero = values[i] == none
        lost = zero & (abs(miss[i]) > slack)
        count += (
            (_ZERO if zero else none)
            + (_NOT_NEAREST if other else none)
            + (_LOST if lost else none)
        )
    return squares, errors, largest(miss), np.int64(count)


def check_bounds(
    values: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
    bits: int,
    digits: int,
    lowest: int,
    size: int = GROUP,
) -> tuple[np.ndarray, float, float, float]:
    """Decode weights and compare them with the source's.

    values float32 (n,), levels uint8 (n,), scales, biases float32 (n / size,); size: weights in a
    group. Returns (counts int64 (9,), energy, error, worst): the sums of the weights' and the
    errors' squares, and the largest error in steps, at WORST_AT, its group's first weight. The
    error that rounding scale and bias to their dtype can cause is subtracted before errors count.
    """
    finite = np.isfinite(scales) & np.isfinite(biases)
    unit, smallest = np.float32(2.0**-digits), np.float32(2.0 ** max(lowest - 1, -149))
    counts, energy, error, worst = _bounds(
        values, levels, scales, biases, finite, np.float32((1 << bits) - 1), unit, smallest, size
    )
    if not finite.all():
        counts[BAD_NUMBER] = np.count_nonzero(~finite)
        counts[FIRST_BAD_NUMBER] = size * int(np.argmin(finite))
    return counts, energy, error, worst


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _bounds(values, levels, scales, biases, finite, top, unit, smallest, size):
    counts = np.zeros(9, np.int64)
    counts[FIRST_BAD_NUMBER:EXACT_GROUPS] = NONE
    energy, error, worst = 0.0, 0.0, np.float32(0)
    miss = np.empty(size, np.float32)
    for group in range(len(scales)):
        if not finite[group]:
            continue
        scale, bias = scales[group], biases[group]
        start, end = size * group, size * (group + 1)
        step = abs(scale)
        slack = np.float32(1.01) * (
            top * max(step * unit, smallest) + max(abs(bias) * unit, smallest)
        )
        reach = np.float32(0.5) * step + slack
        squares, errors, far, count = _group_errors(
            values[start:end], levels[start:end], scale, bias, reach, slack, top, miss
        )
        lost, not_nearest, zeros = count >> 16, (count >> 8) & 255, count & 255
        energy += squares
        error += errors
        counts[ZEROS] += zeros
        counts[EXACT_GROUPS] += far == 0
        if lost:
            if counts[LOST_ZEROS] == 0:
                counts[FIRST_LOST] = start
            counts[LOST_ZEROS] += lost
        if not_nearest and step > 0:
            if counts[NOT_NEAREST] == 0:
                counts[FIRST_NOT_NEAREST] = start
            counts[NOT_NEAREST] += not_nearest
        if far - slack > worst * step:
            worst = (far - slack) / step if step > 0 else np.float32(np.inf)
            counts[WORST_AT] = start
    return counts, energy, error, worst


@numba.njit(inline="always")
def min_max(values):
    """Return the least and the greatest value of one group."""
    bits = values.view(np.int32)
    least, greatest = _SIZE, ~_SIZE
    for i in range(len(bits)):
        order = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & _SIZE))
        least = order if order < least else least
        greatest = order if order > greatest else greatest
    low = np.int32(least ^ ((least >> np.int32(31)) & _SIZE))
    high = np.int32(greatest ^ ((greatest >> np.int32(31)) & _SIZE))
    return low.view(np.float32), high.view(np.float32)


@numba.njit(inline="always")
def _rounded(x, digits, lowest):
    """Return x rounded to the nearest number of a dtype, ties to even; only F16 overflows."""
    x = np.float32(x)
    if digits == 24:
        return x
    size = np.float32(abs(x))
    if size < np.float32(2.0 ** (lowest + digits - 1)):  # below its normal numbers
        unit = np.float32(2.0**lowest)
        return np.rint(x / unit) * unit
    cut = np.int32(24 - digits)
    bits = x.view(np.int32)
    bits += np.int32((1 << (cut - 1)) - 1) + ((bits >> cut) & np.int32(1))
    near = np.int32(bits >> cut << cut).view(np.float32)
    return near if digits != 11 or abs(near) <= 65504 else np.float32(math.copysign(np.inf, x))


@numba.njit(inline="always")
def _is_rounded(stored, x, digits, lowest):
    """Return whether `stored` may be x rounded, if x may be off by a few units of float32."""
    ulp = math.ldexp(1.0, max(math.frexp(x)[1] - digits, lowest)) if x != 0 else 0.0
    return abs(stored - x) <= 0.5 * ulp + abs(x) * 1e-6


@numba.njit(inline="always")
def _first_scale(least, greatest, top):
    """Return MLX's first scale, the end that becomes the bias, and that end in steps, unrounded."""
    scale = max((greatest - least) / np.float32(top), np.float32(1e-7))
    low = abs(least) > abs(greatest)
    scale = scale if low else -scale
    edge = least if low else greatest
    return scale, edge, edge / scale


@numba.njit(nogil=True, cache=True)
def _matches_formula(
    values, levels, start, stored_scale, stored_bias, least, greatest, top, digits, lowest, group
):
    """Return whether MLX's formula with these ends gives the group, ties rounded either way."""
    scale, edge, steps = _first_scale(least, greatest, top)
    for q in (np.floor(steps), np.ceil(steps)):
        if abs(steps - q) > np.float32(0.5 + TIE):
            continue
        s, b = (edge / q, edge) if q != 0 else (scale, np.float32(0))
        if not (
            _is_rounded(stored_scale, s, digits, lowest)
            and _is_rounded(stored_bias, b, digits, lowest)
        ):
            continue
        fits = True
        for i in range(group):
            exact = min(max((values[start + i] - b) / s, np.float32(0)), np.float32(top))
            fits &= abs(exact - levels[start + i]) <= 0.5 + TIE
        if fits:
            return True
    return False


@numba.njit(inline="always")
def _count_level_differences(values, levels, scale, bias, top, exact):
    """Return how many levels of a group are not the rounded ones, and how many are near a tie."""
    differing, ties = np.int32(0), np.int32(0)
    for i in range(len(exact)):
        exact[i] = (values[i] - bias) / scale
    for i in range(len(exact)):
        near = np.rint(exact[i])
        ties += np.int32(abs(exact[i] - near) > np.float32(0.5 - TIE))
        near = np.float32(0) if near < np.float32(0) else near
        near = top if near > top else near
        differing += np.int32(near != np.float32(levels[i]))
    return differing, ties


@numba.njit(nogil=True, cache=True, fastmath=_FAST - {"contract"})
def check_formula(values, levels, scales, biases, bits, digits, lowest, size=GROUP):
    """Compare with mx.quantize of these values (MLX's CPU code, float32, groups of `size`).

    Formula: ml-explore/mlx, mlx/backend/cpu/quantized.cpp, quantize(), 0.31. Returns counts int64
    (6,): groups EXACT, FRAGILE (another device may round them differently), EXPLAINED (not exact,
    but as another device gives them), WRONG (neither), and the first group of the last two.
    """
    counts = np.zeros(6, np.int64)
    counts[FIRST_EXPLAINED:] = NONE
    top = np.float32((1 << bits) - 1)
    ends = np.empty((2, len(scales)), np.float32)
    for group in range(len(scales)):
        ends[0, group], ends[1, group] = min_max(values[size * group : size * (group + 1)])
    numbers, fragile = _formula_numbers(ends, top)
    exact = np.empty(size, np.float32)
    for group in range(len(scales)):
        start, end = size * group, size * (group + 1)
        scale, bias = numbers[0, group], numbers[1, group]
        differing, ties = _count_level_differences(
            values[start:end], levels[start:end], scale, bias, top, exact
        )
        counts[FRAGILE] += fragile[group] or ties > 0
        same = _rounded(scale, digits, lowest) == scales[group]
        same &= _rounded(bias, digits, lowest) == biases[group]
        if same and differing == 0:
            counts[EXACT] += 1
            continue
        explained = False
        for zero in (np.float32(np.inf), np.float32(0)):  # as the CPU does; as others do
            least, greatest = min(ends[0, group], zero), max(ends[1, group], -zero)
            explained = explained or _matches_formula(
                values, levels, start, scales[group], biases[group],
                least, greatest, top, digits, lowest, size,
            )  # fmt: skip
        kind, first = (EXPLAINED, FIRST_EXPLAINED) if explained else (WRONG, FIRST_WRONG)
        if counts[kind] == 0:
            counts[first] = group
        counts[kind] += 1
    return counts


@numba.njit(inline="always")
def _formula_numbers(ends, top):
    """Return MLX's scales and biases, unrounded, float32 (2, n), and which groups are fragile.

    ends: the groups' least and greatest weights, float32 (2, n).
    """
    numbers, fragile = np.empty_like(ends), np.empty(ends.shape[1], np.bool_)
    for group in range(ends.shape[1]):
        least, greatest = ends[0, group], ends[1, group]
        scale, edge, steps = _first_scale(least, greatest, top)
        near = np.rint(steps)
        numbers[0, group] = edge / near if near != 0 else scale
        numbers[1, group] = edge if near != 0 else np.float32(0)
        tie = abs(steps - near) > np.float32(0.5 - TIE)
        fragile[group] = tie | (least > 0) | (greatest < 0)
    return numbers, fragile


def expected_group(values: np.ndarray, bits: int) -> tuple[float, float, np.ndarray]:
    """Return scale, bias and levels that MLX's CPU formula gives for a group of float32 weights."""
    values = values.astype(np.float32)
    top = np.float32((1 << bits) - 1)
    scale, edge, steps = _first_scale.py_func(values.min(), values.max(), top)
    q0 = np.rint(steps)
    scale, bias = (edge / q0, edge) if q0 != 0 else (scale, np.float32(0))
    return float(scale), float(bias), np.clip(np.rint((values - bias) / scale), 0, top).astype(int)
