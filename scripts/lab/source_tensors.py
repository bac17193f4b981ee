"""Every tensor of a DeepSeek-V4 source, of any size: with random numbers, or as headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rooms  # noqa: F401

from dsv4.model.names import GROUP
from dsv4.quantization.fp8 import BLOCK, E4M3
from dsv4.storage.safetensors_file import Tensor


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
    # Of releases with DSpark in place of MTP (`with_dspark`); a rank of 0: the first release's MTP.
    dspark_markov_rank: int = 0
    dspark_block_size: int = 5
    dspark_noise_token_id: int = 5
    dspark_target_layer_ids: tuple[int, ...] = ()

    @property
    def mtp_layers(self) -> int:
        """How many layers lie under mtp, whatever config.json declares."""
        return DSPARK_STAGES if self.dspark_markov_rank else self.num_nextn_predict_layers


DSPARK_STAGES = 3


# DeepSeek-V4-Flash's, as jang's and transformers' model have them.
FLASH = Sizes(
    hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
    q_lora_rank=1024, o_lora_rank=1024, o_groups=8, n_routed_experts=256, num_experts_per_tok=6,
    moe_intermediate_size=2048, num_hash_layers=3, vocab_size=129280, index_n_heads=64,
    index_topk=512, compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
)  # fmt: skip


def with_dspark(sizes: Sizes, rank: int = 32, declared: int = 1) -> Sizes:
    """The same model with DSpark, as -0731 has it; declared: num_nextn_predict_layers, 1 or 3."""
    layers = sizes.num_hidden_layers
    ratios = (*sizes.compress_ratios[:layers], *(0,) * DSPARK_STAGES)
    targets = tuple(range(max(0, layers - 3), layers))
    return replace(
        sizes, num_nextn_predict_layers=declared, compress_ratios=ratios, dspark_markov_rank=rank,
        dspark_target_layer_ids=targets,
    )  # fmt: skip


Array = tuple[str, np.ndarray]  # a safetensors dtype and the array that holds its bytes


class Writer:
    """Random tensors of one seed, by the kinds that the source knows."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def f32(self, *shape: int, std: float = 1.0) -> Array:
        return "F32", (self.random.standard_normal(shape) * std).astype(np.float32)

    def bf16(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Array:
        values = (mean + self.random.standard_normal(shape) * std).astype(np.float32)
        return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)

    def ids(self, rows: int, number: int, top: int) -> Array:
        """`top` different ones of `number` experts in each row."""
        ids = self.random.permuted(np.tile(np.arange(number), (rows, 1)), axis=1)
        return "I64", ids[:, :top].astype(np.int64)

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


class Shapes(Writer):
    """The same tensors without their numbers: of any size, in no memory."""

    def __init__(self) -> None:
        super().__init__(0)

    def f32(self, *shape: int, std: float = 1.0) -> Array:
        return "F32", empty(np.float32, shape)

    def bf16(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Array:
        return "BF16", empty(np.uint16, shape)

    def ids(self, rows: int, number: int, top: int) -> Array:
        return "I64", empty(np.int64, (rows, top))

    def fp8(self, name: str, out: int, columns: int) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", ("F8_E4M3", empty(np.uint8, (out, columns)))
        shape = (-(-out // BLOCK), -(-columns // BLOCK))
        yield f"{name}.scale", ("F8_E8M0", empty(np.uint8, shape))

    def fp4(self, name: str, out: int, columns: int) -> Iterator[tuple[str, Array]]:
        yield f"{name}.weight", ("I8", empty(np.int8, (out, columns // 2)))
        yield f"{name}.scale", ("F8_E8M0", empty(np.uint8, (out, columns // GROUP)))


def empty(dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Zeros that are one element in memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def headers(sizes: Sizes) -> dict[str, Tensor]:
    """What the headers of such a checkpoint say, without one: its tensors by storage name."""
    return {
        name: Tensor(name, dtype, array.shape, Path("model.safetensors"), 0, array.nbytes)
        for name, (dtype, array) in tensors(sizes, Shapes())
    }


def tensors(sizes: Sizes, writer: Writer) -> Iterator[tuple[str, Array]]:
    """Every tensor of the checkpoint by storage name, block after block."""
    hidden = sizes.hidden_size
    yield "embed.weight", writer.bf16(sizes.vocab_size, hidden, std=0.5)
    for layer in range(sizes.num_hidden_layers):
        ratio = sizes.compress_ratios[layer]
        yield from block(writer, sizes, f"layers.{layer}", ratio, layer < sizes.num_hash_layers)
    yield "norm.weight", writer.bf16(hidden, std=0.05, mean=1)
    yield "head.weight", writer.bf16(sizes.vocab_size, hidden, std=hidden**-0.5)
    yield from hyper_head(writer, sizes, "")
    for layer in range(sizes.mtp_layers):
        yield from block(writer, sizes, f"mtp.{layer}", 0, hashed=False)
        own = dspark(writer, sizes, layer) if sizes.dspark_markov_rank else mtp(writer, sizes)
        for name, array in own:
            yield f"mtp.{layer}.{name}", array


def mtp(writer: Writer, sizes: Sizes) -> Iterator[tuple[str, Array]]:
    """What an MTP layer of the first release has beside a block's tensors."""
    hidden = sizes.hidden_size
    for name in ("e_proj", "h_proj"):
        yield from writer.fp8(name, hidden, hidden)
    for name in ("enorm", "hnorm", "norm"):
        yield f"{name}.weight", writer.bf16(hidden, std=0.05, mean=1)
    yield from hyper_head(writer, sizes, "")


def dspark(writer: Writer, sizes: Sizes, stage: int) -> Iterator[tuple[str, Array]]:
    """What one of DSpark's stages has beside a block's tensors: the first and the last alone."""
    hidden, rank = sizes.hidden_size, sizes.dspark_markov_rank
    if stage == 0:
        yield from writer.fp8("main_proj", hidden, hidden * len(sizes.dspark_target_layer_ids))
        yield "main_norm.weight", writer.bf16(hidden, std=0.05, mean=1)
    if stage == DSPARK_STAGES - 1:
        yield "norm.weight", writer.bf16(hidden, std=0.05, mean=1)
        yield from hyper_head(writer, sizes, "")
        for matrix in ("markov_w1", "markov_w2"):
            yield f"markov_head.{matrix}.weight", writer.bf16(sizes.vocab_size, rank, std=0.05)
        yield "confidence_head.proj.weight", writer.bf16(1, hidden + rank, std=0.05)


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
        yield f"{name}.gate.tid2eid", writer.ids(sizes.vocab_size, number, top)
    else:
        yield f"{name}.gate.bias", writer.f32(number, std=0.1)
    shapes = {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}
    for matrix, shape in shapes.items():
        yield from writer.fp8(f"{name}.shared_experts.{matrix}", *shape)
    for expert in range(number):
        for matrix, shape in shapes.items():
            yield from writer.fp4(f"{name}.experts.{expert}.{matrix}", *shape)
