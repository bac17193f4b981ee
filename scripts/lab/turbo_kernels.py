"""Decode TurboQuant in plain MLX, and replace jang's Metal kernels where there is no Metal.

A loader still runs jang's and vMLX's own code down to the kernels: the rotation, the gathered
product, and that of gate and up with the limited SwiGLU (jang_tools.turboquant, 2.5.50). Slow,
meant for the nano.
"""

from __future__ import annotations

import numpy as np


def decode(parts: dict[str, np.ndarray]) -> np.ndarray:
    """Decode tq_packed, tq_norms and tq_bits to float32 matrices, with jang's codebook and signs.

    As jang_tools.turboquant.linear, TurboQuantLinear, 2.5.50, does it for each product.
    """
    import mlx.core as mx
    from jang_tools.turboquant import codebook, rotation

    packed, width = parts["tq_packed"], int(parts["tq_bits"][0])
    codes = packed[..., None] >> np.arange(0, 32, width, dtype=np.uint32) & ((1 << width) - 1)
    codes = codes.reshape(*packed.shape[:-1], -1)
    levels = np.array(codebook.compute_codebook(codes.shape[-1], width), np.float32)
    signs = rotation.generate_random_signs(codes.shape[-1], seed=42)
    rotated = mx.array(levels[codes] * parts["tq_norms"][..., None].astype(np.float32))
    return np.array(rotation.hadamard_inverse(rotated, signs))


def stand_in() -> None:
    """Replace jang_tools' kernels unless Metal is available. Call it before loading a model."""
    import mlx.core as mx
    from jang_tools.turboquant import fused_gate_up_kernel as fused
    from jang_tools.turboquant import gather_tq_kernel as gather
    from jang_tools.turboquant import hadamard_kernel, rotation, tq_kernel

    if mx.metal.is_available():
        return
    for module in (hadamard_kernel, fused, gather):
        module.hadamard_rotate_metal = rotation.hadamard_rotate
    tq_kernel.hadamard_rotate = rotation.hadamard_rotate
    gather._get_kernel = lambda: _gathered
    fused._get_kernel_swiglu = lambda: _gate_and_up


def _product(rows, packed, norms, codebook, experts):
    """Multiply each rotated row, float32 (n, columns), by its expert's matrix: (n, out)."""
    import mlx.core as mx

    bits = (codebook.size - 1).bit_length()
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    codes = (packed[experts][..., None] >> shifts) & (codebook.size - 1)
    levels = codebook[codes.reshape(*codes.shape[:2], -1)]
    return (levels @ rows[..., None])[..., 0] * norms[experts].astype(mx.float32)


def _gathered(inputs, output_shapes, **_):
    """Compute the product of rows (batch, columns) with several experts each."""
    import mlx.core as mx

    rows, packed, norms, codebook, experts, _ = inputs
    rows = mx.repeat(rows, output_shapes[0][0] // len(rows), axis=0)
    return [_product(rows, packed, norms, codebook, experts)]


def _gate_and_up(inputs, output_shapes, **_):
    """Compute both products, then silu(min(gate, limit)) · clip(up, -limit, limit)."""
    import mlx.core as mx

    rows, *matrices, codebook, experts, meta = inputs
    rows = mx.repeat(rows, output_shapes[0][0] // len(rows), axis=0)
    limit = meta[5].item() / 1000 if meta.size > 5 else 10.0  # jang 2.5.9 has it in its kernel
    limit = limit or np.inf
    gate = mx.minimum(_product(rows, *matrices[:2], codebook, experts), limit)
    up = mx.clip(_product(rows, *matrices[2:], codebook, experts), -limit, limit)
    return [gate * mx.sigmoid(gate) * up]
