"""Name a checkpoint by its config.json and headers: the release, or the format that is no source.

The releases and formats are those of the DeepSeek-V4 family on the hub by November 2026.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dsv4.errors import UserError
from dsv4.model.names import mtp_layer, parse_expert, treatment
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.text import short_repr

MODEL_TYPE = "deepseek_v4"
REPOSITORIES = "deepseek-ai/DeepSeek-V4-Flash or -Flash-0731, or a copy of their FP4 and FP8 files"
# (hidden_size, num_hidden_layers) → name, routed experts, experts for a token.
MODELS = {
    (4096, 43): ("DeepSeek-V4-Flash", 256, 6),
    (7168, 61): ("DeepSeek-V4-Pro", 384, 6),
}


def check_model_type(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless model_type is deepseek_v4."""
    found = config.get("model_type")
    if found == MODEL_TYPE:
        return
    if found == "deepseek_v41":
        raise UserError(
            where, "DeepSeek-V4.1 (model_type 'deepseek_v41'), another model",
            f"{MODEL_TYPE!r}", f"this recipe converts {REPOSITORIES}",
        )  # fmt: skip
    raise UserError(
        where, f"model_type {short_repr(found)}", f"{MODEL_TYPE!r}",
        "this recipe knows no other model",
    )  # fmt: skip


def foreign_format(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the format of a checkpoint that is no FP4/FP8 source, else ""."""
    dtypes = {t.dtype for n, t in tensors.items() if parse_expert(n) and n.endswith(".weight")}
    if any(name.endswith((".weight_scale", ".weight_scale_2", ".input_scale")) for name in tensors):
        return "NVFP4, as ModelOpt writes it (weight_scale)"
    if any(name.startswith("model.") for name in tensors):
        return "transformers' names (model.layers.…), as save_pretrained writes them"
    if "U32" in dtypes or any(name.endswith(".scales") for name in tensors):
        return "an MLX bundle, quantized already"
    if dtypes == {"F8_E4M3"}:
        return "routed experts in FP8: a Base release, or a repack"
    if dtypes and dtypes <= set(FLOATS):
        return f"routed experts in {', '.join(sorted(dtypes))}, not quantized"
    return ""


def check_format(source: Checkpoint) -> None:
    """Raise UserError for a checkpoint that is complete, but in a format that is no source here."""
    if found := foreign_format(source.tensors):
        raise UserError(
            f"{source.folder}", found, "routed experts in FP4 with UE8M0 scales",
            f"this recipe converts {REPOSITORIES}",
        )  # fmt: skip


def has_vision(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Return True for a release that reads images, by its tower or else by config.json."""
    return bool(config.get("vision_n_layers")) or any(n.startswith("vision.") for n in tensors)


def image_tensors(names: Collection[str]) -> set[str]:
    """Return the names of tensors with which only images are computed.

    Beside the tower these are biases of routers: bias_vl, and the bias of a hash-routed layer.
    """
    hashed = {n.removesuffix("tid2eid") + "bias" for n in names if n.endswith(".gate.tid2eid")}
    return {
        name for name in names
        if treatment(name) == "image" or name.endswith(".gate.bias_vl") or name in hashed
    }  # fmt: skip


def has_dspark(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Return True when DSpark's stages are stored under mtp, and not the first release's MTP.

    A tensor that only one of the two has decides; without one, config.json's dspark_ keys.
    """
    stored = {name.split(".", 2)[-1] for name in tensors if mtp_layer(name) is not None}
    if {"main_proj.weight", "markov_head.markov_w1.weight"} & stored:
        return True
    if {"e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight"} & stored:
        return False
    return any(key.startswith("dspark_") for key in config)


def release_name(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a checkpoint's release by its sizes and tensors, with its experts if pruned.

    tensors: of a source, or of a bundle by storage name.

    "DeepSeek-V4-Flash with DSpark, as -0731 has it; pruned: 152 of 256 experts".
    """
    sizes = (config.get("hidden_size"), config.get("num_hidden_layers"))
    name, experts, top_k = MODELS.get(sizes, ("DeepSeek-V4 of other sizes", None, None))
    drafter = "without MTP"
    if any(mtp_layer(n) is not None for n in tensors):
        dspark = has_dspark(tensors, config)
        drafter = "with DSpark" if dspark else "with MTP, as in the first release"
    words = [f"{name}{' Vision-Exp' if has_vision(tensors, config) else ''} {drafter}"]
    if experts and (found := config.get("n_routed_experts")) != experts:
        words.append(f"pruned: {short_repr(found)} of {experts} experts")
    if top_k and (found := config.get("num_experts_per_tok")) != top_k:
        words.append(f"{short_repr(found)} experts for a token instead of {top_k}")
    return "; ".join(words)
