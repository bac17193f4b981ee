"""Rounding to the source's number formats, in torch: E2M1 groups and E4M3 blocks.

A routed expert has one UE8M0 exponent for 32 columns of a row, other FP8 matrices
one for 128 × 128. The exponent is the least that keeps the greatest magnitude inside
the format: 6 for E2M1, 448 for E4M3.
"""

from itertools import pairwise

import torch
from torch import Tensor

GROUP = 32
BLOCK = 128
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits; bit 3 is the sign
E2M1_MIDDLES = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
E2M1_VALUES = torch.tensor([*E2M1, *(-value for value in E2M1)])
E8M0_BIAS = 127


def exponents(greatest: Tensor, limit: float) -> Tensor:
    """Return the least integer e with greatest <= limit · 2^e, int32; all zeros give -126."""
    return torch.log2(greatest / limit).ceil().clamp(min=-126).to(torch.int32)


def fp4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return E2M1 codes, uint8 (…, in), and exponents, int32 (…, in / 32)."""
    groups = weight.unflatten(-1, (-1, GROUP))
    exponent = exponents(groups.abs().amax(-1), E2M1[-1])
    scaled = torch.ldexp(groups, -exponent[..., None])
    codes = torch.bucketize(scaled.abs(), E2M1_MIDDLES) + 8 * (scaled < 0)
    return codes.to(torch.uint8).flatten(-2), exponent


def fp4_values(codes: Tensor, exponent: Tensor) -> Tensor:
    """Decode E2M1 codes and exponents: float32 (…, in)."""
    groups = E2M1_VALUES[codes.long()].unflatten(-1, (-1, GROUP))
    return torch.ldexp(groups, exponent[..., None]).flatten(-2)


def fp8_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 values, float8 (out, in), and exponents, int32 (out / 128, in / 128)."""
    blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    exponent = exponents(blocks.abs().amax((1, 3)), 448.0)
    scaled = torch.ldexp(blocks, -exponent[:, None, :, None])
    return scaled.to(torch.float8_e4m3fn).flatten(2).flatten(0, 1), exponent


def fp8_values(codes: Tensor, exponent: Tensor) -> Tensor:
    """Decode E4M3 values and exponents: float32 (out, in)."""
    blocks = codes.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    return torch.ldexp(blocks, exponent[:, None, :, None]).flatten(2).flatten(0, 1)


def kind(name: str) -> str:
    """Return how the source stores a trained tensor: FP4, FP8, BF16 or F32."""
    if ".experts." in name:
        return "FP4"
    if "hc_" in name or name.endswith(("attn_sink", "gate.bias", ".ape")):
        return "F32"
    if "norm" in name or ".gate." in name or ".compressor." in name:
        return "BF16"
    return "BF16" if name in ("embed.weight", "head.weight") else "FP8"


def round_to_storage(name: str, weight: Tensor) -> Tensor:
    """Return a tensor as it reads after storage, float32, the same shape."""
    match kind(name):
        case "FP4":
            return fp4_values(*fp4_codes(weight))
        case "FP8":
            return fp8_values(*fp8_codes(weight))
        case "BF16":
            return weight.bfloat16().float()
    return weight


def straight_through(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rounded tensors; gradients pass unchanged (straight-through estimator)."""
    return {
        name: value + (round_to_storage(name, value.detach()) - value.detach())
        for name, value in tensors.items()
    }
