"""Sizes of the nano model, and its config.json with DeepSeek's keys.

Imports the standard library only: the exporter, the trainer and the tests use it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of a DeepSeek-V4; the defaults are those of the nano."""

    vocab_size: int = 512
    hidden: int = 128
    layers: int = 3
    hash_layers: int = 1  # these route by token id, the others by score
    heads: int = 4
    head_dim: int = 128
    rope_dim: int = 32  # the last columns of each head
    q_lora: int = 128
    o_lora: int = 64
    o_groups: int = 2
    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    streams: int = 4  # hc_mult, the parallel residual streams of mHC
    sinkhorn_iterations: int = 20
    # one entry a layer and one for the MTP layer; 128 means a compressor,
    # which does nothing before the 128th token
    compress_ratios: tuple[int, ...] = (0, 128, 0, 0)
    mtp_layers: int = 1
    routed_scaling: float = 1.5
    swiglu_limit: float = 10.0
    norm_eps: float = 1e-6
    hc_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn_factor: float = 16.0
    yarn_original_positions: int = 65536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0


NANO = Architecture()


# The keys of config.json beside the sizes.
DECLARED = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hidden_act": "silu",
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
}


def source_config(arch: Architecture) -> dict:
    """Return config.json as the source checkpoint has it, keys in alphabetical order."""
    sizes = {
        "compress_ratios": list(arch.compress_ratios),
        "compress_rope_theta": int(arch.compress_rope_theta),
        "hc_eps": arch.hc_eps,
        "hc_mult": arch.streams,
        "hc_sinkhorn_iters": arch.sinkhorn_iterations,
        "head_dim": arch.head_dim,
        "hidden_size": arch.hidden,
        "moe_intermediate_size": arch.expert_width,
        "n_routed_experts": arch.experts,
        "num_attention_heads": arch.heads,
        "num_experts_per_tok": arch.top_k,
        "num_hash_layers": arch.hash_layers,
        "num_hidden_layers": arch.layers,
        "num_nextn_predict_layers": arch.mtp_layers,
        "o_groups": arch.o_groups,
        "o_lora_rank": arch.o_lora,
        "q_lora_rank": arch.q_lora,
        "qk_rope_head_dim": arch.rope_dim,
        "rms_norm_eps": arch.norm_eps,
        "rope_scaling": {
            "beta_fast": int(arch.yarn_beta_fast),
            "beta_slow": int(arch.yarn_beta_slow),
            "factor": int(arch.yarn_factor),
            "original_max_position_embeddings": arch.yarn_original_positions,
            "type": "yarn",
        },
        "rope_theta": int(arch.rope_theta),
        "routed_scaling_factor": arch.routed_scaling,
        "swiglu_limit": arch.swiglu_limit,
        "vocab_size": arch.vocab_size,
    }
    return dict(sorted({**DECLARED, **sizes}.items()))
