"""Check every case of the quantizer `mlx` once, so that groups with its own bytes need no decoding.

The scale and bias that `mlx` writes for a group depend only on the group's exponent and its least
and greatest value; each level depends on these and the code. So one group for each such case,
holding every code between its ends, is quantized, decoded and compared by kernels.py. If all cases
of an exponent keep its promises, bundle bytes that equal the quantizer's need no decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.affine_table import RANK, BadGroup
from dsv4.quantization.formats import Quantizer
from dsv4.storage.tensor_reader import as_float32
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.tolerances import Promises

RANKS = 15  # values of FP4 in rising order; 7 is zero
CASES = [(least, greatest) for least in range(RANKS) for greatest in range(least, RANKS)]


@dataclass(frozen=True)
class CheckedCases:
    """Results of all cases.

    holds: bool (256,), by exponent: whether all its cases keep the promises; worst: the
    largest error in steps; exact_codes: uint16 (256, 225), by exponent and least · 15 + greatest:
    one bit for each FP4 code that decodes without error.
    """

    holds: np.ndarray
    worst: float
    exact_codes: np.ndarray


def case_groups() -> np.ndarray:
    """Return one group for each case, packed FP4: uint8 (120 · 16,)."""
    codes = sorted(range(16), key=lambda code: (RANK[code], code))
    inside = [
        [code for code in codes if least <= RANK[code] <= greatest] for least, greatest in CASES
    ]
    groups = np.array([(some * GROUP)[:GROUP] for some in inside], np.uint8)
    return (groups[:, 0::2] | groups[:, 1::2] << 4).reshape(-1)


def check_cases(quantizer: Quantizer, promises: Promises) -> CheckedCases:
    """Check every case of a quantizer; no exponent holds if its bytes depend on more than these."""
    holds, worst = np.zeros(256, bool), 0.0
    exact_codes = np.zeros((256, RANKS * RANKS), np.uint16)
    if quantizer.properties.by_case:
        packed = case_groups()
        for exponent in range(255):
            exponents = np.full(len(CASES), exponent, np.uint8)
            checked = _check_exponent(quantizer, promises, packed, exponents)
            if checked is not None:
                holds[exponent] = True
                worst = max(worst, checked[0])
                for (least, greatest), bits in zip(CASES, checked[1], strict=True):
                    exact_codes[exponent, RANKS * least + greatest] = bits
    return CheckedCases(holds, worst, exact_codes)


def _check_exponent(
    quantizer: Quantizer, promises: Promises, packed: np.ndarray, exponents: np.ndarray
) -> tuple[float, np.ndarray] | None:
    """Quantize and decode one group for each case of an exponent.

    Returns the largest error in steps, and for each group one bit for each code that decodes
    without error; None when a promise is broken.
    """
    bits, groups = quantizer.label["bits"], len(exponents)
    parts = {
        part: np.empty(groups * nbytes, np.uint8)
        for part, nbytes in (("weight", GROUP * bits // 8), ("scales", 2), ("biases", 2))
    }
    try:
        quantizer.encode(packed, exponents, parts)
    except BadGroup:
        return None
    values, levels = np.empty(GROUP * groups, np.float32), np.empty(GROUP * groups, np.uint8)
    kernels.decode_fp4(packed, exponents, values)
    kernels.unpack(parts["weight"], bits, levels)
    scales, biases = (as_float32(parts[part], "F16") for part in ("scales", "biases"))
    counts, _, _, worst = kernels.check_bounds(
        values, levels, scales, biases, bits, *kernels.ROUNDING["F16"]
    )
    faults = (kernels.BAD_NUMBER, kernels.NOT_NEAREST, kernels.LOST_ZEROS)
    if counts[list(faults)].any() or worst > promises.steps:
        return None
    decoded = levels.reshape(groups, GROUP) * scales[:, None] + biases[:, None]
    codes = np.empty(GROUP * groups, np.uint8)
    kernels.unpack(packed, 4, codes)
    code_bits = np.uint16(1) << codes.reshape(groups, GROUP).astype(np.uint16)
    equal = decoded == values.reshape(groups, GROUP)
    return worst, np.bitwise_or.reduce(np.where(equal, code_bits, np.uint16(0)), axis=1)


def _case_numbers() -> np.ndarray:
    """Return, by the set of a group's codes (a bit each), least · 15 + greatest: uint8 (65536,)."""
    codes = np.arange(1 << 16)
    least, greatest = np.full(1 << 16, RANKS - 1), np.zeros(1 << 16, int)
    for code, rank in enumerate(RANK):
        has = (codes >> code & 1).astype(bool)
        least = np.where(has, np.minimum(least, rank), least)
        greatest = np.where(has, np.maximum(greatest, rank), greatest)
    return (RANKS * least + greatest).astype(np.uint8)


_CASE = _case_numbers()
# The set of the four codes of a uint16, a bit each: uint16 (65536,). A table for single bytes takes
# a third longer.
_CODES_OF_WORD = np.bitwise_or.reduce([1 << (np.arange(1 << 16) >> i & 15) for i in (0, 4, 8, 12)])
_CODES_OF_WORD = _CODES_OF_WORD.astype(np.uint16)


@numba.njit(nogil=True, cache=True)
def count_exact_groups(packed: np.ndarray, exponents: np.ndarray, exact_codes: np.ndarray) -> int:
    """Count the groups whose bytes by the quantizer decode to the source's values.

    packed uint8 (16n,), exponents uint8 (n,), exact_codes as in CheckedCases.
    """
    words, count = packed.view(np.uint16), 0
    for group in range(len(exponents)):
        bits = np.uint16(0)
        for i in range(8):
            bits |= _CODES_OF_WORD[words[8 * group + i]]
        count += bits & ~exact_codes[exponents[group], _CASE[bits]] == 0
    return count


@numba.njit(nogil=True, cache=True)
def count_zeros(packed: np.ndarray) -> int:
    """Count the FP4 codes that are zeros, of either sign; packed: int64, sixteen codes each."""
    found = 0
    for i in range(len(packed)):
        rest = (packed[i] | packed[i] >> 1 | packed[i] >> 2) & 0x1111111111111111
        rest = (rest & 0x0101010101010101) + (rest >> 4 & 0x0101010101010101)
        found += 16 - ((rest * 0x0101010101010101) >> 56 & 255)
    return found
