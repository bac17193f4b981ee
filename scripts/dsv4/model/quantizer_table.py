"""The quantizers of the routed experts by name, and what each name implies.

The only place that lists them. The encoders are in quantization/formats.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.model.labels import EXPERT, MXFP4, TURBO2, affine_label


@dataclass(frozen=True)
class QuantizerProperties:
    """Properties of a quantizer that follow from its name.

    label: of every routed expert; None if the stacks of experts have labels of their own.
    by_projection: these labels, by projection, where the name fixes them.
    mixed: the stacks may have different labels. needs_plan: a plan gives them.
    uses_imatrix: it weights errors by the importance of the columns.
    copies_fp4: experts may keep the source's FP4 bytes.
    accepts_stock: the experts of upstream's converter are what it makes, without a mark.
    keeps_source: all tensors except the experts keep the source's numbers.
    by_case: a group's bytes depend only on its exponent, minimum, maximum and codes.
    """

    label: dict[str, Any] | None = None
    by_projection: Mapping[str, dict[str, Any]] | None = None
    mixed: bool = False
    needs_plan: bool = False
    uses_imatrix: bool = False
    copies_fp4: bool = False
    accepts_stock: bool = False
    keeps_source: bool = False
    by_case: bool = False

    @property
    def lossless(self) -> bool:
        """True if every number of the bundle is the source's."""
        return self.keeps_source and not self.mixed


# The shapes for which vMLX 1.6.81 has kernels that compute a whole expert on Metal: gate of 2 or
# 3 bits (affine_moe_decode).
SMALL = {
    "gate_proj": affine_label(2, 64),
    "up_proj": affine_label(2, 64),
    "down_proj": affine_label(2, 32),
}
_MIXTURE = {"mixed": True, "needs_plan": True, "uses_imatrix": True, "copies_fp4": True}
QUANTIZERS = {
    "mlx": QuantizerProperties(EXPERT, by_case=True),
    "mxfp4": QuantizerProperties(MXFP4, copies_fp4=True, accepts_stock=True),
    "lossless": QuantizerProperties(MXFP4, copies_fp4=True, keeps_source=True),
    "turboquant2": QuantizerProperties(TURBO2),
    "small": QuantizerProperties(by_projection=SMALL, mixed=True, uses_imatrix=True),
    "mixture": QuantizerProperties(**_MIXTURE),
    "mixture-lossless": QuantizerProperties(**_MIXTURE, keeps_source=True),
}
UNKNOWN = QuantizerProperties()
_AFFINE = re.compile(r"affine([234568])g(32|64|128)")


def quantizer_properties(name: str | None) -> QuantizerProperties:
    """Return the properties of a quantizer, also of affineBgG; UNKNOWN for any other name."""
    if (label := affine_label_by_name(name or "")) is not None:
        return QuantizerProperties(label, uses_imatrix=True)
    return QUANTIZERS.get(name or "", UNKNOWN)


def affine_label_by_name(name: str) -> dict[str, Any] | None:
    """Return the label of "affineBgG" (B bits, groups of G columns); None for another name."""
    found = _AFFINE.fullmatch(name)
    return affine_label(int(found[1]), int(found[2])) if found else None


def is_quantizer(name: str | None) -> bool:
    """Return True for the name of a quantizer."""
    return quantizer_properties(name) is not UNKNOWN


def quantizers_with(flag: str) -> tuple[str, ...]:
    """Return the names of the table whose property `flag` is True."""
    return tuple(name for name, properties in QUANTIZERS.items() if getattr(properties, flag))
