"""The forms in which a bundle can hold its routed experts, each under a name.

A quantizer says which parts an expert has on disk (dtype and shape of each) and turns whole rows of
FP4 into the bytes of these parts. It works row by row: any run of rows can be done alone.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.bundle_plan import StorageFormat
from dsv4.quantization import affine_table, least_squares, turboquant
from dsv4.quantization.affine_table import ErrorStats
from dsv4.quantization.imatrix import EVEN, Importance
from dsv4.quantization.mixture_plan import label_name
from dsv4.settings import InvalidValue, add_setting


class Quantizer(Protocol):
    """`digest` changes when the same source would give other bytes; `label` is config.json's.

    `form` says what becomes of everything else.
    """

    name: str
    digest: str
    label: dict[str, Any]
    form: StorageFormat
    importance: Mapping[str, np.ndarray]  # by an expert's storage name, as in an imatrix
    beyond: Mapping[str, int]  # see `knowing`

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> ErrorStats:
        """Quantize some rows into `parts`; every one of these arrays is uint8 and flat.

        importance: float64 (columns,), positive: how much an error in each input column counts;
        None when all count the same. Only those that take an imatrix look at it.
        Raises affine.BadGroup, with the group's index in these rows, when a group has no such form.
        """

    def of(self, base: str) -> Quantizer:
        """What makes one matrix, by its storage name: itself, or a mixture's part."""


class Uniform:
    """What makes all experts alike; without an importance."""

    importance: Mapping[str, np.ndarray] = {}
    beyond: Mapping[str, int] = {}

    def of(self, base: str) -> Quantizer:
        """Itself, for every matrix."""
        return self


class MlxAffine(Uniform):
    """What `mx.quantize(group_size=32, bits=4, mode="affine")` gives, scales and biases in F16."""

    name = "mlx"
    label = labels.EXPERT
    form = StorageFormat(label)

    def __init__(self) -> None:
        self._table = affine_table.build_table()
        self.digest = self._table.digest

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> ErrorStats:
        return affine_table.quantize(
            self._table,
            packed.view(np.int64),
            exponents,
            parts["weight"].view(np.int64),
            parts["scales"].view(np.uint16),
            parts["biases"].view(np.uint16),
        )


class Mxfp4(Uniform):
    """The source's own FP4 bytes, under the label that says so: 4.25 bits a weight."""

    name = "mxfp4"
    label = labels.MXFP4
    form = StorageFormat(label)
    digest = "1"

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> ErrorStats:
        if (bad := np.flatnonzero(exponents == 255)).size:
            raise affine_table.bad_exponent(int(bad[0]), 255)
        parts["weight"][:], parts["scales"][:] = packed, exponents
        return ErrorStats()  # of no error: the sum of squares would be read by nobody


class Lossless(Mxfp4):
    """All of the source's own numbers: beside the experts FP8 as mxfp8, BF16 as F16 or BF16."""

    name = "lossless"
    form = StorageFormat(labels.MXFP4, as_source=True)


class TurboQuant2(Uniform):
    """Rotated rows in codes of 2 bits and a norm each: 2.005 bits a weight (TurboQuant)."""

    name = "turboquant2"
    label = labels.TURBO2
    form = StorageFormat(label)
    digest = "1"

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> ErrorStats:
        return turboquant.quantize(
            packed, exponents, parts["tq_packed"].view(np.uint32),
            parts["tq_norms"].view(np.float16),
        )  # fmt: skip


class LeastSquares(Uniform):
    """Affine of any width with the least squared error; weighed by column where an imatrix is."""

    def __init__(self, bits: int, size: int, importance: Importance = EVEN) -> None:
        self.name, self.label = f"affine{bits}g{size}", labels.affine_label(bits, size)
        self.form, self.importance = StorageFormat(self.label), importance.columns
        self.digest = least_squares.VERSION + importance.suffix
        self._bits, self._size = bits, size

    def encode(
        self,
        packed: np.ndarray,
        exponents: np.ndarray,
        parts: Mapping[str, np.ndarray],
        importance: np.ndarray | None = None,
    ) -> ErrorStats:
        scales, biases = (parts[part].view(np.uint16) for part in ("scales", "biases"))
        made = (parts["weight"], scales, biases)
        return least_squares.quantize(
            packed, exponents, importance, (self._bits, self._size), made
        ).tally


class Mixture:
    """Experts of several forms: by projection, or by layer and projection as a plan has them."""

    beyond: Mapping[str, int] = {}

    def __init__(
        self, name: str, stacks: Mapping[str, dict[str, Any]], importance: Importance = EVEN
    ) -> None:
        """stacks: a label by stack ("layers.3.down_proj") or by projection."""
        self.name, self.importance = name, importance.columns
        self.label = labels.most_common_label(stacks)
        self.form = StorageFormat(self.label, name in labels.OWN, mixture=stacks)
        self._parts = {str(label): _by_label(label, importance) for label in stacks.values()}
        said = [f"{stack} {label_name(label)}\n" for stack, label in sorted(stacks.items())]
        plan = hashlib.sha256("".join(said).encode()).hexdigest()[:16]
        self.digest = f"{least_squares.VERSION}-{plan}{importance.suffix}"

    def of(self, base: str) -> Quantizer:
        """What makes one matrix, by its storage name."""
        return self._parts[str(self.form.label(base))]


def _by_label(label: dict[str, Any], importance: Importance) -> Quantizer:
    if label == labels.MXFP4:
        return Mxfp4()
    return LeastSquares(label["bits"], label["group_size"], importance)


# By projection, the shape for which vMLX 1.6.81 has kernels that do an expert at one go on Metal:
# gate of 2 or 3 bits (affine_moe_decode).
SMALL = {"gate_proj": labels.affine_label(2, 64), "up_proj": labels.affine_label(2, 64),
         "down_proj": labels.affine_label(2, 32)}  # fmt: skip
QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "mlx": MlxAffine,
    "mxfp4": Mxfp4,
    "lossless": Lossless,
    "turboquant2": TurboQuant2,
}
_AFFINE = re.compile(r"affine([234568])g(32|64|128)")
NAMES = (
    f"{', '.join(sorted(QUANTIZERS))}, small, {' and '.join(labels.PLANNED)} (with a plan), "
    "affineBgG: B bits, 2 to 8 but 7, groups of G columns, 32, 64 or 128"
)


def is_quantizer(name: str | None) -> bool:
    """Is there a quantizer of that name?"""
    affine = _AFFINE.fullmatch(name or "") is not None
    return name in QUANTIZERS or name in labels.MIXTURES or affine


def get_quantizer(
    name: str,
    importance: Importance = EVEN,
    stacks: Mapping[str, dict[str, Any]] | None = None,
) -> Quantizer:
    """The quantizer of a known name; stacks: what a plan says, for `mixture`."""
    if name in QUANTIZERS:
        return QUANTIZERS[name]()
    if name in labels.MIXTURES:
        return Mixture(name, SMALL if name == "small" else stacks or {}, importance)
    bits, size = _AFFINE.fullmatch(name).groups()
    return LeastSquares(int(bits), int(size), importance)


def with_bf16_overflow(quantizer: Quantizer, beyond: Mapping[str, int]) -> Quantizer:
    """One that keeps the source's numbers, with what their values tell.

    beyond: BF16 tensor → how many of its values are no F16 numbers; it stays BF16. Without it sizes
    are right, and dtypes may not be.
    """
    made = copy.copy(quantizer)
    made.beyond = beyond
    made.form = replace(quantizer.form, bfloats=frozenset(beyond))
    return made


def uses_imatrix(name: str) -> bool:
    """Does that quantizer weigh errors by an importance?"""
    return name not in QUANTIZERS


def parse_name(text: str) -> str:
    """The name of a quantizer. Raises Unfit for another word."""
    if not is_quantizer(text):
        raise InvalidValue(text, f"one of {NAMES}")
    return text


def add_quantizer_options(parser: argparse.ArgumentParser) -> None:
    """The options by which a command is told its quantizer."""
    said = "default: the bundle's own; for a new one mlx, with a plan mixture"
    add_setting(parser, "QUANTIZER", type=parse_name, metavar="NAME", help=f"{NAMES}; {said}")
    add_setting(parser, "IMATRIX", help="importance of columns (.dat)")
    add_setting(parser, "PLAN", help="what plan.py wrote, for --quantizer mixture")


def check_quantizer_options(args: argparse.Namespace, planned: bool = False) -> None:
    """Raise UserError when the options do not go together. planned: the bundle was made by a
    plan."""
    name = args.quantizer
    if args.imatrix and not uses_imatrix(name):
        raise UserError("IMATRIX", f"QUANTIZER={name}", "affineBgG, small or mixture: no other "
                   "one weighs errors", "leave IMATRIX out, or choose one")  # fmt: skip
    if args.plan and name not in labels.PLANNED:
        raise UserError("PLAN", f"QUANTIZER={name}", " or ".join(labels.PLANNED),
                   "leave PLAN, FIT and SIZE out")  # fmt: skip
    if name in labels.PLANNED and not args.plan and not planned:
        raise UserError(f"QUANTIZER={name}", "no PLAN", "a file that make plan wrote",
                   "make plan FIT=… or SIZE=…, or PLAN=FILE")  # fmt: skip
