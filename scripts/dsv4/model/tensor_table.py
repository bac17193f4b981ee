"""Describe every tensor of a DeepSeek-V4 source: name, number format, shape, treatment.

One row for each tensor; everything else that knows tensors asks this table. A new tensor is one
more row. Shapes are those of transformers 5.24.0 (models/deepseek_v4/modeling_deepseek_v4.py), for
MTP and DSpark those of the published checkpoints, for images those of mlx-vlm 0.7.10
(models/deepseek_v4/vision.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from dsv4.storage.limits import COLUMNS

# Treatments: how a bundle stores a tensor. "passthrough" and "matrix" are upstream's choice
# (jang_tools.dsv4.convert_dsv4_jangtq, classify, 2.5.9). Upstream quantizes the head too, but
# mlx-vlm reads no quantized head; unquantized, Flash's takes 1.06 GB instead of 0.6.
TREATMENTS = {
    "expert": "a routed expert, in the quantizer's format",
    "control": "F32, as in the source: for routing or residual mixing",
    "passthrough": "norms, router weight, compressor positions to F16; integers as they are",
    "head": "as in the source",
    "image": "as in the source: the vision tower, the aligner and the image tensors",
    "matrix": "8-bit affine, groups of 32",
}
NUMBER = r"[0-9]{1,6}"  # a name with a longer number is unknown

# The sizes in the shapes below, and config.json's keys for them.
SIZES = {
    "hidden": "hidden_size", "vocab": "vocab_size", "width": "moe_intermediate_size",
    "heads": "num_attention_heads", "head_dim": "head_dim", "q_lora": "q_lora_rank",
    "o_lora": "o_lora_rank", "o_groups": "o_groups", "experts": "n_routed_experts",
    "top_k": "num_experts_per_tok", "hc": "hc_mult", "index_heads": "index_n_heads",
    "index_dim": "index_head_dim", "rank": "dspark_markov_rank",
    "v_dim": "vision_dim", "v_inter": "vision_inter_dim", "patch": "vision_patch_size",
    "pooled": "vision_downsample_ratio",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """The properties of a block that its tensors depend on.

    prefix: "" for the model's ends, "layers.N.", "mtp.N." or "vision.blocks.N.". ratio: its
    compress ratio, 0, 4 or 128. hashed: the router has a table of experts by token. drafter: "" in
    a main layer, "mtp" for the first release's MTP, "dspark". first, last: its place among DSpark's
    stages. vision: the release reads images.
    """

    prefix: str
    ratio: int = 0
    hashed: bool = False
    drafter: str = ""
    first: bool = False
    last: bool = False
    vision: bool = False


@dataclass(frozen=True)
class Row:
    """One tensor.

    name: without the block's prefix; E stands for an expert's number. stored: FP4 or FP8 (with a
    `.scale` beside it), BF16, F32 or INT. formula: rows and columns in numbers, in terms of SIZES,
    `ratio`, `overlap` and `targets`. treatment: a key of TREATMENTS. present: in which blocks.
    """

    name: str
    stored: str
    formula: str
    treatment: str
    present: Callable[[Block], bool]

    def shape(self, config: Mapping[str, Any], block: Block) -> tuple[int, ...]:
        """Return the shape by config.json. Raises MissingSize."""
        return tuple(eval(_compiled(self.formula), {}, _Sizes(config, block)))

    def columns(self, config: Mapping[str, Any]) -> int:
        """Return the columns of a matrix by config.json. Raises MissingSize."""
        formula = self.formula.rpartition(", ")[2]
        return eval(_compiled(formula), {}, _Sizes(config, Block("")))


def _rows(present: Callable[[Block], bool], *rows: tuple[str, str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(*row, present) for row in rows)


# A compressor pools `ratio` tokens into one key; at ratio 4 windows overlap.
_COMPRESSOR = (
    ("attn.compressor.wkv.weight", "BF16", "overlap * head_dim, hidden", "matrix"),
    ("attn.compressor.wgate.weight", "BF16", "overlap * head_dim, hidden", "matrix"),
    ("attn.compressor.ape", "F32", "ratio, overlap * head_dim", "passthrough"),
    ("attn.compressor.norm.weight", "BF16", "head_dim,", "passthrough"),
)
_INDEXER = (
    ("attn.indexer.wq_b.weight", "FP8", "index_heads * index_dim, q_lora", "matrix"),
    ("attn.indexer.weights_proj.weight", "BF16", "index_heads, hidden", "matrix"),
    ("attn.indexer.compressor.wkv.weight", "BF16", "overlap * index_dim, hidden", "matrix"),
    ("attn.indexer.compressor.wgate.weight", "BF16", "overlap * index_dim, hidden", "matrix"),
    ("attn.indexer.compressor.ape", "F32", "ratio, overlap * index_dim", "passthrough"),
    ("attn.indexer.compressor.norm.weight", "BF16", "index_dim,", "passthrough"),
)
# The head of the hyper-connections (mHC), of the model and of the last block of MTP.
_HC_HEAD = (
    ("hc_head_fn", "F32", "hc, hc * hidden", "control"),
    ("hc_head_base", "F32", "hc,", "control"),
    ("hc_head_scale", "F32", "1,", "control"),
)
ENDS = _rows(
    lambda block: not block.prefix,
    ("embed.weight", "BF16", "vocab, hidden", "matrix"),
    ("norm.weight", "BF16", "hidden,", "passthrough"),
    ("head.weight", "BF16", "vocab, hidden", "head"),
    *_HC_HEAD,
)
IMAGE_ENDS = _rows(
    lambda block: block.vision,
    ("vision.patch_embed.proj.weight", "BF16", "v_dim, 3 * patch * patch", "image"),
    ("vision.patch_embed.proj.bias", "BF16", "v_dim,", "image"),
    ("vision.norm.weight", "BF16", "v_dim,", "image"),
    ("aligner.w1.weight", "BF16", "hidden, v_dim * pooled * pooled", "image"),
    ("aligner.w1.bias", "BF16", "hidden,", "image"),
    ("aligner.w2.weight", "BF16", "hidden, hidden", "image"),
    ("aligner.w2.bias", "BF16", "hidden,", "image"),
    ("image_start", "BF16", "hidden,", "image"),
    ("image_end", "BF16", "hidden,", "image"),
    ("image_newline", "BF16", "hidden,", "image"),
    ("image_pad", "BF16", "hidden,", "image"),
)
# Of a block of the vision tower. Some releases spell `ffn.` as `mlp.` (`other_spelling`).
TOWER = "vision.blocks."
TOWER_BLOCKS = _rows(
    lambda block: True,
    ("norm1.weight", "BF16", "v_dim,", "image"),
    ("attn.wqkv.weight", "BF16", "3 * v_dim, v_dim", "image"),
    ("attn.wqkv.bias", "BF16", "3 * v_dim,", "image"),
    ("attn.wo.weight", "BF16", "v_dim, v_dim", "image"),
    ("attn.wo.bias", "BF16", "v_dim,", "image"),
    ("norm2.weight", "BF16", "v_dim,", "image"),
    ("ffn.w1.weight", "BF16", "2 * v_inter, v_dim", "image"),
    ("ffn.w2.weight", "BF16", "v_dim, v_inter", "image"),
)
# Of main layers and of MTP's alike.
BLOCKS = (
    *_rows(
        lambda block: True,
        ("attn_norm.weight", "BF16", "hidden,", "passthrough"),
        ("hc_attn_fn", "F32", "(2 + hc) * hc, hc * hidden", "control"),
        ("hc_attn_base", "F32", "(2 + hc) * hc,", "control"),
        ("hc_attn_scale", "F32", "3,", "control"),
        ("ffn_norm.weight", "BF16", "hidden,", "passthrough"),
        ("hc_ffn_fn", "F32", "(2 + hc) * hc, hc * hidden", "control"),
        ("hc_ffn_base", "F32", "(2 + hc) * hc,", "control"),
        ("hc_ffn_scale", "F32", "3,", "control"),
        ("attn.wq_a.weight", "FP8", "q_lora, hidden", "matrix"),
        ("attn.wq_b.weight", "FP8", "heads * head_dim, q_lora", "matrix"),
        ("attn.wkv.weight", "FP8", "head_dim, hidden", "matrix"),
        ("attn.wo_a.weight", "FP8", "o_groups * o_lora, heads * head_dim // o_groups", "matrix"),
        ("attn.wo_b.weight", "FP8", "hidden, o_groups * o_lora", "matrix"),
        ("attn.q_norm.weight", "BF16", "q_lora,", "passthrough"),
        ("attn.kv_norm.weight", "BF16", "head_dim,", "passthrough"),
        ("attn.attn_sink", "F32", "heads,", "control"),
    ),
    *_rows(lambda block: block.ratio > 0, *_COMPRESSOR),
    *_rows(lambda block: block.ratio == 4, *_INDEXER),
    *_rows(lambda block: True, ("ffn.gate.weight", "BF16", "experts, hidden", "passthrough")),
    *_rows(lambda block: block.hashed, ("ffn.gate.tid2eid", "INT", "vocab, top_k", "passthrough")),
    *_rows(
        lambda block: block.vision or not block.hashed,
        ("ffn.gate.bias", "F32", "experts,", "control"),
    ),
    *_rows(lambda block: block.vision, ("ffn.gate.bias_vl", "F32", "experts,", "control")),
    *_rows(
        lambda block: True,
        ("ffn.shared_experts.w1.weight", "FP8", "width, hidden", "matrix"),
        ("ffn.shared_experts.w2.weight", "FP8", "hidden, width", "matrix"),
        ("ffn.shared_experts.w3.weight", "FP8", "width, hidden", "matrix"),
        ("ffn.experts.E.w1.weight", "FP4", "width, hidden", "expert"),
        ("ffn.experts.E.w2.weight", "FP4", "hidden, width", "expert"),
        ("ffn.experts.E.w3.weight", "FP4", "width, hidden", "expert"),
    ),
)
# Beside them, of an MTP layer of the first release, and of DSpark's first and last stage.
DRAFTERS = (
    *_rows(
        lambda block: block.drafter == "mtp",
        ("e_proj.weight", "FP8", "hidden, hidden", "matrix"),
        ("h_proj.weight", "FP8", "hidden, hidden", "matrix"),
        ("enorm.weight", "BF16", "hidden,", "passthrough"),
        ("hnorm.weight", "BF16", "hidden,", "passthrough"),
    ),
    *_rows(
        lambda block: block.drafter == "dspark" and block.first,
        ("main_proj.weight", "FP8", "hidden, targets * hidden", "matrix"),
        ("main_norm.weight", "BF16", "hidden,", "passthrough"),
    ),
    *_rows(
        lambda block: block.drafter == "mtp" or (block.drafter == "dspark" and block.last),
        ("norm.weight", "BF16", "hidden,", "passthrough"),
        *_HC_HEAD,
    ),
    *_rows(
        lambda block: block.drafter == "dspark" and block.last,
        ("markov_head.markov_w1.weight", "BF16", "vocab, rank", "matrix"),
        ("markov_head.markov_w2.weight", "BF16", "vocab, rank", "matrix"),
        ("confidence_head.proj.weight", "BF16", "1, hidden + rank", "matrix"),
    ),
)


class MissingSize(LookupError):
    """A key of config.json is missing, or its value is no positive whole number.

    Not a KeyError, which `eval` would turn into a NameError.
    """


class _Sizes(dict):
    """The values of the names in a formula. Raises MissingSize for one that config.json lacks."""

    def __init__(self, config: Mapping[str, Any], block: Block) -> None:
        super().__init__(ratio=block.ratio, overlap=2 if block.ratio == 4 else 1)
        self._config = config

    def __missing__(self, name: str) -> int:
        if name == "targets":  # DSpark's first stage takes so many layers' hidden states
            layers = self._config.get("dspark_target_layer_ids")
            value: Any = len(layers) if isinstance(layers, list | tuple) else None
        else:
            value = self._config.get(SIZES[name])
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= COLUMNS:
            raise MissingSize(SIZES.get(name, "dspark_target_layer_ids"))
        return value


@functools.cache
def _compiled(formula: str) -> CodeType:
    return compile(formula, formula, "eval")


_INDEX = re.compile(rf"(?<=\.){NUMBER}(?=\.)")


def other_spelling(name: str) -> str:
    """Return a name of the vision tower with `mlp.` in place of `ffn.`; others unchanged."""
    return name.replace(".ffn.", ".mlp.") if name.startswith(TOWER) else name


def _by_pattern() -> dict[str, Row]:
    """Map each tensor's name, with N for every number in it, to its row."""
    patterns = {row.name: row for row in (*ENDS, *IMAGE_ENDS)}
    for row in BLOCKS:
        name = row.name.replace(".E.", ".N.")
        patterns |= {f"layers.N.{name}": row, f"mtp.N.{name}": row}
    for row in TOWER_BLOCKS:
        name = f"{TOWER}N.{row.name}"
        patterns |= {name: row, other_spelling(name): row}
    return patterns | {f"mtp.N.{row.name}": row for row in DRAFTERS}


_ROWS = _by_pattern()


def row_of(name: str) -> Row | None:
    """Return the row of a tensor by its storage name; None for a name that the table lacks.

    >>> row_of("mtp.0.ffn.experts.7.w2.weight").stored, row_of("layers.0.attn.unheard_of.weight")
    ('FP4', None)
    """
    return _ROWS.get(_INDEX.sub("N", name))


def rows_in(block: Block) -> Iterator[Row]:
    """Yield the rows of the tensors that a block has."""
    if block.prefix.startswith(TOWER):
        rows = TOWER_BLOCKS
    else:
        rows = (*BLOCKS, *DRAFTERS) if block.prefix else (*ENDS, *IMAGE_ENDS)
    return (row for row in rows if row.present(block))


def compress_ratio(config: Mapping[str, Any], layer: int) -> int:
    """Return a layer's compress ratio, by its number; MTP's follow those of the main layers."""
    ratios = config.get("compress_ratios")
    ratio = ratios[layer] if isinstance(ratios, list) and layer < len(ratios) else 0
    return ratio if isinstance(ratio, int) else 0
