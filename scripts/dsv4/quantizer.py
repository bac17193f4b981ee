"""The forms in which a bundle can hold its routed experts, each under a name.

A quantizer says which parts an expert has on disk (dtype and shape of each) and turns whole rows of
FP4 into the bytes of these parts. It works row by row: any run of rows can be done alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from dsv4 import affine, exact, labels, optimal
from dsv4.affine import Tally
from dsv4.fp4 import GROUP


class Quantizer(Protocol):
    """`digest` changes when the same source would give other bytes; `label` is config.json's."""

    name: str
    digest: str
    label: dict[str, Any]
    importance: Mapping[str, np.ndarray]  # by an expert's storage name, as in an imatrix

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part → (dtype, shape) of one matrix (out, columns); the first axis is `out` in all."""

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        """Quantize some rows into `parts`; every one of these arrays is uint8 and flat.

        importance: float64 (columns,), positive: how much an error in each input column counts;
        None when all count the same. Only `optimal` looks at it.
        Raises affine.BadGroup, with the group's index in these rows, when a group has no such form.
        """


class MlxAffine:
    """What `mx.quantize(group_size=32, bits=4, mode="affine")` gives, scales and biases in F16."""

    name = "mlx"
    label = labels.EXPERT
    importance: Mapping[str, np.ndarray] = {}

    def __init__(self) -> None:
        self._table = affine.build_table()
        self.digest = self._table.digest

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return affine_parts(out, columns, affine.BITS)

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        return affine.quantize(
            self._table,
            packed.view(np.int64),
            exponents,
            parts["weight"].view(np.int64),
            parts["scales"].view(np.uint16),
            parts["biases"].view(np.uint16),
        )


class Optimal:
    """4-bit affine with the least squared error; weighted by column where an imatrix says so."""

    name = "optimal"
    label = labels.EXPERT

    def __init__(
        self, importance: Mapping[str, np.ndarray] | None = None, imatrix: str = ""
    ) -> None:
        """`imatrix` is the digest of the file that `importance` was read from."""
        self._table = optimal.build_table()
        self.importance = importance or {}
        self.digest = self._table.digest + (f"-imatrix-{imatrix[:16]}" if imatrix else "")

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return affine_parts(out, columns, affine.BITS)

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        return optimal.quantize(
            self._table,
            packed.view(np.int64),
            exponents,
            np.empty(0, np.float32) if importance is None else importance,
            parts["weight"].view(np.int64),
            parts["scales"].view(np.uint16),
            parts["biases"].view(np.uint16),
        )


class Exact5:
    """5-bit affine that decodes to the source's values exactly: 6.0 bits a weight."""

    name = "exact5"
    label = labels.EXPERT | {"bits": exact.BITS}
    importance: Mapping[str, np.ndarray] = {}
    digest = "1"

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return affine_parts(out, columns, exact.BITS)

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        return exact.quantize(
            packed,
            exponents,
            parts["weight"].view(np.uint32),
            parts["scales"].view(np.uint16),
            parts["biases"].view(np.uint16),
        )


class Mxfp4:
    """The source's own FP4 bytes, under the label that says so: 4.25 bits a weight."""

    name = "mxfp4"
    label = labels.MXFP4
    importance: Mapping[str, np.ndarray] = {}
    digest = "1"

    def parts(self, out: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": ("U32", (out, columns // 8)), "scales": ("U8", (out, columns // GROUP))}

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        return exact.copy(packed, exponents, parts["weight"], parts["scales"])


def affine_parts(out: int, columns: int, bits: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The parts of a matrix (out, columns) in MLX's affine form, group 32."""
    groups = columns // GROUP
    return {
        "weight": ("U32", (out, columns * bits // 32)),
        "scales": ("F16", (out, groups)),
        "biases": ("F16", (out, groups)),
    }


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "mlx": MlxAffine,
    "optimal": Optimal,
    "exact5": Exact5,
    "mxfp4": Mxfp4,
}
