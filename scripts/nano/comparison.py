"""Compare the short definition in model.py with transformers' DeepseekV4ForCausalLM."""

import torch

from nano.architecture import Architecture, source_config
from nano.model import SINK, Tensors, initial_routing, initial_tensors, logits, symmetric_comb

# Source name -> transformers name, applied in this order to any part of a name.
RENAMES = (
    ("embed.", "model.embed_tokens."),
    ("head.", "lm_head."),
    ("layers.", "model.layers."),
    (".attn.", ".self_attn."),
    (".ffn.", ".mlp."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".hc_attn_", ".attn_hc."),
    (".hc_ffn_", ".ffn_hc."),
    (".attn_sink", ".sinks"),
    (".q_norm.", ".q_a_norm."),
    (".wq_a.", ".q_a_proj."),
    (".wq_b.", ".q_b_proj."),
    (".wkv.", ".kv_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    ("gate.bias", "gate.e_score_correction_bias"),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"),
    ("shared_experts.w3", "shared_experts.up_proj"),
)
TOP = {f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")}


def reference_name(name: str) -> str:
    """Return transformers' name of a tensor of the source."""
    if name in TOP:
        return TOP[name]
    if name == "norm.weight":
        return "model.norm.weight"
    start = name.split(".")[0]
    for old, new in RENAMES:
        if old in name and (old[0] == "." or not old.endswith(".") or start == old[:-1]):
            name = name.replace(old, new, 1)
    return name


def reference_tensors(tensors: Tensors, routing: Tensors, arch: Architecture) -> Tensors:
    """Return the tensors under transformers' names, experts' w1 and w3 as one."""
    state = {}
    for name, value in (symmetric_comb(tensors, arch.streams) | routing).items():
        if ".experts." not in name:
            state[reference_name(name)] = value.detach()
    for layer in range(arch.layers):
        experts, target = f"layers.{layer}.ffn.experts", f"model.layers.{layer}.mlp.experts"
        gate_up = torch.cat([tensors[f"{experts}.w1"], tensors[f"{experts}.w3"]], dim=1)
        state[f"{target}.gate_up_proj"] = gate_up.detach()
        state[f"{target}.down_proj"] = tensors[f"{experts}.w2"].detach()
        state[f"model.layers.{layer}.self_attn.sinks"] = torch.full((arch.heads,), SINK)
    return state


def reference_model(tensors: Tensors, routing: Tensors, arch: Architecture):
    """Return a transformers model with these weights, float32, in evaluation mode.

    Raises ValueError for a weight without a match, except in the compressors, which short prompts
    do not use.
    """
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = source_config(arch)
    for name in ("architectures", "quantization_config", "torch_dtype"):
        del config[name]
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**config)).float().eval()
    result = model.load_state_dict(reference_tensors(tensors, routing, arch), strict=False)
    missing = [name for name in result.missing_keys if ".compressor." not in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"transformers' DeepseekV4ForCausalLM: found no tensors for {missing} "
            f"and no place for {result.unexpected_keys}"
        )
    return model


@torch.no_grad()
def reference_difference(arch: Architecture, seed: int, length: int = 60) -> float:
    """Return the greatest difference of logits on random weights and tokens."""
    tensors, routing = initial_tensors(arch, seed), initial_routing(arch, seed)
    tensors["head.weight"] *= (
        5  # logits of about ±1, so that differences are not hidden by their size
    )
    generator = torch.Generator().manual_seed(seed)
    for name in routing:
        if name.endswith("bias"):
            routing[name] = torch.randn(arch.experts, generator=generator) * 0.1
    ids = torch.randint(arch.vocab_size, (3, length), generator=generator)
    own, _ = logits(symmetric_comb(tensors, arch.streams), routing, ids, arch)
    reference = reference_model(tensors, routing, arch)(ids, use_cache=False).logits
    return (own - reference.flatten(0, 1)).abs().max().item()
