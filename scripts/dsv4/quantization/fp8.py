"""Decode FP8 E4M3 matrices with a UE8M0 scale for each block (dsv4/model/fp8_blocks.py).

E4M3 is the finite-only variant (E4M3FN): 4 exponent bits, bias 7, 3 mantissa bits, no infinity,
S.1111.111 is NaN. (OCP 8-bit Floating Point Specification v1.0, section 5.)
"""

from __future__ import annotations

import numpy as np

from dsv4.model.fp8_blocks import block_of
from dsv4.model.names import GROUP
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
    """Decode codes (out, in) with a scale for each block, both bytes → float32 (out, in).

    The codes are of a whole matrix, or of rows from the first one of a block on.
    Raises UserError when a scale byte is 255.
    """
    check_scales(scales, name)
    values = np.take(E4M3, codes.view(np.uint8))
    height, width = block_of(codes.shape, scales.shape)
    for row, powers in enumerate(UE8M0[scales.view(np.uint8)]):
        rows = values[row * height : (row + 1) * height]
        rows *= powers.repeat(width)[: values.shape[1]]
    return values


def expand_scales(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Expand the scales of blocks to those of mxfp8: uint8 (rows, columns/32)."""
    height, width = block_of((rows, columns), scales.shape)
    by_group = scales.view(np.uint8).repeat(width // GROUP, axis=1)[:, : columns // GROUP]
    return np.ascontiguousarray(by_group.repeat(height, axis=0)[:rows])
