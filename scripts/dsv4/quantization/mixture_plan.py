"""A plan on disk: which stack of experts gets which form. plan.py writes it, a reader may edit it.

    {"experts": {"layers.0": {"gate_proj": "affine2g64", …}, …, "mtp.0": {…}}, …}

A form is `affineBgG` (B bits, groups of G columns) or `mxfp4`. Everything else in the file is what
was measured and chosen, for a reader; nothing looks at it again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.load import expert_bases
from dsv4.model.names import stack_of
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.json_types import first_mismatch
from dsv4.text import short_repr

_FORM = re.compile(r"affine([234568])g(32|64|128)")
MAKE = "edit it, or make plan"


def label_by_name(name: str) -> dict[str, Any] | None:
    """The label of a form's name, None for another word."""
    found = _FORM.fullmatch(name)
    if found:
        return labels.affine_label(int(found[1]), int(found[2]))
    return dict(labels.MXFP4) if name == "mxfp4" else None


def label_name(label: dict[str, Any]) -> str:
    """The name of a form, by its label."""
    if label == labels.MXFP4:
        return "mxfp4"
    return f"affine{label['bits']}g{label['group_size']}"


def stacks_of(source: Checkpoint) -> list[str]:
    """Every stack of routed experts that a source has, as "layers.3.down_proj"."""
    return list(dict.fromkeys(stack_of(base) for base in expert_bases(source)))


def check_plan_exists(path: Path) -> None:
    """Raise UserError when there is no such plan."""
    if not path.is_file():
        raise UserError(f"{path}", "no such file", "a plan", "make plan FIT=… or SIZE=… writes one")


def read_plan(path: Path, source: Checkpoint) -> dict[str, dict[str, Any]]:
    """Stack → label, for every stack of the source.

    Raises UserError for a stack that the source does not have or that the plan lacks, and for a
    form that is none.
    """
    check_plan_exists(path)
    experts = read_json(path).get("experts")
    if first_mismatch(experts, {str: {str: str}}) is not None:
        raise UserError(
            f"{path}: experts", short_repr(experts), "{layer: {projection: form}}", MAKE
        )
    given = {f"{layer}.{of}": form for layer in experts for of, form in experts[layer].items()}
    wanted = stacks_of(source)
    if strange := [stack for stack in given if stack not in wanted]:
        raise UserError(f"{path}: {short_repr(strange[0])}", "a module that the source does not have",
                   f"one of {len(wanted)} from {wanted[0]} to {wanted[-1]}", MAKE)  # fmt: skip
    if missing := [stack for stack in wanted if stack not in given]:
        raise UserError(f"{path}", f"nothing for {missing[0]}", f"{len(wanted)} modules", MAKE)
    for stack, form in given.items():
        if label_by_name(form) is None:
            raise UserError(f"{path}: {stack}", short_repr(form), "affineBgG or mxfp4", MAKE)
    return {stack: label_by_name(given[stack]) for stack in wanted}
