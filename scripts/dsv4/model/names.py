"""Parse and make the names of tensors and modules of DeepSeek-V4.

Storage names are on disk, in the source and in the bundle: `layers.0.ffn.experts.7.w1`. Module
paths are the names after a runtime's `sanitize`: `model.layers.0.mlp.switch_mlp.gate_proj`.
Upstream's first bug is a confusion of the two, so only this module has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsv4.model.tensor_table import NUMBER, MissingSize, row_of

GROUP = 32  # columns that share a scale, in the source's FP4 and in every label of a bundle

# w1 = gate_proj, w3 = up_proj (width, hidden); w2 = down_proj (hidden, width).
PROJECTION = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# With a row or a number for each expert.
ROUTER = (".ffn.gate.weight", ".ffn.gate.bias", ".ffn.gate.bias_vl")

_EXPERT = re.compile(rf"(layers|mtp)\.({NUMBER})\.ffn\.experts\.({NUMBER})\.(w[123])\.(\w{{1,32}})")
_STACK = re.compile(rf"layers\.({NUMBER})\.mlp\.switch_mlp\.(gate|up|down)_proj\.(\w{{1,32}})")
_MTP = re.compile(rf"mtp\.({NUMBER})\.")


def parse_expert(name: str) -> tuple[str, int, int, str, str] | None:
    """Split a routed expert's storage name into (block, layer, expert, matrix, part), else None.

    >>> parse_expert("mtp.0.ffn.experts.7.w2.scale")
    ('mtp', 0, 7, 'w2', 'scale')
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    block, layer, expert, matrix, part = match.groups()
    return block, int(layer), int(expert), matrix, part


def expert_base(block: str, layer: int, expert: int, matrix: str) -> str:
    """Return the storage name of an expert's matrix, without the part (`.weight`, `.scale`, …)."""
    return f"{block}.{layer}.ffn.experts.{expert}.{matrix}"


def mtp_layer(name: str) -> int | None:
    """Return the number of a tensor's MTP layer or DSpark stage; None for other tensors.

    >>> mtp_layer("mtp.2.markov_head.markov_w1.weight"), mtp_layer("layers.2.attn_norm.weight")
    (2, None)
    """
    match = _MTP.match(name)
    return int(match[1]) if match else None


def stack_base(base: str) -> str:
    """Return the storage name of a routed expert's matrix in TurboQuant, without the part.

    All experts of a main layer share a tensor; each of MTP has its own.

    >>> stack_base("layers.3.ffn.experts.7.w2"), stack_base("mtp.0.ffn.experts.7.w2")
    ('layers.3.mlp.switch_mlp.down_proj', 'mtp.0.ffn.experts.7.w2')
    """
    block, layer, _, matrix, _ = parse_expert(f"{base}.weight") or ("", 0, 0, "", "")
    return f"layers.{layer}.mlp.switch_mlp.{PROJECTION[matrix]}" if block == "layers" else base


def parse_stack(name: str) -> tuple[int, str, str] | None:
    """Split the name of a stack of experts into (layer, matrix, part), else None.

    >>> parse_stack("layers.3.mlp.switch_mlp.down_proj.tq_norms")
    (3, 'w2', 'tq_norms')
    """
    match = _STACK.fullmatch(name)
    if match is None:
        return None
    layer, projection, part = match.groups()
    matrix = next(w for w, named in PROJECTION.items() if named == f"{projection}_proj")
    return int(layer), matrix, part


def is_expert(name: str) -> bool:
    """Return True for a tensor of a routed expert, or of a stack of them."""
    return parse_expert(name) is not None or parse_stack(name) is not None


def stack_of(base: str) -> str:
    """Return the name, in a plan, of the stack that the runtimes put an expert's matrix into.

    >>> stack_of("layers.3.ffn.experts.7.w2")
    'layers.3.down_proj'
    """
    block, layer, _, matrix, _ = parse_expert(f"{base}.weight") or ("", 0, 0, "", "")
    return f"{block}.{layer}.{PROJECTION[matrix]}"


def columns_of(base: str, config: Mapping[str, Any]) -> int:
    """Return the columns of the matrix `base` by config.json; 0 if it lacks the size.

    >>> columns_of("layers.0.ffn.experts.3.w2", {"moe_intermediate_size": 2048})
    2048
    """
    row = row_of(f"{base}.weight") or row_of("head.weight")
    try:
        return row.columns(config)
    except MissingSize:
        return 0


def is_control(name: str) -> bool:
    """Return True for the F32 control tensors: `hc_*`, `attn_sink`, `ffn.gate.bias`, `bias_vl`.

    They steer routing and residual mixing. Upstream's converter rounds them to F16, and vMLX 1.6.81
    refuses such a bundle.
    """
    return treatment(name) == "control"


def most_zeros(name: str, dtype: str, nbytes: int) -> int | None:
    """Return the number of successive zero bytes that show a hole in a tensor; None for no limit.

    Codes and scales of FP4 and FP8 never have a page of zeros. A BF16 matrix may have rows of zeros
    (unused tokens), but no megabyte; embedding and head, which may have rows beyond the tokenizer's
    vocabulary, no 128th part. No matrix, scale or norm has only zeros.
    """
    base = name.removesuffix("s") if name.endswith(".scales") else name  # a bundle's, too
    what = treatment(base)
    if nbytes < 16 or what in (None, "control") or name.endswith((".tid2eid", ".ape")):
        return None
    if what == "image" and not name.endswith(".weight"):
        return None  # biases and the padding of images may be 0
    packed = dtype in ("I8", "U8", "F8_E4M3", "F8_E8M0", "U32") or name.endswith(".scales")
    if packed and not name.startswith(("embed.", "head.")):
        return min(nbytes, 4096)
    if what == "passthrough":
        return nbytes
    rows = nbytes >> 7 if name.startswith(("embed.", "head.")) else 0
    return min(nbytes, max(1 << 20, rows))


def switch_paths(layer: int, matrix: str) -> tuple[str, str]:
    """Return the module paths of a layer's stacked experts: (mlx_lm and vMLX, mlx-vlm)."""
    projection = PROJECTION[matrix]
    return (
        f"model.layers.{layer}.mlp.switch_mlp.{projection}",
        f"language_model.model.layers.{layer}.ffn.switch_mlp.{projection}",
    )


def module_paths(base: str) -> tuple[str, ...]:
    """Return the module paths of another matrix: (mlx_lm and vMLX, mlx-vlm); () in MTP.

    >>> module_paths("layers.0.attn.indexer.wq_b")[0]
    'model.layers.0.self_attn.indexer.wq_b'
    >>> module_paths("layers.3.ffn.shared_experts.w1")[1]
    'language_model.model.layers.3.ffn.shared_experts.gate_proj'
    """
    found = re.fullmatch(r"layers\.(\d+)\.(attn|ffn)\.(.+)", base)
    if found is None:
        return ()
    layer, part, rest = found.groups()
    owner, _, last = rest.rpartition(".")
    if owner == "shared_experts":
        rest = f"{owner}.{PROJECTION.get(last, last)}"
    renamed = {"attn": "self_attn", "ffn": "mlp"}[part]
    return (
        f"model.layers.{layer}.{renamed}.{rest}",
        f"language_model.model.layers.{layer}.{part}.{rest}",
    )


def treatment(name: str) -> str | None:
    """Return a tensor's treatment (tensor_table.TREATMENTS), or None for unknown names.

    That of a scale is "scale": it has no counterpart of its own.

    >>> treatment("mtp.0.e_proj.scale"), treatment("layers.0.attn.unheard_of.weight")
    ('scale', None)
    """
    if not name.endswith(".scale"):
        row = row_of(name)
        return row.treatment if row else None
    row = row_of(name.removesuffix("scale") + "weight")
    return "scale" if row and row.treatment in ("expert", "matrix", "head") else None


def kind(name: str) -> str:
    """Return `treatment`, or for a name that the table lacks that of upstream's converter.

    The native converter stops at such a name.
    """
    found = treatment(name)
    if found:
        return found
    if name.endswith(".scale"):
        return "scale"
    if parse_expert(name):
        return "expert"
    if "norm" in name or name.endswith((".ape", ".tid2eid", ".gate.weight", ".bias")):
        return "passthrough"
    return "matrix" if name.endswith(".weight") else "passthrough"
