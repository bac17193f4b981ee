"""Make random weights as FP4 groups, with scales rounded as checkpoints may have them.

A group's scale is a power of two. Rounding it up (`ceil`) lets every weight fit below 6; the rule
of the OCP Microscaling specification (`floor`: the greatest exponent less 2) clips what lies
between 6 and 8. DeepSeek's files do not record the rule, so both are measured.
"""

from __future__ import annotations

import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.fp4 import E2M1

RULES = ("ceil", "floor")
# 2 × E2M1's magnitudes, and the borders between neighbours.
_MAGNITUDES = np.rint(2 * E2M1[:8]).astype(np.int64)
_BORDERS = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2


def random_weights(rng: np.random.Generator, n: int, kind: str) -> np.ndarray:
    """Return float64 (n, 32) of the distribution `kind`: "normal" or "laplace"."""
    draw = {"normal": rng.standard_normal, "laplace": rng.laplace}[kind]
    return draw(size=(n, GROUP))


def to_fp4(weights: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Round groups (n, 32) to FP4: values in halves, int64 (n, 32), and exponents, int64 (n,)."""
    greatest = np.abs(weights).max(axis=1)
    if rule == "ceil":
        exponents = np.ceil(np.log2(greatest / 6))
    else:
        exponents = np.floor(np.log2(greatest)) - 2
    scaled = 2 * np.abs(weights) / np.exp2(exponents)[:, None]
    halves = _MAGNITUDES[np.searchsorted(_BORDERS, scaled)]
    return np.where(weights < 0, -halves, halves), exponents.astype(np.int64)


def pack(halves: np.ndarray) -> np.ndarray:
    """Pack values in halves (…, n) as FP4 codes, uint8 (…, n / 2), low nibble first."""
    codes = np.searchsorted(_MAGNITUDES, np.abs(halves)) | np.where(halves < 0, 8, 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
