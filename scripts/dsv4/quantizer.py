"""The forms in which a bundle can hold its routed experts, each under a name.

A quantizer says which parts an expert has on disk (dtype and shape of each) and turns whole rows of
FP4 into the bytes of these parts. It works row by row: any run of rows can be done alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from dsv4 import affine, labels
from dsv4.affine import Tally
from dsv4.fp4 import GROUP


class Quantizer(Protocol):
    """`digest` changes when the same source would give other bytes; `label` is config.json's."""

    name: str
    digest: str
    label: dict[str, Any]

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part → (dtype, shape) of one matrix (out, columns); the first axis is `out` in all."""

    def encode(
        self, packed: np.ndarray, exponents: np.ndarray, parts: Mapping[str, np.ndarray]
    ) -> Tally:
        """Quantize some rows into `parts`; every array is uint8 and flat.

        Raises affine.BadGroup, with the group's index in these rows, when a group has no such form.
        """


class MlxAffine:
    """What `mx.quantize(group_size=32, bits=4, mode="affine")` gives, scales and biases in F16."""

    name = "mlx"
    label = labels.EXPERT

    def __init__(self) -> None:
        self._table = affine.build_table()
        self.digest = self._table.digest

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        groups = columns // GROUP
        return {
            "weight": ("U32", (out, columns // 8)),
            "scales": ("F16", (out, groups)),
            "biases": ("F16", (out, groups)),
        }

    def encode(
        self, packed: np.ndarray, exponents: np.ndarray, parts: Mapping[str, np.ndarray]
    ) -> Tally:
        return affine.quantize(
            self._table,
            packed.view(np.int64),
            exponents,
            parts["weight"].view(np.int64),
            parts["scales"].view(np.uint16),
            parts["biases"].view(np.uint16),
        )


QUANTIZERS = {"mlx": MlxAffine}
