"""Read a plan: the format of each stack of experts. plan.py writes it; a user may edit it.

    {"experts": {"layers.0": {"gate_proj": "affine2g64", …}, …, "mtp.0": {…}}, …}

A format is `affineBgG` (B bits, groups of G columns) or `mxfp4`. The other keys record what was
measured and chosen; they are not read again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import labels, mtp
from dsv4.model.load import expert_bases
from dsv4.model.names import stack_of
from dsv4.model.quantizer_table import affine_label_by_name
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.json_types import first_mismatch
from dsv4.text import short_repr

MAKE = "edit it, or make plan"


def label_by_name(name: str) -> dict[str, Any] | None:
    """Return the label of a format's name; None for another word."""
    return dict(labels.MXFP4) if name == "mxfp4" else affine_label_by_name(name)


def label_name(label: dict[str, Any]) -> str:
    """Return the name of a format, by its label."""
    if label == labels.MXFP4:
        return "mxfp4"
    return f"affine{label['bits']}g{label['group_size']}"


def planned_bases(source: Checkpoint, choice: str) -> list[str]:
    """Return the storage names of the expert matrices whose formats a plan chooses."""
    bases = expert_bases(source)
    return [base for base in bases if choice == mtp.AS_EXPERTS or not mtp.is_mtp(base)]


def check_plan_exists(path: Path) -> None:
    """Raise UserError if the plan is missing."""
    if not path.is_file():
        raise UserError(f"{path}", "no such file", "a plan", "make plan FIT=… or SIZE=… writes one")


def read_plan(
    path: Path, source: Checkpoint, choice: str = mtp.AS_EXPERTS
) -> dict[str, dict[str, Any]]:
    """Return stack → label, for every stack of the source that a plan chooses.

    choice: how MTP is stored; a plan chooses MTP's stacks only as-experts, and its entries for them
    are ignored otherwise. Raises UserError for a stack that the source or the plan lacks, and for
    an unknown format.
    """
    check_plan_exists(path)
    experts = read_json(path).get("experts")
    if first_mismatch(experts, {str: {str: str}}) is not None:
        raise UserError(
            f"{path}: experts", short_repr(experts), "{layer: {projection: form}}", MAKE
        )
    given = {
        f"{layer}.{projection}": form
        for layer, forms in experts.items()
        for projection, form in forms.items()
        if choice == mtp.AS_EXPERTS or not mtp.is_mtp(f"{layer}.")
    }
    stacks = list(dict.fromkeys(map(stack_of, planned_bases(source, choice))))
    if strange := [stack for stack in given if stack not in stacks]:
        raise UserError(
            f"{path}: {short_repr(strange[0])}", "a module that the source does not have",
            f"one of {len(stacks)} from {stacks[0]} to {stacks[-1]}", MAKE,
        )  # fmt: skip
    if missing := [stack for stack in stacks if stack not in given]:
        raise UserError(f"{path}", f"nothing for {missing[0]}", f"{len(stacks)} modules", MAKE)
    for stack, form in given.items():
        if label_by_name(form) is None:
            raise UserError(f"{path}: {stack}", short_repr(form), "affineBgG or mxfp4", MAKE)
    return {stack: label_by_name(given[stack]) for stack in stacks}
