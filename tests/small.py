"""Small random checkpoints for the requantizer's tests, and the result that they must lead to.

`make_source` writes a source, `make_stock` the bundle that upstream's converter would make of it,
`reference` what a requantized bundle holds, computed without the engine: decode a tensor, give it
to `mx.quantize`, round scales and biases to F16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
    metadata: dict = field(default_factory=dict)
    dspark: bool = False  # its stages under mtp, in place of the first release's MTP
    whole: bool = False  # all that config.json calls for, as download and convert want it


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
    """All tensors of a source, every kind that DeepSeek-V4 has, with few values each."""
    hidden, width = sizes.hidden, sizes.width
    blocks = [f"layers.{n}" for n in range(sizes.layers)] + [f"mtp.{n}" for n in range(sizes.mtp)]
    arrays: Arrays = {
        "embed.weight": ("BF16", rng.integers(0x3C00, 0x3F80, (48, hidden)).astype(np.uint16)),
        "norm.weight": ("BF16", rng.integers(0x3C00, 0x3F80, hidden).astype(np.uint16)),
        "hc_head_base": ("F32", rng.standard_normal(5).astype(np.float32)),
    }
    for block in blocks:
        arrays[f"{block}.attn.wq_a.weight"] = (
            "F8_E4M3", rng.integers(0, 120, (width, hidden)).astype(np.uint8),
        )  # fmt: skip
        arrays[f"{block}.attn.wq_a.scale"] = ("F8_E8M0", blocks_of(width, hidden))
        arrays[f"{block}.attn.attn_sink"] = ("F32", rng.standard_normal(3).astype(np.float32))
        arrays[f"{block}.hc_attn_fn"] = ("F32", rng.standard_normal((3, 7)).astype(np.float32))
        arrays[f"{block}.ffn.gate.bias"] = (
            "F32", rng.standard_normal(sizes.experts).astype(np.float32),
        )  # fmt: skip
        arrays[f"{block}.ffn.gate.tid2eid"] = ("I64", rng.integers(0, 3, (11, 2)) % sizes.experts)
        for expert in range(sizes.experts):
            for matrix in ("w1", "w2", "w3"):
                shape = (hidden, width) if matrix == "w2" else (width, hidden)
                packed, exponents = random_fp4(rng, *shape)
                base = f"{block}.ffn.experts.{expert}.{matrix}"
                arrays[f"{base}.weight"] = ("I8", packed)
                arrays[f"{base}.scale"] = ("F8_E8M0", exponents)
    return arrays | the_rest(arrays, sizes, blocks, rng) if sizes.whole else arrays


def the_rest(arrays: Arrays, sizes: Sizes, blocks: list[str], rng: np.random.Generator) -> Arrays:
    """Every other tensor that config.json calls for: a BF16 matrix, vector or F32 control."""
    drafter = "dspark" if sizes.dspark else "mtp"
    described = [Block("")]
    for prefix in blocks:
        kind, _, number = prefix.partition(".")
        first, last = number == "0", int(number) == sizes.mtp - 1
        drafts = drafter if kind == "mtp" else ""
        described.append(Block(f"{prefix}.", 0, False, drafts, first, last))
    rest: Arrays = {}
    for block in described:
        for row in rows_in(block):
            name = block.prefix + row.name
            if name in arrays or row.stored == "FP4":
                continue
            if row.treatment == "control":
                rest[name] = (
                    "F32",
                    rng.standard_normal(1 if name.endswith("hc_head_scale") else 3).astype(
                        np.float32
                    ),
                )
            else:
                shape = 8 if "norm" in name else (4, 32)
                rest[name] = ("BF16", rng.integers(0x3C00, 0x3F80, shape).astype(np.uint16))
    return rest


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
    result = dict(stock)
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
    config = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": sizes.layers,
        "n_routed_experts": sizes.experts,
        "num_nextn_predict_layers": sizes.mtp,
    }
    save(tmp / "source", arrays, sizes.source_shard, config)
    save(
        tmp / "bundle", stock, sizes.bundle_shard,
        config | {"quantization_config": {"bits": 8}, "eos_token_id": 1},
    )  # fmt: skip
    return tmp / "source", tmp / "bundle", reference(arrays, stock)
