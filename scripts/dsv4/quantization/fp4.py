"""Decode the source's routed experts: E2M1 codes with a UE8M0 scale for 32 columns.

A byte holds two codes, the low nibble is the even column. A code's low three bits give the
magnitude, bit 3 the sign. A scale byte e stands for 2^(e - 127); 255 is NaN and invalid in
a checkpoint. (OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1.)
"""

from __future__ import annotations

import numpy as np

from dsv4.errors import UserError
from dsv4.model.names import GROUP
from dsv4.storage.safetensors_file import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# The two float32 values of each byte, viewed as one uint64: one lookup decodes both.
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1).view(np.uint64).reshape(-1)
UE8M0 = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))


def decode(packed: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    """Decode one matrix: packed (out, in/2) bytes, scales (out, in/32) bytes → float32 (out, in).

    name: the tensor's, for the message. Raises UserError if a scale byte is 255.
    """
    check_scales(scales, name)
    values = PAIRS.take(packed.view(np.uint8)).view(np.float32).reshape(*scales.shape, GROUP)
    values *= UE8M0[scales.view(np.uint8)][..., None]
    return values.reshape(len(packed), -1)


def ue8m0_bytes(data: np.ndarray, scale: Tensor) -> np.ndarray:
    """Return scales as UE8M0 bytes. data: bytes of a scale tensor, of dtype F8_E8M0, U8 or F32.

    Raises UserError for an F32 scale that is no power of two.
    """
    if scale.dtype != "F32":
        return data.view(np.uint8)
    bits = np.ascontiguousarray(data).view(np.uint32)
    odd = np.flatnonzero(bits & ~np.uint32(0xFF << 23))  # a sign or a mantissa
    if len(odd):
        value = bits[odd[:1]].view(np.float32)[0]
        raise UserError(
            f"{scale.path}: {scale.name}", f"the scale {value:.9g}", "a power of two, as in UE8M0",
            "take the release that this is a copy of",
        )  # fmt: skip
    return (bits >> 23).astype(np.uint8)


def check_scales(scales: np.ndarray, name: str) -> None:
    """Raise UserError when a UE8M0 byte is 255, which is NaN."""
    rows, groups = np.nonzero(scales.view(np.uint8) == 255)
    if len(rows):
        raise UserError(
            f"{name}",
            f"scale byte 255 (NaN) in row {rows[0]}, group {groups[0]}",
            "bytes from 0 to 254",
            "fetch the source shard again",
        )
