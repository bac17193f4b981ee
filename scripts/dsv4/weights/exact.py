"""Two forms that hold an FP4 group exactly: 5-bit affine, and the FP4 bytes themselves.

The 15 values of E2M1 are multiples of 1/2 from -6 to 6, so with scale 0.5 · 2^E and bias -6 · 2^E
the levels 0 … 24 hold each of them: 5 bits, and both numbers are exact in F16 while -23 ≤ E ≤ 13.
Only the sign of a zero is lost. MLX packs 5-bit levels as one stream of bits, the first level
lowest: eight levels in five bytes (mlx/backend/cpu/quantized.cpp, `quantize`, 0.31).
"""

from __future__ import annotations

import numba
import numpy as np

from dsv4.weights.affine import BAD, OK, UNDERFLOW, BadGroup, Tally
from dsv4.weights.fp4 import E2M1, UE8M0

BITS = 5
_BYTE = np.arange(256)
_LEVELS = np.rint(2 * E2M1 + 12).astype(np.int64)
# Two codes → two levels, 10 bits; and four times the sum of their squares.
_PAIRS = _LEVELS[_BYTE & 15] | _LEVELS[_BYTE >> 4] << BITS
_SQUARES = np.rint(4 * (E2M1[_BYTE & 15] ** 2 + E2M1[_BYTE >> 4] ** 2)).astype(np.int64)


def _constants() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By exponent byte: scale and bias (bits of F16), OK, UNDERFLOW or BAD, and 4^(e - 127)."""
    powers = np.append(UE8M0[:255].astype(np.float64), 0)
    with np.errstate(over="ignore"):
        scales, biases = (0.5 * powers).astype(np.float16), (-6 * powers).astype(np.float16)
    flags = np.where(scales != 0.5 * powers, UNDERFLOW, OK)
    flags[~np.isfinite(biases)] = BAD
    flags[255] = BAD
    scales[flags != OK] = biases[flags != OK] = 0
    return scales.view(np.uint16), biases.view(np.uint16), flags, powers**2


_SCALES, _BIASES, _FLAGS, _POWERS = _constants()


def quantize(
    packed: np.ndarray,
    exponents: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
) -> Tally:
    """Write n groups as 5-bit affine; the arrays are contiguous, the last three are written.

    packed: uint8 (16n,), two codes a byte, the low nibble first; exponents: uint8 (n,); weight:
    uint32 (5n,), little-endian; scales, biases: uint16 (n,), the bits of F16. Groups too small for
    F16 (exponent byte below 104) become zeros and are counted, unless they are zeros anyway.
    Raises BadGroup for an exponent of 255 and, unless all is zero, above 140.
    """
    bad, underflows, energy, error = _quantize(
        packed, exponents, _PAIRS, _SQUARES, _SCALES, _BIASES, _FLAGS, _POWERS,
        weight, scales, biases,
    )  # fmt: skip
    if bad >= 0:
        raise bad_exponent(bad, int(exponents[bad]))
    return Tally(energy, error, underflows)


def bad_exponent(group: int, exponent: int) -> BadGroup:
    """The error for a group whose exponent byte is 255 or too large for F16."""
    if exponent == 255:
        return BadGroup(group, "scale byte 255 (NaN)", "bytes from 0 to 254")
    return BadGroup(
        group,
        f"scale byte {exponent}: values too large for an F16 scale or bias",
        "values that F16 can hold",
    )


@numba.njit(nogil=True, cache=True)
def _quantize(
    packed, exponents, pairs, squares, all_scales, all_biases, flags, powers, weight, scales, biases
):
    """(first bad group or -1, underflows, sum of squares, sum of squared errors)."""
    underflows, energy, error = 0, 0.0, 0.0
    words = np.empty(4, np.int64)
    for group in range(len(exponents)):
        exponent = exponents[group]
        total = 0
        for word in range(4):
            levels = 0
            for byte in range(4):
                code = packed[16 * group + 4 * word + byte]
                levels |= pairs[code] << 10 * byte
                total += squares[code]
            words[word] = levels
        weight[5 * group] = words[0] & 0xFFFFFFFF
        weight[5 * group + 1] = (words[0] >> 32 | words[1] << 8) & 0xFFFFFFFF
        weight[5 * group + 2] = (words[1] >> 24 | words[2] << 16) & 0xFFFFFFFF
        weight[5 * group + 3] = (words[2] >> 16 | words[3] << 24) & 0xFFFFFFFF
        weight[5 * group + 4] = words[3] >> 8
        scales[group], biases[group] = all_scales[exponent], all_biases[exponent]
        energy += total * powers[exponent]
        if flags[exponent] != 0 and (total != 0 or exponent == 255):
            if flags[exponent] == BAD:
                return group, underflows, energy, error
            underflows += 1
            error += total * powers[exponent]
    return -1, underflows, energy / 4, error / 4


def copy(
    packed: np.ndarray, exponents: np.ndarray, weight: np.ndarray, scales: np.ndarray
) -> Tally:
    """Take codes (uint8, (16n,)) and exponents (uint8, (n,)) over as they are.

    Raises BadGroup for an exponent of 255.
    """
    bad = np.flatnonzero(exponents == 255)
    if len(bad):
        raise bad_exponent(int(bad[0]), 255)
    weight[:], scales[:] = packed, exponents
    return Tally()  # of no error: the sum of squares would be read by nobody
