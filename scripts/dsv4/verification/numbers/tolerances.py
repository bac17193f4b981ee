"""Error bounds of each quantizer, which verify holds a tensor to.

Quantizers are named as in a shard's metadata (`requantize_quantizer`). A bundle of another tool has
no record; its bounds follow from the bits of its labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dsv4.model.labels import EXPERT
from dsv4.model.quantizer_table import quantizer_properties


@dataclass(frozen=True)
class Tolerance:
    """Bounds on one tensor; all but `rms` hold for every single weight.

    steps: the worst error in steps (|scale|), after the rounding of scale and bias to F16.
    zeros: a zero of the source decodes to zero, within the same rounding.
    nearest: each weight has the level nearest to it.
    rms: the largest relative RMS error of a tensor, well above that of real tensors; checked only
      if the bytes cannot be recomputed, or if it is 0.
    """

    steps: float = 1.0
    zeros: bool = True
    nearest: bool = True
    rms: float = 0.12


# Measured: mx.quantize errs by at most one step (it clips the far end) and by 8.6% RMS on
# Gaussian FP4 weights; MXFP4 keeps the source's own bytes.
BY_NAME = {
    "mlx": Tolerance(),
    "mxfp4": Tolerance(steps=0.0, rms=0.0),
    "lossless": Tolerance(steps=0.0, rms=0.0),
}

# Least squares clips the ends, by an amount that depends on the weights. Each weight still has the
# nearest level, and the bytes can be recomputed.
CLIPPED = math.inf
# Relative RMS by bits, for any other quantizer: mx.quantize's error with a margin, as groups of 128
# have 1.3 times the error of 32 (2 bits .442, 3 bits .228; on FP4-coded normal weights).
CEILING = {2: 1.2, 3: 0.5, 4: 0.2, 5: 0.08, 6: 0.04, 8: 0.015}


def tolerance_for(quantizer: str | None, label: dict[str, Any]) -> Tolerance:
    """Return the bounds of a recorded quantizer for a module stored as `label`.

    An unknown quantizer, as of another version, gets loose bounds. None, for a bundle without a
    record, counts as mx.quantize.
    """
    if quantizer in BY_NAME:
        return BY_NAME[quantizer]
    ceiling = CEILING[label["bits"]]
    if quantizer is None and label == EXPERT:
        return Tolerance()
    if quantizer is None:
        return Tolerance(rms=ceiling)
    if quantizer.startswith("affine") or quantizer_properties(quantizer).mixed:
        return Tolerance(steps=CLIPPED, zeros=False, rms=ceiling)
    return Tolerance(steps=2.0, zeros=False, rms=ceiling)
