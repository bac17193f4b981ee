"""The requantizer's reference: decode one tensor, ask mx.quantize, round to F16. Slow and plain."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode_one(code: int, exponent: int) -> float:
    """One E2M1 code with its UE8M0 byte; nothing shared with the engine's decoder."""
    sign = -1.0 if code & 8 else 1.0
    return sign * MAGNITUDES[code & 7] * 2.0 ** (exponent - 127)


_VALUES = np.array([decode_one(code, 127) for code in range(16)], np.float32)


def decode(packed: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """(out, in/2) bytes and (out, in/32) exponent bytes → float32 (out, in)."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    codes[:, 0::2] = packed.view(np.uint8) & 0x0F
    codes[:, 1::2] = packed.view(np.uint8) >> 4
    factors = np.exp2(exponents.astype(np.float64) - 127).astype(np.float32)
    return _VALUES[codes] * np.repeat(factors, 32, axis=1)


def quantize(
    packed: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight uint32 (out, in/8), scales and biases float16 (out, in/32), on MLX's CPU backend."""
    weight, scales, biases = mx.quantize(
        mx.array(decode(packed, exponents)),
        group_size=32,
        bits=4,
        mode="affine",
        stream=mx.cpu,
    )
    return (
        np.array(weight),
        np.array(scales).astype(np.float16),
        np.array(biases).astype(np.float16),
    )
