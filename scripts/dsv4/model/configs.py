"""config.json and jang_config.json of a bundle that was converted natively.

They state what upstream's converter states (jang_tools.dsv4.convert_dsv4_jangtq, convert, 2.5.9),
because its runtimes look for these keys. Two differ: `source_model`, where upstream writes a path
of the machine that converted, and `chat`, which has no sampling_defaults here. Upstream's end every
answer of vMLX after 300 tokens, and sample otherwise than generation_config.json says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv4.model.bundle_tensors import StorageFormat
from dsv4.model.labels import TURBO, turboquant_fields
from dsv4.model.names import GROUP
from dsv4.model.special_tokens import BOS, EOS
from dsv4.storage.checkpoint import Checkpoint

# The keys of config.json that describe the model, as DeepSeek publishes it, and those that stages,
# transformers and MLX's converters add. What a loader is shown has no other: some keys name code.
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
    "v_head_dim", "vocab_size", "weight_format",
))  # fmt: skip
# Keys by which a file of the bundle makes a loader run code: mlx_lm's and mlx-vlm's model_file;
# transformers' auto_map, custom pipelines and generation; the consent that it asks for.
CODE = frozenset(
    ("model_file", "auto_map", "custom_pipelines", "custom_generate", "trust_remote_code")
)

SEED = 42  # of TurboQuant's signs; runtimes expect the key in other bundles too
# What the two files have beside, or otherwise, where experts are in TurboQuant.
TURBO_CONFIG = ("weight_format", "routed_expert_bit_plan", "mxtq_bits")
TURBO_JANG = (
    "variant", "drop_mtp", "critical_f32_preserved", "dsv4_runtime_requirements",
    "routed_expert_bit_plan", "routed_expert_layout",
)  # fmt: skip


def jang_profile(label: dict[str, Any]) -> str:
    """Upstream's name for the experts' width: `JANG_4L` for 4 bits, `JANGTQ2` in TurboQuant."""
    if label["mode"] == TURBO:
        return f"JANGTQ{label['bits']}"
    return f"JANG_{label['bits']}L"


def width_fields(label: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the experts' width, beside their labels."""
    named = f"DSV4-Flash-{jang_profile(label)}"
    said = {"_name_or_path": named, "routed_expert_bits": label["bits"]}
    return said | (
        {"weight_format": TURBO, **turboquant_fields(label)} if label["mode"] == TURBO else {}
    )


def replace_width_fields(config: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
    """A bundle's config.json after its experts have got another form."""
    kept = {key: value for key, value in config.items() if key not in TURBO_CONFIG}
    seed = {"mxtq_seed": SEED, "group_size": GROUP} if label["mode"] == TURBO else {}
    return kept | seed | width_fields(label)


def bundle_config(source: Checkpoint, label: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json without its own quantization; requantize adds the bundle's."""
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    config |= width_fields(label)
    config["group_size"] = GROUP
    config["mxtq_seed"] = SEED
    config.setdefault("rope_parameters", rope_parameters(config))
    return config


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_scaling` and `rope_theta` as newer transformers want them: together, in floats."""
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
    """What jang's loaders read of a bundle: widths by role, and how the model is talked to.

    named: what is said of where the source came from.
    """
    config, label = source.config, form.expert
    kept = 16 if form.as_source else 8  # embedding and head
    turbo = turboquant_config(label) if label["mode"] == TURBO else {}
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


def turboquant_config(label: dict[str, Any]) -> dict[str, Any]:
    """What jang_config.json says beside where experts are in TurboQuant (jang_tools 2.5.50)."""
    widths = turboquant_fields(label)
    plan, bits = widths["routed_expert_bit_plan"], label["bits"]
    return {
        "variant": "std",
        "drop_mtp": False,
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
    """A native bundle's jang_config.json after its numbers have got another form."""
    new = jang_config(source, form, old.get("source_model", ""))
    kept = {key: value for key, value in old.items() if key not in (*new, *TURBO_JANG)}
    if old.get("weight_format") == TURBO and "quantization" in kept:
        kept["quantization"] = {"group_size": GROUP}
    return new | kept


def chat_settings(config: dict[str, Any]) -> dict[str, Any]:
    """How DeepSeek-V4 is talked to, after encoding/encoding_dsv4.py in the source."""
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
            "reasoning_effort_levels": ["max", "high", None],
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
    """A copy with the keys that describe the model, and no other."""
    return {key: value for key, value in config.items() if key in FIELDS}


def code_keys(document: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(place, value) of every key in a JSON document that names code, at any depth up to 20."""
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
    """A copy of a JSON document in which no key names code."""
    if isinstance(document, dict):
        return {k: without_code(v) for k, v in document.items() if k not in CODE}
    return [without_code(one) for one in document] if isinstance(document, list) else document
