"""Decode FP8 E4M3 matrices with a UE8M0 scale for each 128 × 128 block.

E4M3 is the finite-only variant (E4M3FN): 4 exponent bits, bias 7, 3 mantissa bits, no infinity,
S.1111.111 is NaN. (OCP 8-bit Floating Point Specification v1.0, section 5.)
"""

from __future__ import annotations

import numpy as np

from dsv4.model.names import BLOCK, GROUP
from dsv4.quantization.fp4 import UE8M0, check_scales


def _e4m3_values() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    subnormal = np.ldexp(mantissa / 8, -6)
    values = np.where(exponent == 0, subnormal, np.ldexp(1 + mantissa / 8, exponent - 7))
    values[codes & 127 == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


E4M3 = _e4m3_values()


def decode(codes: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """Decode codes (out, in) with scales (⌈out/128⌉, ⌈in/128⌉), both bytes → float32 (out, in).

    Raises UserError when a scale byte is 255.
    """
    check_scales(scales, name)
    values = np.take(E4M3, codes.view(np.uint8))
    for row, blocks in enumerate(UE8M0[scales.view(np.uint8)]):
        rows = values[row * BLOCK : (row + 1) * BLOCK]
        rows *= blocks.repeat(BLOCK)[: values.shape[1]]
    return values


def expand_scales(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Expand scales of blocks (⌈rows/128⌉, ⌈columns/128⌉) to mxfp8's: uint8 (rows, columns/32)."""
    by_group = scales.view(np.uint8).repeat(BLOCK // GROUP, axis=1)[:, : columns // GROUP]
    return np.ascontiguousarray(by_group.repeat(BLOCK, axis=0)[:rows])
