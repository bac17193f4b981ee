"""Which tensors a config.json calls for, by the official inference code's and transformers' model.

A source that lacks one of them looks whole by its index and headers, converts without a word, and
only a loader notices, hours later: it leaves the parameter at its start value or stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv4.errors import UserError
from dsv4.model.load import block_counts, config_count, expert_bases, mtp_declared
from dsv4.model.names import mtp_layer
from dsv4.storage.checkpoint import Checkpoint

HEAD = ("norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale")
TOP = ("embed.weight", *HEAD)
BLOCK = (
    "attn_norm.weight", "ffn_norm.weight",
    *(f"hc_{part}_{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")),
    "attn.wq_a.weight", "attn.q_norm.weight", "attn.wq_b.weight", "attn.wkv.weight",
    "attn.kv_norm.weight", "attn.wo_a.weight", "attn.wo_b.weight", "attn.attn_sink",
    "ffn.gate.weight", *(f"ffn.shared_experts.w{n}.weight" for n in (1, 2, 3)),
)  # fmt: skip
COMPRESSOR = ("wkv.weight", "wgate.weight", "ape", "norm.weight")
INDEXER = ("wq_b.weight", "weights_proj.weight", *(f"compressor.{part}" for part in COMPRESSOR))
# What an MTP layer has beside a block's: each of the first release; DSpark's first stage, and its
# last. Tensors, not config.json, say how many there are and whose.
MTP = ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", *HEAD)
DSPARK_FIRST = ("main_proj.weight", "main_norm.weight")
DSPARK_LAST = (*HEAD, "markov_head.markov_w1.weight", "markov_head.markov_w2.weight",
               "confidence_head.proj.weight")  # fmt: skip


def implied(source: Checkpoint) -> Iterator[str]:
    """The weights that config.json calls for, without their scales.

    Raises UserError when a count in config.json is missing or no whole number.
    """
    config, folder = source.config, source.folder
    layers = config_count(config, "num_hidden_layers", folder)
    hashed = config_count(config, "num_hash_layers", folder) if "num_hash_layers" in config else 0
    yield from TOP
    if config.get("tie_word_embeddings") is not True:
        yield "head.weight"
    for layer in range(layers):
        yield from (f"layers.{layer}.{name}" for name in block(config, layer))
        yield f"layers.{layer}.ffn.gate.{'tid2eid' if layer < hashed else 'bias'}"
    for base in expert_bases(source):
        yield f"{base}.weight"
    stages, is_dspark = block_counts(source)["mtp"], has_dspark(source)
    for stage in range(stages):
        own = of_dspark(stage, stages) if is_dspark else MTP
        names = (*block(config, layers + stage), "ffn.gate.bias", *own)
        yield from (f"mtp.{stage}.{name}" for name in names)


def of_dspark(stage: int, stages: int) -> tuple[str, ...]:
    """What one of DSpark's stages has beside a block's tensors."""
    return DSPARK_FIRST * (stage == 0) + DSPARK_LAST * (stage == stages - 1)


def has_dspark(source: Checkpoint) -> bool:
    """True for DSpark under mtp: by a tensor that is its alone, else by config.json where none is
    of the first release's MTP alone.
    """
    stored = {n.split(".", 2)[-1] for n in source.tensors if mtp_layer(n) is not None}
    dspark = {*DSPARK_FIRST, *DSPARK_LAST}
    if not stored & (dspark ^ set(MTP)):
        return any(key.startswith("dspark_") for key in source.config)
    return bool(stored & (dspark - set(MTP)))


def block(config: dict[str, Any], layer: int) -> Iterator[str]:
    """A layer's tensors but its experts; which attention it has is told by compress_ratios."""
    yield from BLOCK
    ratios = config.get("compress_ratios")
    ratio = ratios[layer] if isinstance(ratios, list) and layer < len(ratios) else 0
    if ratio:
        yield from (f"attn.compressor.{part}" for part in COMPRESSOR)
    if ratio == 4:
        yield from (f"attn.indexer.{part}" for part in INDEXER)


def check_whole(source: Checkpoint) -> None:
    """Raise UserError when the source lacks a tensor that its config.json calls for."""
    wanted = list(implied(source))
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise UserError(
            f"{source.folder}", f"no {missing[0]} ({len(missing):,} of {len(wanted):,} missing)",
            "every tensor that config.json calls for",
            "fetch the source again, or restore config.json",
        )  # fmt: skip


def lacking_mtp(source: Checkpoint) -> str:
    """Words for a source with fewer MTP layers than config.json declares, which is legal, or ""."""
    declared, stored = mtp_declared(source.config, source.folder), block_counts(source)["mtp"]
    if stored >= declared:
        return ""
    return f"MTP layers: {declared} declared in config.json, {stored or 'none'} there"
