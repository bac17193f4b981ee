"""Make the tensors of a DeepSeek-V4 source of any size: random values, or headers only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import locations  # noqa: F401
import numpy as np

from dsv4.model.fp8_blocks import RELEASED as BLOCK
from dsv4.model.names import GROUP
from dsv4.model.tensor_table import TOWER, Block, Row, rows_in
from dsv4.quantization.fp8 import E4M3
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
    # For DSpark in place of MTP, see `with_dspark`; a rank of 0: the first release's MTP.
    dspark_markov_rank: int = 0
    dspark_block_size: int = 5
    dspark_noise_token_id: int = 5
    dspark_target_layer_ids: tuple[int, ...] = ()
    # For a vision tower, see `with_vision`; without layers: none.
    vision_n_layers: int = 0
    vision_dim: int = 64
    vision_n_heads: int = 2
    vision_inter_dim: int = 96
    vision_patch_size: int = 14
    vision_rope_theta: float = 10000.0
    vision_downsample_ratio: int = 3
    vision_max_n_token: int = 384
    vision_min_pixels: int = 147456
    vision_max_wh_ratio: int = 8

    @property
    def mtp_layers(self) -> int:
        """Return the number of layers under mtp, which config.json may declare otherwise."""
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
    """Return the same model with DSpark, as -0731 has it.

    declared: num_nextn_predict_layers, 1 or 3.
    """
    layers = sizes.num_hidden_layers
    ratios = (*sizes.compress_ratios[:layers], *(0,) * DSPARK_STAGES)
    targets = tuple(range(max(0, layers - 3), layers))
    return replace(
        sizes, num_nextn_predict_layers=declared, compress_ratios=ratios, dspark_markov_rank=rank,
        dspark_target_layer_ids=targets,
    )  # fmt: skip


def with_vision(sizes: Sizes, layers: int = 2) -> Sizes:
    """Return the same model with a small vision tower, as Vision-Exp has it."""
    return replace(sizes, vision_n_layers=layers)


Array = tuple[str, np.ndarray]  # a safetensors dtype and the array that holds its bytes


class Writer:
    """Random tensors of one seed, a method for each storage format."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def f32(self, *shape: int, std: float = 1.0) -> Array:
        return "F32", (self.random.standard_normal(shape) * std).astype(np.float32)

    def bf16(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Array:
        values = (mean + self.random.standard_normal(shape) * std).astype(np.float32)
        return "BF16", (values.view(np.uint32) >> 16).astype(np.uint16)

    def ids(self, rows: int, number: int, top: int) -> Array:
        """Draw `top` different ones of `number` experts for each row."""
        ids = self.random.permuted(np.tile(np.arange(number), (rows, 1)), axis=1)
        return "I64", ids[:, :top].astype(np.int64)

    def fp8(self, name: str, out: int, columns: int) -> Iterator[tuple[str, Array]]:
        """Yield Gaussian weights with std 1/√in: codes (out, in), one scale for 128 × 128."""
        order = np.argsort(np.where(np.isnan(E4M3), np.inf, E4M3), kind="stable")[:254]
        values = np.clip(self.random.standard_normal((out, columns)) * 64, -448, 448)
        nearest = np.searchsorted((E4M3[order][1:] + E4M3[order][:-1]) / 2, values)
        exponent = 127 - 6 - round(np.log2(columns) / 2)
        shape = (-(-out // BLOCK), -(-columns // BLOCK))
        yield f"{name}.weight", ("F8_E4M3", order[nearest].astype(np.uint8))
        yield f"{name}.scale", ("F8_E8M0", np.full(shape, exponent, np.uint8))

    def fp4(self, name: str, out: int, columns: int) -> Iterator[tuple[str, Array]]:
        """Yield random codes (out, in/2), and scale bytes (out, in/32) over four binades."""
        codes = self.random.integers(0, 256, (out, columns // 2), dtype=np.uint8)
        centre = 127 - 2 - round(np.log2(columns) / 2)
        scales = self.random.integers(centre - 2, centre + 2, (out, columns // GROUP))
        yield f"{name}.weight", ("I8", codes.view(np.int8))
        yield f"{name}.scale", ("F8_E8M0", scales.astype(np.uint8))


class Shapes(Writer):
    """The same tensors as zeros that take no memory."""

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
    """Return zeros that are one element in memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def headers(sizes: Sizes) -> dict[str, Tensor]:
    """Return the tensors of such a checkpoint by storage name, without its files."""
    return {
        name: Tensor(name, dtype, array.shape, Path("model.safetensors"), 0, array.nbytes)
        for name, (dtype, array) in tensors(sizes, Shapes())
    }


def tensors(sizes: Sizes, writer: Writer) -> Iterator[tuple[str, Array]]:
    """Yield every tensor of the checkpoint by storage name, block after block."""
    drafter = "dspark" if sizes.dspark_markov_rank else "mtp"
    vision = sizes.vision_n_layers > 0
    embedding, *head = rows_in(Block("", vision=vision))
    yield from arrays(writer, sizes, Block(""), [embedding])
    for layer in range(sizes.num_hidden_layers):
        hashed = layer < sizes.num_hash_layers
        block = Block(f"layers.{layer}.", sizes.compress_ratios[layer], hashed, vision=vision)
        yield from arrays(writer, sizes, block, rows_in(block))
    yield from arrays(writer, sizes, Block(""), head)
    for stage in range(sizes.mtp_layers):
        last = stage == sizes.mtp_layers - 1
        block = Block(f"mtp.{stage}.", drafter=drafter, first=stage == 0, last=last, vision=vision)
        yield from arrays(writer, sizes, block, rows_in(block))
    for number in range(sizes.vision_n_layers):
        block = Block(f"{TOWER}{number}.", vision=True)
        yield from arrays(writer, sizes, block, rows_in(block))


def arrays(
    writer: Writer, sizes: Sizes, block: Block, rows: Iterable[Row]
) -> Iterator[tuple[str, Array]]:
    """Yield some of a block's tensors; the routed experts one after another."""
    for is_expert, group in itertools.groupby(rows, lambda row: row.stored == "FP4"):
        same = list(group)
        for number in range(sizes.n_routed_experts if is_expert else 1):
            for row in same:
                name = block.prefix + row.name.replace(".E.", f".{number}.")
                yield from array(writer, sizes, block, row, name)


def array(
    writer: Writer, sizes: Sizes, block: Block, row: Row, name: str
) -> Iterator[tuple[str, Array]]:
    """Yield one tensor, with its scale where it has one."""
    shape, base = row.shape(vars(sizes), block), name.removesuffix(".weight")
    if row.stored in ("FP4", "FP8"):
        yield from (writer.fp4 if row.stored == "FP4" else writer.fp8)(base, *shape)
    elif row.stored == "INT":
        yield name, writer.ids(shape[0], sizes.n_routed_experts, shape[1])
    elif row.stored == "F32":
        std = 0.02 if name.endswith("_fn") else 1.0 if name.endswith("attn_sink") else 0.1
        yield name, writer.f32(*shape, std=std)
    elif len(shape) == 1:
        yield name, writer.bf16(*shape, std=0.05, mean=1)
    else:
        drafter = "markov_head" in name or "confidence_head" in name
        std = 0.5 if name == "embed.weight" else 0.05 if drafter else sizes.hidden_size**-0.5
        yield name, writer.bf16(*shape, std=std)
