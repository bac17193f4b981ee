"""Write a small random-weight checkpoint in DeepSeek-V4's exact source layout.

Tests need a source of any size that has every kind of tensor: hash-routed and routed layers,
attention with compress ratios 0, 4 and 128 (compressor, indexer), shared experts, MTP; in FP4, FP8,
BF16, F32 and integers; over several shards that split weights from their scales.
Its tokenizer and encoding are those of the nano checkpoint. The words that it says are noise.

    .venv/bin/python scripts/lab/make_source.py --source build/random --seed 1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rooms import NANO

from dsv4.model.names import GROUP
from dsv4.stop import Stop, run
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.durable import copy_file, write_json
from dsv4.storage.shard import Planned, write_shard
from dsv4.weights.fp8 import BLOCK, E4M3


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model; names as in config.json. FP8 matrices must be multiples of 128."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    head_dim: int = 128
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 128
    o_lora_rank: int = 64
    o_groups: int = 2
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    num_hash_layers: int = 1
    num_nextn_predict_layers: int = 1
    vocab_size: int = 512
    hc_mult: int = 4
    index_n_heads: int = 4
    index_head_dim: int = 128
    index_topk: int = 8
    compress_ratios: tuple[int, ...] = (0, 4, 128, 4, 0)


WORDS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "encoding/encoding_dsv4.py",
)

Array = tuple[str, np.ndarray]  # a safetensors dtype and the array that holds its bytes


def config_of(sizes: Sizes) -> dict:
    """config.json as DeepSeek-V4's source has it, for these sizes."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(sizes).items()},
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_sinkhorn_iters": 20,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [BLOCK, BLOCK],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 4,
            "original_max_position_embeddings": 1024,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
    }


class Writer:
    """Random tensors of one seed, by the kinds that the source knows."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def f32(self, *shape: int, std: float = 1.0) -> Array:
        return "F32", (self.random.standard_normal(shape) * std).astype(np.float32)

    def bf16(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Array:
        values = (mean + self.random.standard_normal(shape) * std).astype(np.float32)
        return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)

    def fp8(self, name: str, out: int, columns: int) -> Iterator[tuple[str, Array]]:
        """Gaussian weights with std 1/√in: codes (out, in) and one scale for 128 × 128."""
        order = np.argsort(np.where(np.isnan(E4M3), np.inf, E4M3), kind="stable")[:254]
        values = np.clip(self.random.standard_normal((out, columns)) * 64, -448, 448)
        nearest = np.searchsorted((E4M3[order][1:] + E4M3[order][:-1]) / 2, values)
        exponent = 127 - 6 - round(np.log2(columns) / 2)
        shape = (-(-out // BLOCK), -(-columns // BLOCK))
        yield f"{name}.weight", ("F8_E4M3", order[nearest].astype(np.uint8))
        yield f"{name}.scale", ("F8_E8M0", np.full(shape, exponent, np.uint8))

    def fp4(self, name: str, out: int, columns: int) -> Iterator[tuple[str, Array]]:
        """Random codes (out, in/2) and scale bytes (out, in/32) that spread over four binades."""
        codes = self.random.integers(0, 256, (out, columns // 2), dtype=np.uint8)
        centre = 127 - 2 - round(np.log2(columns) / 2)
        scales = self.random.integers(centre - 2, centre + 2, (out, columns // GROUP))
        yield f"{name}.weight", ("I8", codes.view(np.int8))
        yield f"{name}.scale", ("F8_E8M0", scales.astype(np.uint8))


def tensors(sizes: Sizes, seed: int) -> Iterator[tuple[str, Array]]:
    """Every tensor of the checkpoint by storage name, block after block."""
    writer = Writer(seed)
    hidden = sizes.hidden_size
    yield "embed.weight", writer.bf16(sizes.vocab_size, hidden, std=0.5)
    for layer in range(sizes.num_hidden_layers):
        ratio = sizes.compress_ratios[layer]
        yield from block(writer, sizes, f"layers.{layer}", ratio, layer < sizes.num_hash_layers)
    yield "norm.weight", writer.bf16(hidden, std=0.05, mean=1)
    yield "head.weight", writer.bf16(sizes.vocab_size, hidden, std=hidden**-0.5)
    yield from hyper_head(writer, sizes, "")
    for layer in range(sizes.num_nextn_predict_layers):
        yield from block(writer, sizes, f"mtp.{layer}", 0, hashed=False)
        for name in ("e_proj", "h_proj"):
            yield from writer.fp8(f"mtp.{layer}.{name}", hidden, hidden)
        for name in ("enorm", "hnorm", "norm"):
            yield f"mtp.{layer}.{name}.weight", writer.bf16(hidden, std=0.05, mean=1)
        yield from hyper_head(writer, sizes, f"mtp.{layer}.")


def hyper_head(writer: Writer, sizes: Sizes, prefix: str) -> Iterator[tuple[str, Array]]:
    """The mHC head of the model or of an MTP layer, F32."""
    mult = sizes.hc_mult
    yield f"{prefix}hc_head_fn", writer.f32(mult, mult * sizes.hidden_size, std=0.02)
    yield f"{prefix}hc_head_base", writer.f32(mult, std=0.1)
    yield f"{prefix}hc_head_scale", writer.f32(1, std=0.1)


def block(
    writer: Writer, sizes: Sizes, name: str, ratio: int, hashed: bool
) -> Iterator[tuple[str, Array]]:
    """One decoder layer, `layers.N` or `mtp.M`."""
    mult, hidden = sizes.hc_mult, sizes.hidden_size
    for part in ("attn", "ffn"):
        yield f"{name}.{part}_norm.weight", writer.bf16(hidden, std=0.05, mean=1)
        yield f"{name}.hc_{part}_fn", writer.f32((2 + mult) * mult, mult * hidden, std=0.02)
        yield f"{name}.hc_{part}_base", writer.f32((2 + mult) * mult, std=0.1)
        yield f"{name}.hc_{part}_scale", writer.f32(3, std=0.1)
    yield from attention(writer, sizes, f"{name}.attn", ratio)
    yield from experts(writer, sizes, f"{name}.ffn", hashed)


def attention(writer: Writer, sizes: Sizes, name: str, ratio: int) -> Iterator[tuple[str, Array]]:
    """Low-rank attention; with a compressor when `ratio` > 0 and an indexer when it is 4."""
    heads = sizes.num_attention_heads * sizes.head_dim
    yield from writer.fp8(f"{name}.wq_a", sizes.q_lora_rank, sizes.hidden_size)
    yield from writer.fp8(f"{name}.wq_b", heads, sizes.q_lora_rank)
    yield from writer.fp8(f"{name}.wkv", sizes.head_dim, sizes.hidden_size)
    lora = sizes.o_groups * sizes.o_lora_rank
    yield from writer.fp8(f"{name}.wo_a", lora, heads // sizes.o_groups)
    yield from writer.fp8(f"{name}.wo_b", sizes.hidden_size, lora)
    yield f"{name}.q_norm.weight", writer.bf16(sizes.q_lora_rank, std=0.05, mean=1)
    yield f"{name}.kv_norm.weight", writer.bf16(sizes.head_dim, std=0.05, mean=1)
    yield f"{name}.attn_sink", writer.f32(sizes.num_attention_heads)
    if ratio:
        yield from compressor(writer, sizes, f"{name}.compressor", ratio, sizes.head_dim)
    if ratio == 4:
        rows = sizes.index_n_heads * sizes.index_head_dim
        yield from writer.fp8(f"{name}.indexer.wq_b", rows, sizes.q_lora_rank)
        std = sizes.hidden_size**-0.5
        shape = (sizes.index_n_heads, sizes.hidden_size)
        yield f"{name}.indexer.weights_proj.weight", writer.bf16(*shape, std=std)
        head = sizes.index_head_dim
        yield from compressor(writer, sizes, f"{name}.indexer.compressor", ratio, head)


def compressor(
    writer: Writer, sizes: Sizes, name: str, ratio: int, head_dim: int
) -> Iterator[tuple[str, Array]]:
    """Pools `ratio` tokens into one key; overlapping windows, so twice the width, at ratio 4."""
    width = head_dim * (2 if ratio == 4 else 1)
    for matrix in ("wkv", "wgate"):
        shape = (width, sizes.hidden_size)
        yield f"{name}.{matrix}.weight", writer.bf16(*shape, std=sizes.hidden_size**-0.5)
    yield f"{name}.ape", writer.f32(ratio, width, std=0.1)
    yield f"{name}.norm.weight", writer.bf16(head_dim, std=0.05, mean=1)


def experts(writer: Writer, sizes: Sizes, name: str, hashed: bool) -> Iterator[tuple[str, Array]]:
    """Router, shared expert (FP8) and routed experts (FP4)."""
    hidden, width = sizes.hidden_size, sizes.moe_intermediate_size
    number, top = sizes.n_routed_experts, sizes.num_experts_per_tok
    yield f"{name}.gate.weight", writer.bf16(number, hidden, std=hidden**-0.5)
    if hashed:
        ids = writer.random.permuted(np.tile(np.arange(number), (sizes.vocab_size, 1)), axis=1)
        yield f"{name}.gate.tid2eid", ("I64", ids[:, :top].astype(np.int64))
    else:
        yield f"{name}.gate.bias", writer.f32(number, std=0.1)
    shapes = {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}
    for matrix, shape in shapes.items():
        yield from writer.fp8(f"{name}.shared_experts.{matrix}", *shape)
    for expert in range(number):
        for matrix, shape in shapes.items():
            yield from writer.fp4(f"{name}.experts.{expert}.{matrix}", *shape)


def write_source(folder: Path, sizes: Sizes, seed: int, shards: int) -> int:
    """Write the checkpoint as `shards` shards of equal tensor counts; return the tensor count.

    The cut falls where it falls, so that a weight and its scale may part.
    """
    named = list(tensors(sizes, seed))
    bounds = np.linspace(0, len(named), shards + 1).astype(int)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = named[bounds[number] : bounds[number + 1]]
        planned = [
            Planned(name, dtype, array.shape, lambda a=array: [np.ascontiguousarray(a).data])
            for name, (dtype, array) in part
        ]
        write_shard(folder / file, planned, {"format": "pt"})
        weight_map.update({name: file for name, _ in part})
    size = sum(array.nbytes for _, (_, array) in named)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", config_of(sizes))
    copy_words(folder)
    return len(named)


def copy_words(folder: Path) -> None:
    """The nano checkpoint's tokenizer and encoding, whose vocabulary these sources share."""
    (folder / "encoding").mkdir(exist_ok=True)
    for name in WORDS:
        copy_file(NANO / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder to write; must be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON: fields of Sizes")
    args = parser.parse_args()
    if args.source.exists() and any(args.source.iterdir()):
        raise Stop(f"{args.source}", "a folder with files", "an empty folder", "choose another")
    args.source.mkdir(parents=True, exist_ok=True)
    sizes = replace(Sizes(), **args.sizes)
    number = write_source(args.source, sizes, args.seed, args.shards)
    print(f"{args.source}: {number} tensors in {args.shards} shards, seed {args.seed}",
          file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
