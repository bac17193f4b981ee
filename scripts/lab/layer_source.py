"""A source in the proportions of Flash: routed experts of its shapes and, for each 256 of them,
one layer's other matrices and its share of embedding and head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from race import gaussian_fp4, planned_expert

from dsv4.model.fp8_blocks import RELEASED as BLOCK
from dsv4.model.source_format import MODEL_TYPE
from dsv4.model.tensor_table import Block, rows_in
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import PendingTensor, write_shard

SHARD_BYTES = 400_000_000  # of the sources that are made
# The FP8 matrices of one layer of Flash, for its 256 experts, as (out, in), and its 43rd part of
# embedding and head, both (129280, 4096), in BF16.
LAYER = {
    "attn.wq_a": (1024, 4096), "attn.wq_b": (32768, 1024), "attn.wkv": (512, 4096),
    "attn.wo_a": (8192, 4096), "attn.wo_b": (4096, 8192),
    "attn.indexer.wq_b": (8192, 1024), "ffn.shared_experts.w1": (2048, 4096),
    "ffn.shared_experts.w2": (4096, 2048), "ffn.shared_experts.w3": (2048, 4096),
}  # fmt: skip
COMPRESSOR = {"attn.compressor.wkv": (1024, 4096), "attn.compressor.wgate": (1024, 4096)}
GATE = "layers.0.ffn.gate"
VOCABULARY = 129280 // 43


def source_tensors(experts: int, uniform: bool) -> Iterator[PendingTensor]:
    """One layer with so many experts, its other matrices shrunk to the same share of 256."""
    rng = np.random.default_rng(0)
    share = experts / 256
    for name in ("embed.weight", "head.weight"):
        yield bf16(rng, name, (round(VOCABULARY * share), 4096))
    for name, (out, columns) in LAYER.items():
        yield from fp8(rng, f"layers.0.{name}", (blocks(out * share) * BLOCK, columns))
    for name, (out, columns) in COMPRESSOR.items():
        yield bf16(rng, f"layers.0.{name}.weight", (round(out * share), columns))
    yield bf16(rng, f"{GATE}.weight", (experts, 4096))
    ends, layer = Block(""), Block("layers.0.")
    for name in (block.prefix + row.name for block in (ends, layer) for row in rows_in(block)
                 if row.stored == "F32" or row.name.endswith("norm.weight")):  # fmt: skip
        yield PendingTensor(name, "F32", (4096,), lambda: [np.ones(4096, np.float32)])
    matrices = [gaussian_fp4(rng) for _ in range(2)]
    if uniform:
        matrices = [(rng.integers(0, 256, len(m), np.uint8), scales) for m, scales in matrices]
    for i in range(3 * experts):
        base = f"layers.0.ffn.experts.{i // 3}.w{i % 3 + 1}"
        yield from planned_expert(base, matrices[i % 2], 128 * i, bundle=False)


def blocks(rows: float) -> int:
    return max(1, round(rows / BLOCK))


def bf16(rng: np.random.Generator, name: str, shape: tuple[int, int]) -> PendingTensor:
    values = rng.standard_normal(shape, dtype=np.float32)
    return PendingTensor(
        name, "BF16", shape, lambda: [(values.view(np.uint32) >> 16).astype(np.uint16)]
    )


def fp8(rng: np.random.Generator, base: str, shape: tuple[int, int]) -> Iterator[PendingTensor]:
    """Codes of either sign below 448, and a scale for each block."""
    codes = rng.integers(0, 120, shape, dtype=np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
    scales = rng.integers(112, 118, [-(-n // BLOCK) for n in shape], dtype=np.uint8)
    yield PendingTensor(f"{base}.weight", "F8_E4M3", shape, lambda: [codes])
    yield PendingTensor(f"{base}.scale", "F8_E8M0", scales.shape, lambda: [scales])


def make_source(folder: Path, experts: int, uniform: bool) -> None:
    """Write such a source in shards of about SHARD_BYTES."""
    folder.mkdir(parents=True)
    weight_map, part, number = {}, [], 1
    tensors = list(source_tensors(experts, uniform))
    for i, tensor in enumerate(tensors, 1):
        part.append(tensor)
        if sum(t.nbytes for t in part) < SHARD_BYTES and i < len(tensors):
            continue
        file = f"model-{number:05d}.safetensors"
        write_shard(folder / file, part, {})
        weight_map |= {t.name: file for t in part}
        part, number = [], number + 1
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": MODEL_TYPE, "num_hidden_layers": 1, "n_routed_experts": experts}
    (folder / "config.json").write_text(json.dumps(config))
