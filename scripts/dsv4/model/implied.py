"""Which tensors a config.json calls for, by the official inference code's and transformers' model.

A source that lacks one of them looks whole by its index and headers, converts without a word, and
only a loader notices, hours later: it leaves the parameter at its start value or stops.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dsv4.model.opening import count, expert_bases
from dsv4.stop import Stop
from dsv4.storage.bounds import COLUMNS
from dsv4.storage.checkpoint import Checkpoint

TOP = ("embed.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")
BLOCK = (
    "attn_norm.weight", "ffn_norm.weight",
    *(f"hc_{part}_{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")),
    "attn.wq_a.weight", "attn.q_norm.weight", "attn.wq_b.weight", "attn.wkv.weight",
    "attn.kv_norm.weight", "attn.wo_a.weight", "attn.wo_b.weight", "attn.attn_sink",
    "ffn.gate.weight", *(f"ffn.shared_experts.w{n}.weight" for n in (1, 2, 3)),
)  # fmt: skip
COMPRESSOR = ("wkv.weight", "wgate.weight", "ape", "norm.weight")
INDEXER = ("wq_b.weight", "weights_proj.weight", *(f"compressor.{part}" for part in COMPRESSOR))
# Of an MTP layer of the first release; -0731's have a main_proj, and heads that vary.
MTP = ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight",
       "hc_head_fn", "hc_head_base", "hc_head_scale")  # fmt: skip


def implied(source: Checkpoint) -> Iterator[str]:
    """The weights that config.json calls for, without their scales.

    Raises Stop when a count in config.json is missing or no whole number.
    """
    config, folder = source.config, source.folder
    layers = count(config, "num_hidden_layers", folder)
    hashed = count(config, "num_hash_layers", folder) if "num_hash_layers" in config else 0
    yield from TOP
    if config.get("tie_word_embeddings") is not True:
        yield "head.weight"
    for layer in range(layers):
        yield from (f"layers.{layer}.{name}" for name in block(config, layer))
        yield f"layers.{layer}.ffn.gate.{'tid2eid' if layer < hashed else 'bias'}"
    for base in expert_bases(source):
        yield f"{base}.weight"
    for layer in mtp_layers(source.tensors):
        if f"mtp.{layer}.main_proj.weight" not in source.tensors:
            yield from (f"mtp.{layer}.{name}" for name in (*block(config, layers + layer), *MTP))
            yield f"mtp.{layer}.ffn.gate.bias"


def block(config: dict[str, Any], layer: int) -> Iterator[str]:
    """A layer's tensors but its experts; which attention it has is told by compress_ratios."""
    yield from BLOCK
    ratios = config.get("compress_ratios")
    ratio = ratios[layer] if isinstance(ratios, list) and layer < len(ratios) else 0
    if ratio:
        yield from (f"attn.compressor.{part}" for part in COMPRESSOR)
    if ratio == 4:
        yield from (f"attn.indexer.{part}" for part in INDEXER)


def mtp_layers(names: Iterable[str]) -> list[int]:
    """The numbers of the MTP layers that any tensor belongs to."""
    return sorted({int(n.split(".")[1]) for n in names if n.startswith("mtp.")})


def check_whole(source: Checkpoint) -> None:
    """Raise Stop when the source lacks a tensor that its config.json calls for."""
    wanted = list(implied(source))
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise Stop(
            f"{source.folder}", f"no {missing[0]} ({len(missing):,} of {len(wanted):,} missing)",
            "every tensor that config.json calls for",
            "fetch the source again, or restore config.json",
        )  # fmt: skip


# The input width of each matrix of a block, in words of config.json.
INPUT = (
    ("attn.wq_b", "q_lora_rank"), ("attn.indexer.wq_b", "q_lora_rank"),
    (".w2", "moe_intermediate_size"),
)  # fmt: skip


def columns_of(base: str, config: dict[str, Any]) -> int:
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
    if any(part in base for part in ("main_proj", "markov_head", "confidence_head")):
        return 0
    return number(next((key for end, key in INPUT if base.endswith(end)), "hidden_size"))
