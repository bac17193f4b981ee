"""The quantizers of the routed experts: encoders, digests and the options that choose one.

A quantizer turns whole rows of FP4 into the bytes of the parts that an expert has on disk. It
works row by row, so any run of rows can be encoded alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.errors import UserError
from dsv4.model import labels, mtp
from dsv4.model.bundle_tensors import StorageFormat
from dsv4.model.quantizer_table import (
    QuantizerProperties,
    is_quantizer,
    quantizer_properties,
    quantizers_with,
)
from dsv4.quantization import affine_table, least_squares, turboquant
from dsv4.quantization.affine_table import ErrorStats
from dsv4.quantization.imatrix import EVEN, Importance
from dsv4.quantization.mixture_plan import label_name
from dsv4.settings import InvalidValue, add_setting

Parts = Mapping[str, np.ndarray]  # part of an expert → its bytes, flat uint8


# Quantize whole rows: packed codes, exponents, parts, importance → errors. Arrays are flat uint8;
# `parts` are overwritten. importance: positive weights of the columns' squared errors, float64, or
# None; read only by quantizers that use an imatrix. Raises affine_table.BadGroup, with the group's
# index in these rows, for a group that the format cannot hold.
Encode = Callable[..., ErrorStats]


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A quantizer with everything that its bytes depend on.

    form: how the bundle stores the experts and all other tensors.
    digest: changes when the same source would give other bytes.
    importance: of the columns, by an expert's storage name, as an imatrix has it.
    beyond: BF16 tensor → number of its values that F16 lacks; such a tensor stays BF16.
    parts: of a mixture, the quantizer of each label (as text).
    """

    name: str
    form: StorageFormat
    digest: str
    encode: Encode | None = None
    importance: Mapping[str, np.ndarray] = field(default_factory=dict)
    beyond: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, Quantizer] = field(default_factory=dict)

    @property
    def label(self) -> dict[str, Any]:
        """The label of the experts in config.json; of a mixture the most common one."""
        return self.form.expert

    @property
    def properties(self) -> QuantizerProperties:
        """Return the properties that the name implies."""
        return quantizer_properties(self.name)

    def for_tensor(self, base: str) -> Quantizer:
        """Return the quantizer of one matrix, by its storage name."""
        if self.form.keeps_mtp(base):
            return get_quantizer("mxfp4")
        return self.parts[str(self.form.label(base))] if self.properties.mixed else self


@functools.cache
def _mlx_table() -> affine_table.Table:
    return affine_table.build_table()


def _encode_mlx(
    packed: np.ndarray, exponents: np.ndarray, parts: Parts, importance: np.ndarray | None = None
) -> ErrorStats:
    """Quantize as `mx.quantize(group_size=32, bits=4, mode="affine")`, scales and biases in F16."""
    return affine_table.quantize(
        _mlx_table(),
        packed.view(np.int64),
        exponents,
        parts["weight"].view(np.int64),
        parts["scales"].view(np.uint16),
        parts["biases"].view(np.uint16),
    )


def _copy_fp4(
    packed: np.ndarray, exponents: np.ndarray, parts: Parts, importance: np.ndarray | None = None
) -> ErrorStats:
    """Copy the source's FP4 bytes: 4.25 bits a weight, without an error."""
    if (bad := np.flatnonzero(exponents == 255)).size:
        raise affine_table.bad_exponent(int(bad[0]), 255)
    parts["weight"][:], parts["scales"][:] = packed, exponents
    return ErrorStats()  # the sum of squares is not needed where there is no error


def _encode_turboquant(
    packed: np.ndarray, exponents: np.ndarray, parts: Parts, importance: np.ndarray | None = None
) -> ErrorStats:
    """Quantize to TurboQuant: rotated rows, 2-bit codes and a norm; 2.005 bits a weight."""
    words, norms = parts["tq_packed"].view(np.uint32), parts["tq_norms"].view(np.float16)
    return turboquant.quantize(packed, exponents, words, norms)


def _encode_least_squares(
    shape: tuple[int, int],
    packed: np.ndarray,
    exponents: np.ndarray,
    parts: Parts,
    importance: np.ndarray | None = None,
) -> ErrorStats:
    """Quantize to affine of least squared error. shape: bits, and columns of a group."""
    scales, biases = (parts[part].view(np.uint16) for part in ("scales", "biases"))
    outputs = (parts["weight"], scales, biases)
    return least_squares.quantize(packed, exponents, importance, shape, outputs).tally


def get_quantizer(
    name: str,
    importance: Importance = EVEN,
    stacks: Mapping[str, dict[str, Any]] | None = None,
    choice: str = mtp.AS_EXPERTS,
) -> Quantizer:
    """Return the quantizer of a known name.

    stacks: for one that needs a plan, a label by stack ("layers.3.down_proj") or by projection.
    choice: how MTP is stored (model/mtp.py). Lossless keeps all of the source anyhow.
    """
    if quantizer_properties(name).lossless and choice == mtp.SOURCE:
        choice = mtp.AS_EXPERTS
    if choice != mtp.AS_EXPERTS:
        stacks = {stack: label for stack, label in (stacks or {}).items() if not mtp.is_mtp(stack)}
    quantizer = _quantizer(name, importance, stacks)
    digest = quantizer.digest + mtp.digest_suffix(choice)
    return replace(quantizer, digest=digest, form=replace(quantizer.form, mtp=choice))


def _quantizer(
    name: str, importance: Importance, stacks: Mapping[str, dict[str, Any]] | None
) -> Quantizer:
    properties = quantizer_properties(name)
    if properties.mixed:
        return _mixture(name, properties.by_projection or stacks or {}, importance)
    form = StorageFormat(properties.label, properties.keeps_source)
    if properties.uses_imatrix:
        return _least_squares(name, form, importance)
    if properties.by_case:
        return Quantizer(name, form, _mlx_table().digest, _encode_mlx)
    return Quantizer(name, form, "1", _copy_fp4 if properties.copies_fp4 else _encode_turboquant)


def _least_squares(name: str, form: StorageFormat, importance: Importance) -> Quantizer:
    encode = functools.partial(
        _encode_least_squares, (form.expert["bits"], form.expert["group_size"])
    )
    digest = least_squares.VERSION + importance.suffix
    return Quantizer(name, form, digest, encode, importance.columns)


def _mixture(name: str, stacks: Mapping[str, dict[str, Any]], importance: Importance) -> Quantizer:
    """Return a quantizer for several labels: by projection, or by layer and projection."""
    properties = quantizer_properties(name)
    expert = labels.most_common_label(stacks)
    form = StorageFormat(expert, properties.keeps_source, mixture=stacks)
    lines = [f"{stack} {label_name(label)}\n" for stack, label in sorted(stacks.items())]
    plan = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
    digest = f"{least_squares.VERSION}-{plan}{importance.suffix}"
    parts = {
        str(label): get_quantizer("mxfp4")
        if label == labels.MXFP4
        else _least_squares(label_name(label), StorageFormat(label), importance)
        for label in stacks.values()
    }
    return Quantizer(name, form, digest, importance=importance.columns, parts=parts)


def with_bf16_overflow(quantizer: Quantizer, beyond: Mapping[str, int]) -> Quantizer:
    """Return a quantizer that keeps the source's numbers, with the BF16 tensors that F16 lacks.

    Without them sizes are right, but dtypes may not be.
    """
    form = replace(quantizer.form, bfloats=frozenset(beyond))
    return replace(quantizer, beyond=beyond, form=form)


# --- Options ------------------------------------------------------------------------------------

NAMES = (
    "lossless, mlx, mxfp4, turboquant2, small, "
    f"{' and '.join(quantizers_with('needs_plan'))} (with a plan), "
    "affineBgG: B bits, 2 to 8 but 7, groups of G columns, 32, 64 or 128"
)


def parse_name(text: str) -> str:
    """Return the name of a quantizer. Raises InvalidValue for another word."""
    if not is_quantizer(text):
        raise InvalidValue(text, f"one of {NAMES}")
    return text


def add_quantizer_options(parser: argparse.ArgumentParser) -> None:
    """Add --quantizer, --imatrix and --plan."""
    default = "default: the bundle's own; for a new one mlx, with a plan mixture"
    add_setting(parser, "QUANTIZER", type=parse_name, metavar="NAME", help=f"{NAMES}; {default}")
    add_setting(parser, "IMATRIX", help="importance of columns (.dat)")
    add_setting(parser, "PLAN", help="what plan.py wrote, for --quantizer mixture")


def add_mtp_options(parser: argparse.ArgumentParser) -> None:
    """Add --mtp and --drop-mtp."""
    add_setting(parser, "MTP", metavar="source|as-experts",
                help="MTP or DSpark; default: the bundle's own; for a new one source")  # fmt: skip
    add_setting(parser, "DROP_MTP", help="leave MTP and DSpark out")


@dataclass(frozen=True)
class QuantizerOptions:
    """The options that choose a quantizer; None for one that was left out.

    keep: the bundle's experts keep the format that they have. mtp: a choice of model/mtp.py.
    """

    name: str | None
    imatrix: Path | None = None
    plan: Path | None = None
    keep: bool = False
    mtp: str | None = None


def quantizer_options(args: argparse.Namespace) -> QuantizerOptions:
    """Return the values of the options of `add_quantizer_options` and `add_mtp_options`."""
    return QuantizerOptions(args.quantizer, args.imatrix, args.plan, mtp=mtp_option(args))


def mtp_option(args: argparse.Namespace) -> str | None:
    """Return the choice for MTP by the options of `add_mtp_options`, None without them."""
    if args.mtp and args.drop_mtp:
        raise UserError("MTP and DROP_MTP", "both", "one of them", "leave the other out")
    return mtp.DROPPED if args.drop_mtp else args.mtp


def check_quantizer_options(options: QuantizerOptions, planned: bool = False) -> None:
    """Raise UserError for options that do not go together.

    planned: the bundle was made by a plan.
    """
    name = options.name
    properties = quantizer_properties(name)
    if options.imatrix and not properties.uses_imatrix:
        raise UserError("IMATRIX", f"QUANTIZER={name}", "affineBgG, small or mixture: no other "
                   "one weighs errors", "leave IMATRIX out, or choose one")  # fmt: skip
    if options.plan and not properties.needs_plan:
        raise UserError("PLAN", f"QUANTIZER={name}", " or ".join(quantizers_with("needs_plan")),
                   "leave PLAN, FIT and SIZE out")  # fmt: skip
    if properties.needs_plan and not options.plan and not planned:
        raise UserError(f"QUANTIZER={name}", "no PLAN", "a file that make plan wrote",
                   "make plan FIT=… or SIZE=…, or PLAN=FILE")  # fmt: skip
