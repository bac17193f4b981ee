"""Small random checkpoints for the requantizer's tests, and the result that they must lead to.

`make_source` writes a source, `make_stock` the bundle that upstream's converter would make of it,
`reference` what a requantized bundle holds, computed without the engine: decode a tensor, give it
to `mx.quantize`, round scales and biases to F16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import ml_reference
import numpy as np

from dsv4.model.names import kind
from dsv4.model.tensor_table import Block, rows_in
from dsv4.storage.safetensors_file import NUMPY_DTYPE, PendingTensor, write_shard


@dataclass
class Sizes:
    """How large a source is: hidden and width are multiples of 32, shard sizes in tensors."""

    layers: int = 2
    experts: int = 3
    mtp: int = 1
    hidden: int = 64
    width: int = 32
    source_shard: int = 17
    bundle_shard: int = 23
    head_dim: int = 32
    dspark: bool = False  # its stages under mtp, in place of the first release's MTP

    def config(self) -> dict:
        """config.json: every layer of compress ratio 0, the first one with a table of experts."""
        dspark = {"dspark_markov_rank": 32, "dspark_target_layer_ids": [0, 0, 0]}
        return {
            "model_type": "deepseek_v4", "num_hidden_layers": self.layers,
            "n_routed_experts": self.experts, "num_nextn_predict_layers": self.mtp,
            "hidden_size": self.hidden, "moe_intermediate_size": self.width, "vocab_size": 48,
            "num_attention_heads": 2, "head_dim": self.head_dim, "q_lora_rank": self.width,
            "o_lora_rank": self.head_dim, "o_groups": 2, "num_experts_per_tok": 2, "hc_mult": 2,
            "num_hash_layers": 1, "compress_ratios": [0] * (self.layers + self.mtp),
        } | (dspark if self.dspark else {})  # fmt: skip

    def blocks(self) -> list[Block]:
        """The model's ends, its layers, and MTP's layers or DSpark's stages."""
        drafter, last = "dspark" if self.dspark else "mtp", self.mtp - 1
        return [
            Block(""),
            *(Block(f"layers.{n}.", hashed=n == 0) for n in range(self.layers)),
            *(Block(f"mtp.{n}.", 0, False, drafter, n == 0, n == last) for n in range(self.mtp)),
        ]


Arrays = dict[str, tuple[str, np.ndarray]]  # name → (dtype, array of NUMPY_DTYPE)


def random_fp4(rng: np.random.Generator, out: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 (out, columns/2) and exponents uint8 (out, columns/32), like real weights'."""
    packed = rng.integers(0, 256, (out, columns // 2)).astype(np.uint8)
    calm = rng.random(out) < 0.5  # rows with small codes: pairs (least, greatest) of every kind
    masks = np.array([0x11, 0x33, 0x77, 0x99, 0xBB, 0xFF, 0x00], np.uint8)
    packed[calm] &= rng.choice(masks, (int(calm.sum()), 1))
    return packed.view(np.int8), rng.integers(100, 130, (out, columns // 32)).astype(np.uint8)


def blocks_of(out: int, columns: int) -> np.ndarray:
    """Scale bytes for FP8: one for each 128 × 128 block, begun or whole."""
    return np.full((-(-out // 128), -(-columns // 128)), 120, np.uint8)


def source_arrays(sizes: Sizes, rng: np.random.Generator) -> Arrays:
    """All tensors that a source of these sizes has."""
    arrays: Arrays = {}
    for block in sizes.blocks():
        for row in rows_in(block):
            shape = row.shape(sizes.config(), block)
            for expert in range(sizes.experts) if ".E." in row.name else (0,):
                name = block.prefix + row.name.replace(".E.", f".{expert}.")
                arrays |= tensor_arrays(name, row.stored, shape, sizes.experts, rng)
    return arrays


def tensor_arrays(
    name: str, stored: str, shape: tuple[int, ...], experts: int, rng: np.random.Generator
) -> Arrays:
    """One tensor with random values, and its scale where it has one."""
    scale = name.removesuffix("weight") + "scale"
    if stored == "FP4":
        packed, exponents = random_fp4(rng, *shape)
        return {name: ("I8", packed), scale: ("F8_E8M0", exponents)}
    if stored == "FP8":
        codes = rng.integers(0, 120, shape).astype(np.uint8)
        return {name: ("F8_E4M3", codes), scale: ("F8_E8M0", blocks_of(*shape))}
    if stored == "INT":
        return {name: ("I64", rng.integers(0, experts, shape))}
    if stored == "F32":
        return {name: ("F32", rng.standard_normal(shape).astype(np.float32))}
    return {name: ("BF16", rng.integers(0x3C00, 0x3F80, shape).astype(np.uint16))}


def stock_arrays(source: Arrays, rng: np.random.Generator) -> Arrays:
    """What `convert_dsv4_jangtq --profile 4 --format jang` makes of a source, in its form."""
    stock: Arrays = {}
    for name, (dtype, array) in source.items():
        base = name.removesuffix(".weight")
        if name.endswith(".scale"):
            continue
        if ".ffn.experts." in name:
            stock[name] = ("U32", np.ascontiguousarray(array).view(np.uint32))
            stock[f"{base}.scales"] = ("U8", source[f"{base}.scale"][1])
        elif name == "head.weight":
            stock[name] = (dtype, array)  # as requantize leaves it
        elif dtype == "F32":
            stock[name] = ("F16", array.astype(np.float16))
        elif array.ndim == 2 and kind(name) == "matrix":
            out, columns = array.shape
            stock[name] = ("U32", rng.integers(0, 1 << 32, (out, columns // 4)).astype(np.uint32))
            for part in ("scales", "biases"):
                values = rng.standard_normal((out, columns // 32)).astype(np.float16)
                stock[f"{base}.{part}"] = ("F16", values)
        else:
            stock[name] = ("F16", rng.standard_normal(array.shape).astype(np.float16))
    return stock


def reference(source: Arrays, stock: Arrays) -> Arrays:
    """Every tensor of the requantized bundle, by the straightforward way."""
    result = {name: tensor for name, tensor in stock.items() if not name.startswith("head.")}
    result["head.weight"] = source["head.weight"]
    for name, (dtype, array) in source.items():
        base = name.removesuffix(".weight")
        if ".ffn.experts." in name and name.endswith(".weight"):
            exponents = source[f"{base}.scale"][1]
            weight, scales, biases = ml_reference.quantize(array, exponents)
            result[name] = ("U32", weight)
            result[f"{base}.scales"] = ("F16", scales)
            result[f"{base}.biases"] = ("F16", biases)
        elif dtype == "F32" and ("hc_" in name or "attn_sink" in name or "gate.bias" in name):
            result[name] = (dtype, array)
    return result


def save(folder: Path, arrays: Arrays, per_shard: int, config: dict) -> None:
    """Write the arrays as shards of `per_shard` tensors, with index and config."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(arrays)
    weight_map = {}
    count = -(-len(names) // per_shard)
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        mine = names[i * per_shard : (i + 1) * per_shard]
        planned = [
            PendingTensor(name, dtype, array.shape, lambda a=array: [np.ascontiguousarray(a)])
            for name in mine
            for dtype, array in [arrays[name]]
        ]
        planned.sort(key=lambda p: -np.dtype(NUMPY_DTYPE[p.dtype]).itemsize)
        write_shard(folder / file, planned, {})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def make(tmp: Path, sizes: Sizes, seed: int) -> tuple[Path, Path, Arrays]:
    """A source and its stock bundle under `tmp`; returns (source, bundle, expected tensors)."""
    rng = np.random.default_rng(seed)
    arrays = source_arrays(sizes, rng)
    stock = stock_arrays(arrays, rng)
    config = sizes.config()
    save(tmp / "source", arrays, sizes.source_shard, config)
    save(
        tmp / "bundle", stock, sizes.bundle_shard,
        config | {"quantization_config": {"bits": 8}, "eos_token_id": 1},
    )  # fmt: skip
    return tmp / "source", tmp / "bundle", reference(arrays, stock)
