"""The names of DeepSeek-V4: what a tensor is, and what a runtime calls it.

Storage names lie on disk, in the source and in the bundle: `layers.0.ffn.experts.7.w1`. Module
paths are what a runtime's `sanitize` makes of them: `model.layers.0.mlp.switch_mlp.gate_proj`.
Upstream's first bug is a confusion of the two, so no other module spells them out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsv4.storage.limits import COLUMNS

GROUP = 32  # columns that share a scale, in the source's FP4 and in every label of a bundle
BLOCK = 128  # rows and columns that share one in the source's FP8

# w1 = gate_proj, w3 = up_proj (width, hidden); w2 = down_proj (hidden, width).
PROJECTION = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

# Which source tensor gets which treatment (`kind` says what each means). Read from the top; a name
# that no line matches is unknown. N stands for a number, B for a block: layers.N. or mtp.N.
_TABLE = (
    # routed experts, FP4
    (r"B ffn.experts.N.w[123].weight", "expert"),
    # F32: they steer routing and residual mixing
    (r"(B )?hc_\w+", "control"),
    (r"B attn.attn_sink", "control"),
    (r"B ffn.gate.bias", "control"),
    # norms; router; compressor positions; the table of the hash-routed layers
    (r"norm.weight", "passthrough"),
    (r"B (attn_norm|ffn_norm|norm|enorm|hnorm|main_norm).weight", "passthrough"),
    (r"B attn.(q_norm|kv_norm).weight", "passthrough"),
    (r"B attn.(indexer.)?compressor.(norm.weight|ape)", "passthrough"),
    (r"B ffn.gate.(weight|tid2eid)", "passthrough"),
    # kept as the source has it, 1.06 GB for Flash instead of 0.6: mlx-vlm has no quantized head
    (r"head.weight", "head"),
    # matrices, FP8 or BF16
    (r"embed.weight", "affine8"),
    (r"B attn.(wq_a|wq_b|wkv|wo_a|wo_b).weight", "affine8"),
    (r"B attn.(indexer.)?compressor.(wkv|wgate).weight", "affine8"),
    (r"B attn.indexer.(wq_b|weights_proj).weight", "affine8"),
    (r"B ffn.shared_experts.w[123].weight", "affine8"),
    # MTP's own: of the first release, and of those with DSpark
    (r"mtp.N.(e_proj|h_proj|main_proj).weight", "affine8"),
    (r"mtp.N.(markov_head.markov_w[12]|confidence_head.proj).weight", "affine8"),
)
_NUMBER = r"[0-9]{1,6}"  # a name whose number has more digits is unknown
TREATMENTS = tuple(
    (
        re.compile(
            line.replace(".", r"\.").replace("B ", r"(layers|mtp)\.N\.").replace("N", _NUMBER)
        ),
        treatment,
    )
    for line, treatment in _TABLE
)

_EXPERT = re.compile(
    rf"(layers|mtp)\.({_NUMBER})\.ffn\.experts\.({_NUMBER})\.(w[123])\.(\w{{1,32}})"
)
_STACK = re.compile(rf"layers\.({_NUMBER})\.mlp\.switch_mlp\.(gate|up|down)_proj\.(\w{{1,32}})")
_MTP = re.compile(rf"mtp\.({_NUMBER})\.")
_CONTROL = re.compile(
    rf"(?:(?:layers|mtp)\.{_NUMBER}\.)?"
    r"(?:hc_\w+|attn\.attn_sink|ffn\.gate\.bias)"
)


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
    """Storage name of a routed expert's matrix, without the part (`.weight`, `.scale`, …)."""
    return f"{block}.{layer}.ffn.experts.{expert}.{matrix}"


def mtp_layer(name: str) -> int | None:
    """The number of the MTP layer that a storage name belongs to: one of DSpark's stages, say.

    >>> mtp_layer("mtp.2.markov_head.markov_w1.weight"), mtp_layer("layers.2.attn_norm.weight")
    (2, None)
    """
    match = _MTP.match(name)
    return int(match[1]) if match else None


def stack_base(base: str) -> str:
    """Storage name under which TurboQuant has a routed expert's matrix, without the part.

    All experts of a main layer lie in one tensor, MTP's each in its own.

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
    """True for a tensor of a routed expert, or of a stack of them."""
    return parse_expert(name) is not None or parse_stack(name) is not None


def stack_of(base: str) -> str:
    """What the runtimes stack an expert's matrix into, as a plan names it.

    >>> stack_of("layers.3.ffn.experts.7.w2")
    'layers.3.down_proj'
    """
    block, layer, _, matrix, _ = parse_expert(f"{base}.weight") or ("", 0, 0, "", "")
    return f"{block}.{layer}.{PROJECTION[matrix]}"


# The input width of a matrix by the end of its name, in words of config.json.
INPUT = (
    ("attn.wq_b", "q_lora_rank"), ("attn.indexer.wq_b", "q_lora_rank"),
    (".w2", "moe_intermediate_size"), ("markov_head.markov_w1", "dspark_markov_rank"),
    ("markov_head.markov_w2", "dspark_markov_rank"),
)  # fmt: skip


def columns_of(base: str, config: Mapping[str, Any]) -> int:
    """The columns of the matrix `base` by config.json; 0 where it does not say.

    >>> columns_of("layers.0.ffn.experts.3.w2", {"moe_intermediate_size": 2048})
    2048
    """

    def number(key: str) -> int:
        value = config.get(key)
        return value if isinstance(value, int) and 0 < value <= COLUMNS else 0

    groups = number("o_groups")
    if base.endswith("attn.wo_a"):
        return number("num_attention_heads") * number("head_dim") // groups if groups else 0
    if base.endswith("attn.wo_b"):
        return groups * number("o_lora_rank")
    if base.endswith(".main_proj"):  # takes the hidden states of those layers side by side
        layers = config.get("dspark_target_layer_ids")
        return number("hidden_size") * len(layers) if isinstance(layers, list) else 0
    if base.endswith(".confidence_head.proj"):
        rank = number("dspark_markov_rank")
        return number("hidden_size") + rank if rank else 0
    return number(next((key for end, key in INPUT if base.endswith(end)), "hidden_size"))


def is_control(name: str) -> bool:
    """True for the F32 control tensors: `hc_*`, `attn_sink`, `ffn.gate.bias`, in every block.

    They steer routing and residual mixing; upstream's converter rounds them to F16, and vMLX 1.6.81
    refuses such a bundle.
    """
    return _CONTROL.fullmatch(name) is not None


def most_zeros(name: str, dtype: str, nbytes: int) -> int | None:
    """So many zero bytes in a row are a hole in a tensor, not numbers; None: any may be.

    Codes and scales of FP4 and FP8 never hold a page of them. A BF16 matrix may have rows of zeros
    (tokens that nobody uses), but no megabyte; no matrix, scale or norm is nothing but zeros.
    """
    base = name.removesuffix("s") if name.endswith(".scales") else name  # a bundle's, too
    what = treatment(base)
    if nbytes < 16 or what in (None, "control") or name.endswith((".tid2eid", ".ape")):
        return None
    packed = dtype in ("I8", "U8", "F8_E4M3", "F8_E8M0", "U32") or name.endswith(".scales")
    if packed and not name.startswith(("embed.", "head.")):
        return min(nbytes, 4096)
    return nbytes if what == "passthrough" else min(nbytes, 1 << 20)


def switch_paths(layer: int, matrix: str) -> tuple[str, str]:
    """Module paths of the stacked experts of one layer: (mlx_lm and vMLX, mlx-vlm)."""
    projection = PROJECTION[matrix]
    return (
        f"model.layers.{layer}.mlp.switch_mlp.{projection}",
        f"language_model.model.layers.{layer}.ffn.switch_mlp.{projection}",
    )


def module_paths(base: str) -> tuple[str, ...]:
    """Module paths of a matrix that is no routed expert: (mlx_lm and vMLX, mlx-vlm); () in MTP.

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
    """What `kind` says, from the table above; None for a name that it does not have.

    >>> treatment("mtp.0.e_proj.scale"), treatment("layers.0.attn.unheard_of.weight")
    ('scale', None)
    """
    weight = name.removesuffix(".scale") + ".weight" if name.endswith(".scale") else name
    found = next((what for pattern, what in TREATMENTS if pattern.fullmatch(weight)), None)
    if weight != name:
        return "scale" if found in ("expert", "affine8", "head") else None
    return found


def kind(name: str) -> str:
    """What a bundle makes of the source tensor `name`.

    'scale'        belongs to the weight beside it, has no counterpart of its own
    'expert'       routed expert: 4-bit affine, group 32
    'control'      F32, as in the source
    'passthrough'  norms, router weight, compressor positions: F16; the hash table: its integers
    'head'         as in the source; upstream makes 8-bit affine of it, which other bundles have
    'affine8'      every other weight: 8-bit affine, group 32

    'passthrough' and 'affine8' are upstream's choice (jang_tools.dsv4.convert_dsv4_jangtq,
    classify, 2.5.9). For a name that the table does not have, this says what upstream's converter
    would make of it; ours stops there.
    """
    found = treatment(name)
    if found:
        return found
    if name.endswith(".scale"):
        return "scale"
    if parse_expert(name):
        return "expert"
    if is_control(name):
        return "control"
    if "norm" in name or name.endswith((".ape", ".tid2eid", ".gate.weight", ".bias")):
        return "passthrough"
    return "affine8" if name.endswith(".weight") else "passthrough"
