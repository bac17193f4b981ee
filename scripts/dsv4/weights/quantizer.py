"""The forms in which a bundle can hold its routed experts, each under a name.

A quantizer says which parts an expert has on disk (dtype and shape of each) and turns whole rows of
FP4 into the bytes of these parts. It works row by row: any run of rows can be done alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from dsv4.model import labels
from dsv4.model.plan import Form
from dsv4.settings import add_setting
from dsv4.stop import Stop
from dsv4.storage.checkpoint import Checkpoint
from dsv4.weights import affine, exact, optimal, turboquant
from dsv4.weights.affine import Tally
from dsv4.weights.imatrix import coverage, importances, open_imatrix
from dsv4.words import say


class Quantizer(Protocol):
    """`digest` changes when the same source would give other bytes; `label` is config.json's.

    `form` says what becomes of everything else.
    """

    name: str
    digest: str
    label: dict[str, Any]
    form: Form
    importance: Mapping[str, np.ndarray]  # by an expert's storage name, as in an imatrix

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
    form = Form(label)
    importance: Mapping[str, np.ndarray] = {}

    def __init__(self) -> None:
        self._table = affine.build_table()
        self.digest = self._table.digest

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
    form = Form(label)

    def __init__(
        self, importance: Mapping[str, np.ndarray] | None = None, imatrix: str = ""
    ) -> None:
        """`imatrix` is the digest of the file that `importance` was read from."""
        self._table = optimal.build_table()
        self.importance = importance or {}
        self.digest = self._table.digest + (f"-imatrix-{imatrix[:16]}" if imatrix else "")

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
    form = Form(label)
    importance: Mapping[str, np.ndarray] = {}
    digest = "1"

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
    form = Form(label)
    importance: Mapping[str, np.ndarray] = {}
    digest = "1"

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        return exact.copy(packed, exponents, parts["weight"], parts["scales"])


class Lossless(Mxfp4):
    """All of the source's own numbers: beside the experts FP8 as mxfp8, BF16 as F16 or BF16."""

    name = "lossless"

    def __init__(self, beyond: Mapping[str, int] | None = None) -> None:
        """beyond: BF16 tensor → how many of its values are no F16 numbers; it stays BF16.

        Without it sizes are right, and dtypes may not be.
        """
        self.beyond = beyond or {}
        self.form = Form(self.label, True, frozenset(self.beyond))


class TurboQuant2:
    """Rotated rows in codes of 2 bits and a norm each: 2.005 bits a weight (TurboQuant)."""

    name = "turboquant2"
    label = labels.TURBO2
    form = Form(label)
    importance: Mapping[str, np.ndarray] = {}
    digest = "1"

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> Tally:
        return turboquant.quantize(
            packed, exponents, parts["tq_packed"].view(np.uint32),
            parts["tq_norms"].view(np.float16),
        )  # fmt: skip


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "mlx": MlxAffine,
    "optimal": Optimal,
    "exact5": Exact5,
    "mxfp4": Mxfp4,
    "lossless": Lossless,
    "turboquant2": TurboQuant2,
}


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options by which a command is told its quantizer."""
    add_setting(parser, "QUANTIZER", choices=sorted(QUANTIZERS), default="mlx")
    add_setting(parser, "IMATRIX", help="importance of columns, for optimal (.dat)")


def check_choice(args: argparse.Namespace) -> None:
    """Raise Stop when the options do not go together."""
    if args.imatrix and args.quantizer != "optimal":
        raise Stop("IMATRIX", f"QUANTIZER={args.quantizer}", "optimal: no other one weighs errors",
                   "leave IMATRIX out, or choose optimal")  # fmt: skip


def chosen(args: argparse.Namespace, source: Checkpoint) -> Quantizer:
    """The quantizer that was asked for; says on stdout how far an imatrix reaches.

    Raises Stop for an imatrix that does not fit the source.
    """
    if args.imatrix is None:
        return QUANTIZERS[args.quantizer]()
    imatrix = open_imatrix(args.imatrix)
    found = importances(imatrix, source)
    say(coverage(found, imatrix, source))
    return Optimal(found, imatrix.digest)
