"""Make config.json and jang_config.json of a natively converted bundle.

They have the keys of upstream's converter (jang_tools.dsv4.convert_dsv4_jangtq, convert, 2.5.9),
because its runtimes read them. Two values differ. `source_model` is no path of the converting
machine. `chat` has no sampling_defaults: upstream's end every answer of vMLX after 300 tokens and
override generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv4.model import mtp
from dsv4.model.bundle_tensors import StorageFormat
from dsv4.model.chat_template import EFFORT_KEY, EFFORTS
from dsv4.model.labels import TURBO, turboquant_fields
from dsv4.model.names import GROUP
from dsv4.model.special_tokens import BOS, EOS
from dsv4.storage.checkpoint import Checkpoint

# The keys of config.json that DeepSeek publishes and that stages, transformers and MLX's converters
# add. Loaders are given no others, because some keys name code.
FIELDS = frozenset((
    "_name_or_path", "architectures", "attention_bias", "attention_dropout", "bos_token_id",
    "compress_ratios", "compress_rope_theta", "dspark_block_size", "dspark_markov_rank",
    "dspark_noise_token_id", "dspark_target_layer_ids", "dtype", "eos_token_id", "expert_dtype",
    "group_size", "hc_eps", "hc_mult", "hc_sinkhorn_iters", "head_dim", "hidden_act",
    "hidden_size", "index_head_dim", "index_n_heads", "index_topk", "initializer_range",
    "intermediate_size", "kv_lora_rank", "max_position_embeddings", "model_type",
    "moe_intermediate_size", "mxtq_bits", "mxtq_seed", "n_routed_experts", "n_shared_experts",
    "norm_topk_prob", "num_attention_heads", "num_experts_per_tok", "num_hash_layers",
    "num_hidden_layers", "num_key_value_heads", "num_nextn_predict_layers", "o_groups",
    "o_lora_rank", "pad_token_id", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "quantization", "quantization_config", "requantize", "rms_norm_eps", "rope_parameters",
    "rope_scaling", "rope_theta", "routed_expert_bit_plan", "routed_expert_bits",
    "routed_scaling_factor", "scoring_func", "sliding_window", "swiglu_limit",
    "tie_word_embeddings", "topk_method", "torch_dtype", "transformers_version", "use_cache",
    "v_head_dim", "vision_dim", "vision_downsample_ratio", "vision_inter_dim",
    "vision_max_n_token", "vision_max_wh_ratio", "vision_min_pixels", "vision_n_heads",
    "vision_n_layers", "vision_patch_size", "vision_rope_theta", "vocab_size", "weight_format",
))  # fmt: skip
# Keys that make a loader run code: model_file of mlx_lm and mlx-vlm; auto_map, custom pipelines and
# generation of transformers, and the consent to them.
CODE = frozenset(
    ("model_file", "auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
)

SEED = 42  # of TurboQuant's signs; runtimes expect the key in other bundles too
# The keys that the two files have only, or have otherwise, if experts are in TurboQuant.
TURBO_CONFIG = ("weight_format", "routed_expert_bit_plan", "mxtq_bits")
TURBO_JANG = (
    "variant", "drop_mtp", "critical_f32_preserved", "dsv4_runtime_requirements",
    "routed_expert_bit_plan", "routed_expert_layout",
)  # fmt: skip


def jang_profile(label: dict[str, Any]) -> str:
    """Return upstream's name of a width: `JANG_4L` for 4 bits, `JANGTQ2` in TurboQuant."""
    if label["mode"] == TURBO:
        return f"JANGTQ{label['bits']}"
    return f"JANG_{label['bits']}L"


def width_fields(label: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that tell the experts' width, beside their labels."""
    fields = {
        "_name_or_path": f"DSV4-Flash-{jang_profile(label)}",
        "routed_expert_bits": label["bits"],
    }
    if label["mode"] == TURBO:
        fields |= {"weight_format": TURBO, **turboquant_fields(label)}
    return fields


def replace_width_fields(config: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
    """Return a bundle's config.json for experts in another format."""
    kept = {key: value for key, value in config.items() if key not in TURBO_CONFIG}
    seed = {"mxtq_seed": SEED, "group_size": GROUP} if label["mode"] == TURBO else {}
    return kept | seed | width_fields(label)


def bundle_config(source: Checkpoint, label: dict[str, Any]) -> dict[str, Any]:
    """Return the source's config.json without its quantization; requantize adds the bundle's."""
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    config |= width_fields(label)
    config["group_size"] = GROUP
    config["mxtq_seed"] = SEED
    config.setdefault("rope_parameters", rope_parameters(config))
    return config


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` and `rope_theta` as one object of floats, for newer transformers."""
    scaling = config.get("rope_scaling")
    rope = dict(scaling) if isinstance(scaling, dict) else {"rope_type": "default"}
    old_type = rope.pop("type", "yarn")
    rope.setdefault("rope_type", old_type)
    rope.setdefault("rope_theta", config.get("rope_theta", 10000))
    for key in ("factor", "beta_fast", "beta_slow", "rope_theta"):
        if isinstance(rope.get(key), int):
            rope[key] = float(rope[key])
    return rope


def jang_config(source: Checkpoint, form: StorageFormat, named: str) -> dict[str, Any]:
    """Return jang_config.json: widths by role, and the chat settings.

    named: the value of source_model.
    """
    config, label = source.config, form.expert
    kept = 16 if form.as_source else 8  # embedding and head
    turbo = turboquant_config(form) if label["mode"] == TURBO else {}
    return {
        "weight_format": label["mode"],  # vMLX 1.6.81 refuses names that it does not know
        "profile": jang_profile(label),
        "mxtq_seed": SEED,
        "source_model": named,
        "source_config": {
            "n_routed_experts": config.get("n_routed_experts"),
            "num_hidden_layers": config.get("num_hidden_layers"),
            "n_hash_layers": config.get("num_hash_layers"),
        },
        "mxtq_bits": {
            "routed_expert": label["bits"],
            **dict.fromkeys(("attention", "shared_expert"), 8),
            **dict.fromkeys(("embed_tokens", "lm_head"), kept),
            "norms_router_hc": 16,
        },
        "model_family": "deepseek_v4",
        "chat": chat_settings(config),
        **turbo,
    }


def turboquant_config(form: StorageFormat) -> dict[str, Any]:
    """Return the fields of jang_config.json for experts in TurboQuant (jang_tools 2.5.50)."""
    widths = turboquant_fields(form.expert)
    plan, bits = widths["routed_expert_bit_plan"], form.expert["bits"]
    return {
        "variant": "std",
        "drop_mtp": form.mtp == mtp.DROPPED,
        "critical_f32_preserved": True,
        "dsv4_runtime_requirements": {
            "limited_swiglu_tq_patch": True,
            "generic_mlx_sinks": False,
            "native_cache_schema": "deepseek_v4_v7",
            "generic_turboquant_kv": False,
        },
        "quantization": {
            "method": "affine+mxtq",
            "routed_experts": {"bits": bits, "codec": TURBO, "bit_plan": plan},
            "non_routed": {"bits": 8, "codec": "affine", "group_size": GROUP},
            "critical_control_tensors": "source-f32",
            "group_size": GROUP,  # as the patch stage has it in every bundle
        },
        "routed_expert_bit_plan": plan,
        "mxtq_bits": widths["mxtq_bits"],
        "routed_expert_layout": "prestacked",
    }


def updated_jang_config(
    old: dict[str, Any], source: Checkpoint, form: StorageFormat
) -> dict[str, Any]:
    """Return a native bundle's jang_config.json for tensors in another format."""
    new = jang_config(source, form, old.get("source_model", ""))
    kept = {key: value for key, value in old.items() if key not in (*new, *TURBO_JANG)}
    if "chat" in old:  # the patch stage has set the release's efforts there
        kept["chat"] = old["chat"]
    if old.get("weight_format") == TURBO and "quantization" in kept:
        kept["quantization"] = {"group_size": GROUP}
    return new | kept


def chat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of `chat`, after encoding/encoding_dsv4.py in the source."""
    return {
        "encoder": "encoding_dsv4",
        "encoder_fn": "encode_messages",
        "chat_template_source": "builtin_encoding_module",
        "has_tokenizer_chat_template": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "bos_token_id": config.get("bos_token_id", 0),
        "eos_token_id": config.get("eos_token_id", 1),
        "role_tokens": {
            "user": "<｜User｜>",
            "assistant": "<｜Assistant｜>",
            "latest_reminder": "<｜latest_reminder｜>",
        },
        "reasoning": {
            "supported": True,
            "modes": ["chat", "thinking"],
            "default_mode": "chat",
            "thinking_start": "<think>",
            "thinking_end": "</think>",
            EFFORT_KEY: [*EFFORTS["first"], None],  # the patch stage has the release's
            "drop_earlier_reasoning": True,
        },
        "tool_calling": {
            "supported": True,
            "parser": "dsml",
            "dsml_token": "｜DSML｜",
            "tool_calls_block": "tool_calls",
            "invoke_block": "invoke",
            "parameter_block": "parameter",
            "tool_output_tag": "tool_result",
        },
    }


def known_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with the keys of FIELDS only."""
    return {key: value for key, value in config.items() if key in FIELDS}


def code_keys(document: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every key of CODE in a JSON document, to a depth of 20."""
    if depth > 20:
        return
    items = enumerate(document) if isinstance(document, list) else ()
    items = document.items() if isinstance(document, dict) else items
    for key, value in items:
        here = f"{place}.{key}" if place else f"{key}"
        if key in CODE and value not in (None, False, "", {}, []):
            yield here, value
        elif isinstance(value, dict | list):
            yield from code_keys(value, here, depth + 1)


def without_code(document: Any) -> Any:
    """Return a copy of a JSON document without the keys of CODE."""
    if isinstance(document, dict):
        return {k: without_code(v) for k, v in document.items() if k not in CODE}
    return [without_code(one) for one in document] if isinstance(document, list) else document
