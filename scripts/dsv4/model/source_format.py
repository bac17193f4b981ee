"""Tell a DeepSeek-V4 source in FP4 and FP8 from other formats and models, by headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv4.errors import UserError
from dsv4.model.names import parse_expert
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.text import short_repr

MODEL_TYPE = "deepseek_v4"
REPOSITORIES = "deepseek-ai/DeepSeek-V4-Flash or -Flash-0731, or a copy of their FP4 and FP8 files"


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
    if any(name.startswith("model.layers.") for name in tensors):
        return "transformers' names (model.layers.…), as save_pretrained writes them"
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
