"""Write a trained nano as a source checkpoint: the layout of deepseek-ai/DeepSeek-V4-Flash.

routed experts   I8 (out, in/2), two E2M1 codes a byte, the low nibble the even column;
                 `.scale` F8_E8M0 (out, in/32)
other matrices   attention, shared experts, MTP projections: F8_E4M3 (out, in);
                 `.scale` F8_E8M0, one for 128 × 128
BF16             embedding, head, norms, router, the compressor's wkv and wgate
F32              hc_*, attn_sink, gate.bias, compressor.ape
I64              gate.tid2eid

The compressor of a 128-layer and everything under mtp.0 are random: runtimes do not run
them on short prompts, but a bundle must contain them.

Freshly trained matrices have FP4 scales that are nearly all equal, so that a misplaced
scale would not show. So powers of two are moved between matrices where they cancel, which
changes no result:

- from 32 columns of w1, w3, the router and the shared experts into ffn_norm;
- from 32 rows of an expert's w3 into the 32 columns of its w2 that they feed. w3 gets
  smaller only, so that the SwiGLU clamp still has no effect.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nano.architecture import Architecture, source_config
from nano.encoding import FILE as ENCODING
from nano.model import (
    SINK,
    Tensors,
    initial_attention,
    initial_hyper,
    initial_moe,
    normal,
    symmetric_comb,
)
from nano.rounding import E8M0_BIAS, GROUP, fp4_codes, fp8_codes, kind, round_to_storage

SHARDS = 4


def scale_columns(tensors: Tensors, name: str, powers: Tensor) -> None:
    """Multiply groups of 32 columns of a tensor by 2^powers, in place of the old tensor."""
    factors = torch.exp2(powers.float()).repeat_interleave(GROUP, -1)
    tensors[name] = tensors[name] * (factors[:, None] if factors.ndim == 2 else factors)


def spread_exponents(tensors: Tensors, arch: Architecture, seed: int) -> Tensors:
    """Return the tensors with powers of two moved between them; the model stays the same."""
    generator = torch.Generator().manual_seed(seed + 2)
    tensors = dict(tensors)
    groups = arch.hidden // GROUP
    for layer in range(arch.layers):
        ffn = f"layers.{layer}.ffn"
        powers = torch.randperm(groups, generator=generator) - groups // 2  # -2 … 1
        scale_columns(tensors, f"layers.{layer}.ffn_norm.weight", powers)
        for name in ("gate.weight", "shared_experts.w1.weight", "shared_experts.w3.weight"):
            scale_columns(tensors, f"{ffn}.{name}", -powers)
        for name in ("w1", "w3"):
            scale_columns(tensors, f"{ffn}.experts.{name}", -powers)
        shape = (arch.experts, arch.expert_width // GROUP)
        powers = -torch.randint(0, 4, shape, generator=generator)  # 0 … -3
        rows = torch.exp2(powers.float()).repeat_interleave(GROUP, 1)
        tensors[f"{ffn}.experts.w3"] = tensors[f"{ffn}.experts.w3"] * rows[..., None]
        scale_columns(tensors, f"{ffn}.experts.w2", -powers)
    return tensors


def compressor(prefix: str, arch: Architecture, ratio: int, generator: torch.Generator) -> Tensors:
    """Return a random compressor that joins `ratio` tokens into one without overlap."""
    shape = (arch.head_dim, arch.hidden)
    return {
        f"{prefix}.wkv.weight": normal(shape, shape[1] ** -0.5, generator),
        f"{prefix}.wgate.weight": normal(shape, shape[1] ** -0.5, generator),
        f"{prefix}.norm.weight": torch.ones(arch.head_dim),
        f"{prefix}.ape": normal((ratio, arch.head_dim), 0.02, generator),
    }


def mtp_layer(prefix: str, arch: Architecture, generator: torch.Generator) -> Tensors:
    """Return a random multi-token-prediction layer with every kind of tensor."""
    square = (arch.hidden, arch.hidden)
    tensors = {
        f"{prefix}.e_proj.weight": normal(square, arch.hidden**-0.5, generator),
        f"{prefix}.h_proj.weight": normal(square, arch.hidden**-0.5, generator),
        f"{prefix}.hc_head_fn": normal((arch.streams, arch.streams * arch.hidden), 0.02, generator),
        f"{prefix}.hc_head_base": torch.zeros(arch.streams),
        f"{prefix}.hc_head_scale": torch.ones(1),
        f"{prefix}.ffn.gate.bias": normal((arch.experts,), 0.1, generator),
    }
    for name in ("enorm", "hnorm", "norm", "attn_norm", "ffn_norm"):
        tensors[f"{prefix}.{name}.weight"] = torch.ones(arch.hidden)
    tensors |= initial_attention(f"{prefix}.attn", arch, generator)
    tensors |= initial_moe(f"{prefix}.ffn", arch, generator)
    tensors |= initial_hyper(f"{prefix}.hc_attn", arch, generator)
    tensors |= initial_hyper(f"{prefix}.hc_ffn", arch, generator)
    return tensors


def complete(tensors: Tensors, routing: Tensors, arch: Architecture, seed: int) -> Tensors:
    """Return all tensors of the source, float32 (tid2eid int64), experts still stacked."""
    generator = torch.Generator().manual_seed(seed + 3)
    everything = symmetric_comb(tensors, arch.streams) | routing
    for layer, ratio in enumerate(arch.compress_ratios[: arch.layers]):
        if ratio:
            prefix = f"layers.{layer}.attn.compressor"
            everything |= compressor(prefix, arch, ratio, generator)
    for layer in range(arch.mtp_layers):
        everything |= mtp_layer(f"mtp.{layer}", arch, generator)
    blocks = [f"layers.{i}" for i in range(arch.layers)]
    blocks += [f"mtp.{i}" for i in range(arch.mtp_layers)]
    for block in blocks:
        everything[f"{block}.attn.attn_sink"] = torch.full((arch.heads,), SINK)
    return everything


def e8m0(exponent: Tensor) -> Tensor:
    """Return exponents as UE8M0 bytes under their own dtype."""
    return (exponent + E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def pack_expert(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return an expert's weight as int8 (out, in/2) and its scale as E8M0 (out, in/32)."""
    codes, exponent = fp4_codes(weight)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8), e8m0(exponent)


def to_storage(name: str, value: Tensor) -> Tensors:
    """Return one tensor as the source holds it: itself, or a weight and its scale."""
    if not value.is_floating_point():
        return {name: value}
    value = value.detach()
    if kind(name) == "FP4":
        stem, matrix = name.rsplit(".", 1)
        result = {}
        for expert, weight in enumerate(value):
            codes, scale = pack_expert(weight)
            result |= {
                f"{stem}.{expert}.{matrix}.weight": codes,
                f"{stem}.{expert}.{matrix}.scale": scale,
            }
        return result
    if kind(name) == "FP8":
        codes, exponent = fp8_codes(value)
        return {name: codes, name.removesuffix("weight") + "scale": e8m0(exponent)}
    return {name: value.bfloat16() if kind(name) == "BF16" else value.float()}


def shards(tensors: Tensors, count: int) -> list[Tensors]:
    """Return the tensors in order, cut into shards of about equal bytes.

    Each cut is between a weight and its scale, which a reader of one shard at a time gets
    wrong.
    """
    names = list(tensors)
    total = sum(value.nbytes for value in tensors.values())
    parts, seen = [{}], 0
    for before, name in zip([None, *names], names, strict=False):
        split = name.endswith(".scale") and before == name.removesuffix("scale") + "weight"
        if split and seen * count >= total * len(parts) and len(parts) < count:
            parts.append({})
        parts[-1][name] = tensors[name].contiguous()
        seen += tensors[name].nbytes
    return parts


def write_json(path: Path, content: dict) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(tensors: Tensors, folder: Path, count: int) -> None:
    """Write the shards and model.safetensors.index.json."""
    places = {}
    parts = shards(tensors, count)
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it readable by its owner alone
        places |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def check_folder(folder: Path, arch: Architecture) -> None:
    """Raise ValueError for a folder with files that are not a nano checkpoint."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    config = folder / "config.json"
    try:
        own = json.loads(config.read_text(encoding="utf-8")) == source_config(arch)
    except (OSError, ValueError):
        own = False
    if not own:
        raise ValueError(
            f"{folder}: found files and not the nano's config.json, expected an empty folder or a "
            "nano checkpoint, which is replaced; choose another --out"
        )


def write_checkpoint(
    tensors: Tensors, routing: Tensors, arch: Architecture, seed: int, folder: Path
) -> None:
    """Write weights, config.json, generation_config.json and the encoding into the folder.

    Removes the shards of a nano checkpoint in it. Raises ValueError as `check_folder` does.
    """
    check_folder(folder, arch)
    folder.mkdir(parents=True, exist_ok=True)
    everything = {}
    for name, value in complete(tensors, routing, arch, seed).items():
        everything |= to_storage(name, value)
    write_json(folder / "config.json", source_config(arch))  # first: check_folder recognises it
    for old in folder.glob("model-?????-of-?????.safetensors"):
        old.unlink()
    write_weights(everything, folder, SHARDS)
    greedy = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    write_json(folder / "generation_config.json", greedy)
    (folder / "encoding").mkdir(exist_ok=True)
    target = folder / "encoding" / ENCODING.name
    if target.resolve() != ENCODING:
        shutil.copyfile(ENCODING, target)


def as_stored(tensors: Tensors, arch: Architecture) -> Tensors:
    """Return the trained tensors as they read back from a checkpoint, float32."""
    symmetric = symmetric_comb(tensors, arch.streams)
    return {name: round_to_storage(name, value.detach()) for name, value in symmetric.items()}
