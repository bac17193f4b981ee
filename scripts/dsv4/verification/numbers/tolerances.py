"""The bounds that verify holds a tensor to.

Promises belong to a quantizer. They are named as in a shard's metadata (`requantize_quantizer`). A
bundle without a record, as other tools make them, made no promise: only if its groups follow
`mx.quantize`'s formula it is held to that one's (aggregate.report_groups). Bounds on the size of
errors hold for every affine quantizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv4.model.quantizer_table import quantizer_properties


@dataclass(frozen=True)
class Promises:
    """Bounds that a quantizer keeps for every single weight.

    steps: the worst error in steps (|scale|), after the rounding of scale and bias to F16.
    zeros: a zero of the source decodes to zero, within the same rounding.
    nearest: each weight has the level nearest to it.
    """

    steps: float = 1.0
    zeros: bool = True
    nearest: bool = True


MLX = Promises()  # it clips the far end, by at most one step
# MXFP4 keeps the source's own bytes.
BY_NAME = {"mlx": MLX, "mxfp4": Promises(steps=0.0), "lossless": Promises(steps=0.0)}
# Least squares clips the ends, by an amount that depends on the weights. Each weight still has the
# nearest level, and the bytes can be recomputed.
CLIPPED = math.inf


def promises_of(quantizer: str | None) -> Promises:
    """Return the promises of a recorded quantizer; MLX's for none, as of most other tools.

    An unknown quantizer, as of another version, promises the nearest level and two steps.
    """
    if quantizer is None:
        return MLX
    if quantizer in BY_NAME:
        return BY_NAME[quantizer]
    if quantizer.startswith("affine") or quantizer_properties(quantizer).mixed:
        return Promises(steps=CLIPPED, zeros=False)
    return Promises(steps=2.0, zeros=False)


@dataclass(frozen=True)
class SizeBounds:
    """The largest RMS error of a matrix and of a group, in steps (range_errors.py)."""

    matrix: float
    group: float


# By bits: the largest error of all quantizers and groups that scripts/lab/error_bounds.py measured
# (2026-12-01, the table is in scripts/README.md). Of a matrix times 1.25; of a group times 3,
# because GPTQ left twice as much in narrow matrices.
SIZE_BOUNDS = {
    2: SizeBounds(0.93, 7.4),
    3: SizeBounds(0.79, 5.3),
    4: SizeBounds(0.75, 4.8),
    5: SizeBounds(0.75, 6.4),
    6: SizeBounds(0.74, 10.0),
    8: SizeBounds(0.80, 18.0),
}
# The least correlation of a matrix with the source. Another matrix has none.
CORRELATION = 0.5
