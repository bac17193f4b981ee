"""Keys of a bundle's JSON files that steer a runtime, though DeepSeek's files do not have them.

Found by reading vmlx 1.6.81 (model_config_registry, server, loaders), mlx-lm 0.31.3, mlx-vlm 0.7.10
and transformers 5.23, and by asking them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, VMLX

TOKENIZERS = "transformers and all who tokenize with it"
BUILDS = f"{MLX_LM}, {MLX_VLM}"


@dataclass(frozen=True)
class Steer:
    """What one key does: who reads it, its effect, and the values that change nothing.

    harmless: None if every value may be right, so that a key beyond the source is no fault.
    """

    runtime: str
    effect: str
    harmless: tuple[Any, ...] | None = ()


def _rows(
    keys: str, runtime: str, effect: str, harmless: tuple[Any, ...] | None = ()
) -> dict[str, Steer]:
    return dict.fromkeys(keys.split(), Steer(runtime, effect, harmless))


_FAMILY = ("deepseek_v4",)
_REASONING, _TOOLS = ("deepseek_r1", "deepseek_v4"), ("dsml", "deepseek_v4")
_CAPABILITIES = {
    "family": Steer(VMLX, "chooses the family, with its parsers and cache", _FAMILY),
    "reasoning_parser": Steer(VMLX, "chooses the parser of reasoning", _REASONING),
    "tool_parser": Steer(VMLX, "chooses the parser of tool calls", _TOOLS),
    "cache_type": Steer(VMLX, "chooses the cache", ("kv",)),
    "cache_subtype": Steer(VMLX, "chooses the cache", ("deepseek_v4_composite",)),
    "think_in_template": Steer(VMLX, "says that the template opens <think>", (True,)),
    "supports_thinking": Steer(VMLX, "offers thinking or not", (True,)),
    "supports_tools": Steer(VMLX, "offers tools or not", (True,)),
    "default_reasoning": Steer(VMLX, "thinks or not if a request does not say"),
    "modality": Steer(VMLX, "loads as a model of images", ("text",)),
    "modalities": Steer(VMLX, "offers images, sound or video", (["text"], {"text": True})),
    **_rows("reasoning_modes preserved_modalities multimodal_status", VMLX, "offers other modes"),
}
_NONE = (None, False, {})
_MEDIA = "has_vision has_audio has_video vision_config audio_config video_config"
_MODEL = {  # fields of the runtimes' models, and their defaults
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "index_block": 64, "index_keep": 16, "vision_n_layers": 0, "partial_rotary_factor": None,
    "layer_types": None, "mlp_layer_types": None, "compress_rates": None, "mlp_bias": False,
    "hidden_act": "silu", "norm_topk_prob": True, "topk_method": "noaux_tc",
}  # fmt: skip
# Keys that transformers writes, and that change nothing.
NEUTRAL = {"backend", "is_local", "local_files_only", "name_or_path", "transformers_version"}
# File → path of a key, or the beginning of one → what it does.
STEERS: dict[str, dict[str, Steer]] = {
    "config.json": {
        **{key: Steer(BUILDS, "builds the model by it", (value,)) for key, value in _MODEL.items()},
        **_rows("text_config llm_config language_config", BUILDS, "takes the model from it"),
        **_rows(_MEDIA, f"{MLX_VLM}, {VMLX}", "builds a tower for images or sound", _NONE),
        **_rows("jang jang_config", VMLX, "is read in place of jang_config.json"),
        **{f"capabilities.{key}": steer for key, steer in _CAPABILITIES.items()},
        **_rows("modalities", VMLX, "offers images, sound or video", (["text"], {"text": True})),
        "weight_format": Steer(VMLX, "says how experts are stored"),
        **_rows("mxtq_bits mxtq_seed routed_expert_bits routed_expert_bit_plan group_size",
                VMLX, "says how experts are stored", None),
        "rope_parameters": Steer(f"transformers, {MLX_VLM}", "scales positions", None),
        "store_dtype": Steer(MLX_VLM, "converts FP8 matrices"),
        **_rows("dspark dflash_config speculators_model_type ple_storage skip_vision",
                f"{MLX_VLM}, {VMLX}", "loads another kind of model"),
        "tokenizer_class": Steer(TOKENIZERS, "chooses the tokenizer's class",
                                 ("PreTrainedTokenizerFast", "TokenizersBackend")),
    },
    "jang_config.json": {
        "weight_format": Steer(VMLX, "says how experts are stored"),
        "model_family": Steer(VMLX, "chooses the family, with its parsers and cache", _FAMILY),
        **_CAPABILITIES,
        **{f"capabilities.{key}": steer for key, steer in _CAPABILITIES.items()},
        **_rows("mxtq_bits mxtq_seed routed_expert_bit_plan quantization profile format",
                VMLX, "says how experts are stored", None),
        "cache": Steer(VMLX, "compresses the cache", None),
        **_rows("turboquant kv_cache", VMLX, "compresses the cache"),
        "runtime": Steer(VMLX, "sets how the model runs", None),
        **_rows("architecture mtp", VMLX, "loads another kind of model", None),
        **_rows(_MEDIA, VMLX, "loads as a model of images", _NONE),
        "reasoning": Steer(VMLX, "thinks or not if a request does not say"),
        "chat.encoder": Steer(VMLX, "chooses the encoder of prompts", ("encoding_dsv4",)),
        "chat.encoder_fn": Steer(VMLX, "chooses the encoder's function", ("encode_messages",)),
        "chat.chat_template_source": Steer(VMLX, "chooses the encoder of prompts",
                                           ("builtin_encoding_module", "tokenizer_config")),
        "chat.has_tokenizer_chat_template": Steer(VMLX, "chooses the template", None),
        **_rows("chat.bos_token chat.eos_token chat.bos_token_id chat.eos_token_id "
                "chat.role_tokens", VMLX, "begins and ends prompts by it", None),
        "chat.reasoning.parser": Steer(VMLX, "chooses the parser of reasoning", _REASONING),
        **_rows("chat.reasoning.supported chat.tool_calling.supported", VMLX,
                "offers thinking or tools", (True,)),
        **_rows("chat.reasoning.default_enabled chat.reasoning.default_effort "
                "chat.template_kwargs_defaults chat.reasoning_efforts "
                "chat.reasoning_effort_default", VMLX, "thinks or not if a request does not say"),
        "chat.reasoning": Steer(VMLX, "separates reasoning from the answer", None),
        "chat.tool_calling.parser": Steer(VMLX, "chooses the parser of tool calls", _TOOLS),
        "chat.tool_calling": Steer(VMLX, "recognizes tool calls by it", None),
    },
    "tokenizer_config.json": {
        **_rows("split_special_tokens add_prefix_space add_bos_token add_eos_token", TOKENIZERS,
                "splits a text otherwise, or adds tokens", (None, False)),
        **_rows("extra_special_tokens additional_special_tokens", TOKENIZERS,
                "adds tokens to the tokenizer", (None, [], {})),
        **_rows("bos_token eos_token pad_token unk_token sep_token cls_token mask_token "
                "image_token audio_token video_token", TOKENIZERS, "adds a token", None),
        "tokenizer_class": Steer(TOKENIZERS, "chooses the tokenizer's class",
                                 ("PreTrainedTokenizerFast", "TokenizersBackend")),
        **_rows("clean_up_tokenization_spaces", TOKENIZERS, "changes spaces of an answer",
                (None, False)),
        **_rows("chat_template_type tool_parser_type response_schema", MLX_LM,
                "chooses the template or the parser of tool calls"),
        "added_tokens_decoder": Steer(TOKENIZERS, "adds tokens to the tokenizer", None),
        "processor_class": Steer(MLX_VLM, "chooses the processor", ("DeepseekV4Processor",)),
    },
}  # fmt: skip


def steer_of(name: str, path: str) -> Steer | None:
    """Return what a key steers, by the longest row that its path begins with."""
    rows = STEERS.get(name, {})
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((rows[prefix] for prefix in prefixes if prefix in rows), None)
