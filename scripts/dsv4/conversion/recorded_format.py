"""Read how a finished bundle stores its experts: the default for settings that are left out.

Each shard's metadata names the quantizer and its digest, which also covers imatrix and plan.
config.json repeats it (shard_metadata.py, bundle_files.py). So no stage gives the experts of a
finished bundle another format because QUANTIZER, PLAN or IMATRIX was left out. A bundle without a
record is another maker's.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.folder_roles import BUNDLE, folder_role
from dsv4.model.names import is_expert, parse_expert, stack_of
from dsv4.model.quantizer_table import is_quantizer, quantizer_properties
from dsv4.quantization.formats import (
    NAMES,
    Quantizer,
    check_quantizer_options,
    get_quantizer,
)
from dsv4.quantization.imatrix import EVEN, Importance, load_imatrix
from dsv4.quantization.mixture_plan import read_plan
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.safetensors_file import Tensor, read_shard
from dsv4.text import LINE, escape_line, short_repr

Mark = tuple[str, str]  # a quantizer's name, and its digest
REPAIR = "make repair mends it with a backup"


@dataclass(frozen=True)
class Recorded:
    """The mark of a bundle's experts; `names` are those of all quantizers that made some of them.

    complete: config.json has the same mark, as after a run that came to its end. stacks: of a
    mixture, the label of most experts of each stack, as they are stored.
    """

    folder: Path
    mark: Mark
    names: tuple[str, ...]
    complete: bool
    stacks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def importance(self) -> Importance:
        """The imatrix digest in the mark, without columns: only the imatrix file has those."""
        found = re.search("-imatrix-([0-9a-f]{16})$", self.mark[1])
        return Importance({}, found[1]) if found else EVEN


def recorded_in(folder: Path, wanted: str | None = None) -> Recorded | None:
    """The record of the bundle in `folder`; None where there is none, or no bundle.

    wanted: a quantizer that was named. Without it, UserError is raised for a bundle whose experts
    were made by several, as a killed run leaves them, and for a quantizer that nobody knows here.
    """
    config: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        config = read_json(folder / "config.json")
    found, tensors = read_marks(folder)
    record = config.get(labels.RECORD)
    table = record.get("table") if isinstance(record, dict) else ""
    said = (labels.recorded_quantizer(config) or "", f"{table}")
    found = found or [said] * bool(said[0])
    if not found:
        return None
    names = tuple(dict.fromkeys(name for name, _ in found))
    if wanted is None and (len(found) > 1 or not is_quantizer(names[0])):
        raise UserError(f"{folder}", f"experts made by {' and '.join(map(short_repr, names))}",
                   f"one of {NAMES}" if len(found) == 1 else "one quantizer with one table",
                   "name the one that all are to be made by: QUANTIZER=NAME")  # fmt: skip
    mark = next((one for one in found if one[0] == wanted), found[0])
    planned = quantizer_properties(mark[0]).needs_plan
    stacks = stored_stacks(tensors, config) if planned else {}
    return Recorded(folder, mark, names, mark == said, stacks)


def read_marks(folder: Path) -> tuple[list[Mark], dict[str, Tensor]]:
    """Return the sorted marks of shards with routed experts, and the tensors of readable shards.

    Shards without experts are ignored: they are not rewritten with a new quantizer, so their marks
    may be older.
    """
    found, tensors = set(), {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with contextlib.suppress(UserError):
            shard = read_shard(path)
            tensors.update(shard.tensors)
            keys = ("requantize_quantizer", "requantize_table")
            if any(map(is_expert, shard.tensors)) and keys[0] in shard.metadata:
                found.add(tuple(shard.metadata.get(key, "") for key in keys))
    return sorted(found), tensors


def stored_stacks(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return stack → the label of most of its experts."""
    stacks: dict[str, dict[str, Any]] = {}
    for name in tensors:
        base, _, part = name.rpartition(".")
        if part == "weight" and parse_expert(name):
            label = labels.stored_label(tensors, base, config)
            if label is not None:
                stacks.setdefault(stack_of(base), {})[base] = label
    return {stack: labels.most_common_label(of) for stack, of in stacks.items()}


# --- Settings -----------------------------------------------------------------------------------


def resolve_quantizer(args: argparse.Namespace, made: Recorded | None) -> bool:
    """Fill in a quantizer that was left out: the bundle's own; for a new one mlx, with a plan
    mixture. True if the bundle's experts are to stay as they are.

    Raises UserError when the options do not go together.
    """
    left_out = args.quantizer is None
    planned = made and quantizer_properties(made.mark[0]).needs_plan
    if left_out and made and (planned or not args.plan):
        args.quantizer = made.mark[0]
    elif left_out:
        args.quantizer = "mixture" if args.plan else "mlx"
    same = made is not None and made.mark[0] == args.quantizer
    check_quantizer_options(args, planned=same)
    return same and left_out and not args.plan and not args.imatrix


def quantizer_for(
    args: argparse.Namespace, source: Checkpoint, made: Recorded | None, stay: bool = False
) -> tuple[Quantizer, UserError | None]:
    """The quantizer that was asked for, or that made the bundle; and what to stop with if one
    matrix is to be made by it, where it is known by its mark alone.

    Says on stdout how far an imatrix reaches. Raises UserError for an imatrix or a plan that does
    not fit the source. stay: what `settle` said.
    """
    same = made if made and made.mark[0] == args.quantizer else None
    importance = load_imatrix(args.imatrix, source)
    if same and not args.imatrix:
        importance = same.importance
    stacks = read_plan(args.plan, source) if args.plan else same.stacks if same else None
    quantizer = get_quantizer(args.quantizer, importance, stacks)
    if same is None:
        return quantizer, None
    lack = None
    if importance.digest and not args.imatrix:
        lack = UserError(
            f"{same.folder}", f"experts to be made with the imatrix {importance.digest}…",
            "that file", "name it: IMATRIX=FILE",
        )  # fmt: skip
    by_labels = quantizer.properties.needs_plan and not args.plan
    if (by_labels or stay) and quantizer.digest != same.mark[1]:
        todo = "name the plan: PLAN=FILE" if by_labels else "name QUANTIZER: all are made anew"
        lack = UserError(
            f"{same.folder}", f"experts of {args.quantizer} {short_repr(same.mark[1])}",
            f"what can be made here, {quantizer.digest}", todo,
        )  # fmt: skip
        quantizer = replace(quantizer, digest=same.mark[1])
    return quantizer, lack


def describe_change(
    args: argparse.Namespace, made: Recorded | None, quantizer: Quantizer, number: int
) -> str:
    """One line before `number` matrices of a bundle get another form; "" where it stays, and for
    what upstream's converter left, which has none that is right.
    """
    if made is None:
        same = is_stock(args.bundle)
    else:
        same = made.names == (made.mark[0],) and mark_of(quantizer) == made.mark
    if number == 0 or same:
        return ""
    settings = {"QUANTIZER": args.quantizer, "IMATRIX": args.imatrix, "PLAN": args.plan}
    asked = " ".join(f"{name}={value}" for name, value in settings.items() if value)
    holds = f"experts as {' and '.join(made.names)}" if made else "another maker's experts"
    form = quantizer.form.description()
    return escape_line(
        f"requantize: {args.bundle} holds {holds}; {asked} asks for {form}: {number:,} tensors are "
        "rewritten", LINE,
    )  # fmt: skip


def mark_of(quantizer: Quantizer) -> Mark:
    """Return the mark of a quantizer."""
    return quantizer.name, quantizer.digest


# --- Other makers' bundles ----------------------------------------------------------------------


def check_ours(args: argparse.Namespace, made: Recorded | None) -> None:
    """Raise UserError for another maker's bundle, unless it is one that requantize is to mend.

    As a stage of others (--ours) requantize takes what CONVERTER=jang made; run by its name any
    bundle with FP4 experts under an affine label, or the others with QUANTIZER.
    """
    if made or folder_role(args.bundle) != BUNDLE:
        return
    by_name = "make requantize" if is_stock(args.bundle) else "make requantize QUANTIZER=NAME"
    stock = is_stock(args.bundle) and (not args.ours or args.converter == "jang")
    if stock or (not args.ours and args.quantizer):
        return
    raise UserError(f"{args.bundle}", "another maker's bundle", "one that this recipe made",
               f"{REPAIR}; {by_name} makes its experts anew, in place")  # fmt: skip


def is_stock(folder: Path) -> bool:
    """Return True for FP4 experts without an mxfp4 label, as upstream's converter makes them."""
    _, tensors = read_marks(folder)
    with contextlib.suppress(UserError):
        said = read_json(folder / "config.json").get("quantization")
        each = said.values() if isinstance(said, dict) else ()
        if any(isinstance(one, dict) and one.get("mode") == "mxfp4" for one in each):
            return False
    return any(
        parse_expert(name) and name.endswith(".scales") and tensor.dtype in ("U8", "F8_E8M0")
        for name, tensor in tensors.items()
    )
