"""Error bounds of each quantizer, by which verify judges a tensor.

The names are those that requantize writes into a shard's metadata (`requantize_quantizer`). A
bundle that another tool made has none; its promise follows from the bits that its labels give.
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
    nearest: a weight's level is the one that comes nearest to it.
    rms: a ceiling for the relative RMS error of a tensor, well above what real tensors give; asked
      only where the bytes cannot be recomputed, or where it is 0.
    """

    steps: float = 1.0
    zeros: bool = True
    nearest: bool = True
    rms: float = 0.12


# Measured: mx.quantize errs by at most one step (the far end is clipped) and by 8.6% RMS on
# Gaussian FP4 weights; MXFP4 keeps the source's own bytes.
PROMISES = {
    "mlx": Tolerance(),
    "mxfp4": Tolerance(steps=0.0, rms=0.0),
    "lossless": Tolerance(steps=0.0, rms=0.0),
}

# By least squares ends are clipped, and how far depends on the weights: each weight's level is the
# nearest all the same, and the bytes can be made again.
CLIPPED = math.inf
# Relative RMS by bits, for any other quantizer: mx.quantize's own error, with room above it: groups
# of 128 have 1.3 times that of 32 (2 bits .442, 3 bits .228; on FP4-coded normal weights).
CEILING = {2: 1.2, 3: 0.5, 4: 0.2, 5: 0.08, 6: 0.04, 8: 0.015}


def tolerance_for(quantizer: str | None, label: dict[str, Any]) -> Tolerance:
    """The promise of a recorded quantizer for a module stored as `label` says; of one without a
    name here, such as those that earlier versions had, what any may promise.

    None, for a bundle without a record, is taken for mx.quantize.
    """
    if quantizer in PROMISES:
        return PROMISES[quantizer]
    ceiling = CEILING[label["bits"]]
    if quantizer is None and label == EXPERT:
        return Tolerance()
    if quantizer is None:
        return Tolerance(rms=ceiling)
    if quantizer.startswith("affine") or quantizer_properties(quantizer).mixed:
        return Tolerance(steps=CLIPPED, zeros=False, rms=ceiling)
    return Tolerance(steps=2.0, zeros=False, rms=ceiling)
