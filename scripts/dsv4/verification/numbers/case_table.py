"""Level 2's shortcut: which bytes need no decoding, because every case of them was judged before.

What `mlx` writes for a group depends on its exponent and on its least and greatest
value alone, and within a group on each code alone. So a group for each such case, holding every
code between its ends, goes through the quantizer and then through kernels.py, which decodes it
in its own way and holds every weight to the quantizer's promise. Where an exponent passes, bytes
of a bundle that equal the quantizer's are as good as decoded; all others are decoded one by one.
"""

from __future__ import annotations

import numba
import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.affine_table import RANK, BadGroup
from dsv4.quantization.formats import Quantizer
from dsv4.storage.tensor_reader import as_float32
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.tolerances import Tolerance


def all_cases() -> np.ndarray:
    """One group for each pair of least and greatest value, packed: uint8 (120 · 16,)."""
    codes = sorted(range(16), key=lambda code: (RANK[code], code))
    inside = [
        [code for code in codes if least <= RANK[code] <= greatest]
        for least in range(15)
        for greatest in range(least, 15)
    ]
    groups = np.array([(some * GROUP)[:GROUP] for some in inside], np.uint8)
    return (groups[:, 0::2] | groups[:, 1::2] << 4).reshape(-1)


def judge_cases(quantizer: Quantizer, promise: Tolerance) -> tuple[np.ndarray, float]:
    """Judge every case: (bool (256,), by exponent whether all hold; the largest error in steps)."""
    good, worst = np.zeros(256, bool), 0.0
    if not quantizer.properties.by_case:
        return good, worst
    packed = all_cases()
    for exponent in range(255):
        error = _worst(quantizer, promise, packed, np.full(len(packed) // 16, exponent, np.uint8))
        if error is not None:
            good[exponent] = True
            worst = max(worst, error)
    return good, worst


def _worst(
    quantizer: Quantizer, promise: Tolerance, packed: np.ndarray, exponents: np.ndarray
) -> float | None:
    """The largest error in steps over these groups; None when one breaks the promise."""
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
    stored = [as_float32(parts[part], "F16") for part in ("scales", "biases")]
    counts, _, _, worst = kernels.bounds(values, levels, *stored, bits, *kernels.ROUNDING["F16"])
    odd = (kernels.BAD_NUMBER, kernels.NOT_NEAREST, kernels.LOST_ZEROS)
    return None if counts[list(odd)].any() or worst > promise.steps else worst


@numba.njit(nogil=True, cache=True)
def zeros(packed: np.ndarray) -> int:
    """How many of these FP4 codes are zeros, of either sign; packed: int64, sixteen codes each."""
    found = 0
    for i in range(len(packed)):
        rest = (packed[i] | packed[i] >> 1 | packed[i] >> 2) & 0x1111111111111111
        rest = (rest & 0x0101010101010101) + (rest >> 4 & 0x0101010101010101)
        found += 16 - ((rest * 0x0101010101010101) >> 56 & 255)
    return found
