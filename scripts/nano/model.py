"""DeepSeek-V4 in plain torch functions over a dict of tensors, for training the nano.

The dict's keys are the names of the source checkpoint (`layers.0.attn.wq_a.weight` …),
with the routed experts of a layer stacked: `layers.0.ffn.experts.w1`, (experts, out, in).

Left out: any cache, and the compressor and the sliding window, which do nothing for
prompts under 128 tokens. Two choices give equal results in runtimes that differ in them:

- the mHC comb logits are symmetric, so `comb` and its transpose mix equally
  (jang 2.5.9 does not transpose, transformers and jang 2.5.50 do);
- attention sinks are a constant far below every score, so leaving them out
  (jang 2.5.9) changes nothing.

Formulas: transformers 5.23, models/deepseek_v4/modeling_deepseek_v4.py
(DeepseekV4Attention, DeepseekV4HyperConnection, DeepseekV4SparseMoeBlock), which
`train_nano.py` compares with before it trains.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nano.architecture import Architecture

Tensors = dict[str, Tensor]

SINK = -30.0  # scores stay within about ±12, so a sink takes e^-20 of a row at most


def normal(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    """Return a float32 Gaussian tensor."""
    return torch.randn(shape, generator=generator) * deviation


def initial_expert(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return stacked expert weights, float32 (experts, out, in), rows of different size.

    Each row has its own factor from 2^-1 to 2^1, so that after rounding to FP4 the
    scales of neighbouring rows differ and a scale in the wrong row shows.
    """
    octaves = torch.rand((*shape[:2], 1), generator=generator) * 2 - 1
    return normal(shape, shape[2] ** -0.5, generator) * torch.exp2(octaves)


def initial_attention(prefix: str, arch: Architecture, generator: torch.Generator) -> Tensors:
    """Return the trained tensors of one attention block."""
    wide = arch.heads * arch.head_dim
    matrices = {
        "wq_a": (arch.q_lora, arch.hidden),
        "wq_b": (wide, arch.q_lora),
        "wkv": (arch.head_dim, arch.hidden),
        "wo_a": (arch.o_groups * arch.o_lora, wide // arch.o_groups),
        "wo_b": (arch.hidden, arch.o_groups * arch.o_lora),
    }
    tensors = {
        f"{prefix}.{name}.weight": normal(shape, shape[1] ** -0.5, generator)
        for name, shape in matrices.items()
    }
    tensors[f"{prefix}.q_norm.weight"] = torch.ones(arch.q_lora)
    tensors[f"{prefix}.kv_norm.weight"] = torch.ones(arch.head_dim)
    return tensors


def initial_moe(prefix: str, arch: Architecture, generator: torch.Generator) -> Tensors:
    """Return the trained tensors of one mixture-of-experts block."""
    up, down = (arch.expert_width, arch.hidden), (arch.hidden, arch.expert_width)
    tensors = {f"{prefix}.gate.weight": normal((arch.experts, arch.hidden), 0.05, generator)}
    for name, shape in (("w1", up), ("w2", down), ("w3", up)):
        tensors[f"{prefix}.experts.{name}"] = initial_expert((arch.experts, *shape), generator)
        tensors[f"{prefix}.shared_experts.{name}.weight"] = normal(
            shape, shape[1] ** -0.5, generator
        )
    return tensors


def initial_hyper(prefix: str, arch: Architecture, generator: torch.Generator) -> Tensors:
    """Return one mHC connection, whose streams are nearly separate at first."""
    mixes = (2 + arch.streams) * arch.streams
    base = normal((mixes,), 0.3, generator)
    base[2 * arch.streams :] = 2 * torch.eye(arch.streams).flatten()
    return {
        f"{prefix}_fn": normal((mixes, arch.streams * arch.hidden), 0.02, generator),
        f"{prefix}_base": base,
        f"{prefix}_scale": torch.ones(3),
    }


def initial_tensors(arch: Architecture, seed: int) -> Tensors:
    """Return every trained tensor, float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "embed.weight": normal((arch.vocab_size, arch.hidden), 0.5, generator),
        "head.weight": normal((arch.vocab_size, arch.hidden), 0.02, generator),
        "norm.weight": torch.ones(arch.hidden),
        "hc_head_fn": normal((arch.streams, arch.streams * arch.hidden), 0.02, generator),
        "hc_head_base": normal((arch.streams,), 0.3, generator),
        "hc_head_scale": torch.ones(1),
    }
    for layer in range(arch.layers):
        prefix = f"layers.{layer}"
        tensors |= initial_attention(f"{prefix}.attn", arch, generator)
        tensors |= initial_moe(f"{prefix}.ffn", arch, generator)
        tensors |= initial_hyper(f"{prefix}.hc_attn", arch, generator)
        tensors |= initial_hyper(f"{prefix}.hc_ffn", arch, generator)
        tensors[f"{prefix}.attn_norm.weight"] = torch.ones(arch.hidden)
        tensors[f"{prefix}.ffn_norm.weight"] = torch.ones(arch.hidden)
    return tensors


def initial_routing(arch: Architecture, seed: int) -> Tensors:
    """Return the routing tensors, which are not trained by gradient.

    `layers.L.ffn.gate.tid2eid`: int64 (vocab, top_k), distinct experts for each token
    of a hash layer; `layers.L.ffn.gate.bias`: float32 (experts,) of a scored layer.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    routing = {}
    for layer in range(arch.layers):
        if layer < arch.hash_layers:
            order = torch.rand((arch.vocab_size, arch.experts), generator=generator).argsort(1)
            routing[f"layers.{layer}.ffn.gate.tid2eid"] = order[:, : arch.top_k].contiguous()
        else:
            routing[f"layers.{layer}.ffn.gate.bias"] = torch.zeros(arch.experts)
    return routing


def symmetric_comb(tensors: Tensors, streams: int) -> Tensors:
    """Return the tensors with the comb part of each mHC projection made symmetric.

    The last streams² rows of `hc_*_fn` and `hc_*_base` are the logits of a
    (streams, streams) matrix; row (i, j) and row (j, i) get their mean.
    """
    result = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(("hc_attn_fn", "hc_attn_base", "hc_ffn_fn", "hc_ffn_base")):
            comb = value[2 * streams :].unflatten(0, (streams, streams))
            comb = (comb + comb.transpose(0, 1)) / 2
            result[name] = torch.cat([value[: 2 * streams], comb.flatten(0, 1)])
    return result


def rms(x: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square along the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def yarn_frequencies(arch: Architecture) -> Tensor:
    """Return the rope frequencies of a compressed layer, float32 (rope_dim / 2,)."""
    dim, theta = arch.rope_dim, arch.compress_rope_theta
    frequencies = theta ** -(torch.arange(0, dim, 2).float() / dim)

    def turning_dim(turns: float) -> float:
        span = arch.yarn_original_positions / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(theta))

    low = max(math.floor(turning_dim(arch.yarn_beta_fast)), 0)
    high = min(math.ceil(turning_dim(arch.yarn_beta_slow)), dim - 1)
    kept = 1 - ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return frequencies / arch.yarn_factor * (1 - kept) + frequencies * kept


def rope_angles(arch: Architecture, compressed: bool, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 (length, rope_dim / 2)."""
    if compressed:
        frequencies = yarn_frequencies(arch)
    else:
        exponents = torch.arange(0, arch.rope_dim, 2).float() / arch.rope_dim
        frequencies = arch.rope_theta**-exponents
    angles = torch.arange(length).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the last columns of x (…, length, head_dim) pair by pair, (even, odd)."""
    width = 2 * cos.shape[-1]
    still, even, odd = x[..., :-width], x[..., -width::2], x[..., 1 - width :: 2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return torch.cat([still, turned.flatten(-2)], dim=-1)


def attention(p: Tensors, prefix: str, x: Tensor, rope: tuple, arch: Architecture) -> Tensor:
    """Return attention of x (batch, length, hidden): one key, also the value, for all heads."""
    batch, length, _ = x.shape
    cos, sin = rope
    q = F.linear(x, p[f"{prefix}.wq_a.weight"])
    q = F.linear(rms(q, arch.norm_eps) * p[f"{prefix}.q_norm.weight"], p[f"{prefix}.wq_b.weight"])
    q = rms(q.view(batch, length, arch.heads, arch.head_dim), arch.norm_eps).transpose(1, 2)
    kv = rms(F.linear(x, p[f"{prefix}.wkv.weight"]), arch.norm_eps)
    kv = rotate((kv * p[f"{prefix}.kv_norm.weight"])[:, None], cos, sin)
    scores = rotate(q, cos, sin) @ kv.transpose(-1, -2) * arch.head_dim**-0.5
    scores = scores + torch.full((length, length), float("-inf")).triu(1)
    sinks = torch.full((*scores.shape[:-1], 1), SINK)
    weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    mixed = rotate(weights @ kv, cos, -sin).transpose(1, 2)  # the value's rotation undone
    groups = mixed.reshape(batch, length, arch.o_groups, -1)
    wo_a = p[f"{prefix}.wo_a.weight"].view(arch.o_groups, arch.o_lora, -1)
    low = [F.linear(groups[:, :, g], wo_a[g]) for g in range(arch.o_groups)]
    return F.linear(torch.cat(low, dim=-1), p[f"{prefix}.wo_b.weight"])


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Return silu(gate) · up with both clamped, as DeepSeek-V4 does."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def routes(
    p: Tensors, routing: Tensors, prefix: str, x: Tensor, ids: Tensor, arch: Architecture
) -> tuple[Tensor, Tensor]:
    """Return experts, int64 (tokens, top_k), and their weights, float32 (tokens, top_k)."""
    scores = F.softplus(F.linear(x, p[f"{prefix}.weight"])).sqrt()
    if f"{prefix}.tid2eid" in routing:
        chosen = routing[f"{prefix}.tid2eid"][ids]
    else:
        chosen = (scores.detach() + routing[f"{prefix}.bias"]).topk(arch.top_k).indices
    weights = scores.gather(1, chosen)
    return chosen, weights / weights.sum(-1, keepdim=True) * arch.routed_scaling


def routed_experts(
    p: Tensors, prefix: str, x: Tensor, chosen: Tensor, arch: Architecture
) -> Tensor:
    """Return every chosen expert's output, float32 (tokens, top_k, hidden).

    Tokens are sorted by expert, so each expert does one matrix product.
    """
    w1, w2, w3 = (p[f"{prefix}.{name}"] for name in ("w1", "w2", "w3"))
    order = chosen.flatten().argsort(stable=True)
    sizes = chosen.flatten().bincount(minlength=arch.experts).tolist()
    parts = x[order // arch.top_k].split(sizes)
    answers = [
        F.linear(swiglu(F.linear(part, w1[e]), F.linear(part, w3[e]), arch.swiglu_limit), w2[e])
        for e, part in enumerate(parts)
    ]
    return torch.cat(answers)[order.argsort()].view(*chosen.shape, -1)


def moe(
    p: Tensors, routing: Tensors, prefix: str, x: Tensor, ids: Tensor, arch: Architecture
) -> tuple[Tensor, Tensor]:
    """Return the block's output for x (tokens, hidden) and each expert's load, (experts,)."""
    chosen, weights = routes(p, routing, f"{prefix}.gate", x, ids, arch)
    routed = routed_experts(p, f"{prefix}.experts", x, chosen, arch)
    shared = f"{prefix}.shared_experts"
    inner = swiglu(
        F.linear(x, p[f"{shared}.w1.weight"]),
        F.linear(x, p[f"{shared}.w3.weight"]),
        arch.swiglu_limit,
    )
    answer = (routed * weights[..., None]).sum(1) + F.linear(inner, p[f"{shared}.w2.weight"])
    return answer, chosen.flatten().bincount(minlength=arch.experts)


def sinkhorn(logits: Tensor, arch: Architecture) -> Tensor:
    """Return a nearly doubly stochastic matrix for each token, (streams, streams, tokens).

    Tokens stand last, so that the short sums run over long rows.
    """
    comb = logits.softmax(1) + arch.hc_eps
    comb = comb / (comb.sum(0, keepdim=True) + arch.hc_eps)
    for _ in range(arch.sinkhorn_iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + arch.hc_eps)
        comb = comb / (comb.sum(0, keepdim=True) + arch.hc_eps)
    return comb


def hyper(p: Tensors, prefix: str, h: Tensor, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block's input, and the weights that combine its output with the streams.

    h: (tokens, streams, hidden). Returns (tokens, hidden), (tokens, streams) and
    (tokens, streams, streams), the last of them already transposed.
    """
    n = arch.streams
    mixes = F.linear(rms(h.flatten(1), arch.norm_eps), p[f"{prefix}_fn"])
    scale, base = p[f"{prefix}_scale"], p[f"{prefix}_base"]
    pre = torch.sigmoid(mixes[:, :n] * scale[0] + base[:n]) + arch.hc_eps
    post = 2 * torch.sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).T.contiguous().unflatten(0, (n, n))
    return (pre[:, None] @ h).squeeze(1), post, sinkhorn(comb, arch).permute(2, 1, 0).contiguous()


def expand(h: Tensor, answer: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Return the streams after a block: comb on h, plus post on the block's output."""
    return torch.baddbmm(post[..., None] * answer[:, None], comb, h)


def block(
    p: Tensors, routing: Tensors, layer: int, h: Tensor, ids: Tensor, arch: Architecture
) -> tuple[Tensor, Tensor]:
    """Return the streams after one layer, (tokens, streams, hidden), and its experts' loads."""
    prefix = f"layers.{layer}"
    rope = rope_angles(arch, arch.compress_ratios[layer] > 0, ids.shape[1])
    x, post, comb = hyper(p, f"{prefix}.hc_attn", h, arch)
    x = rms(x, arch.norm_eps) * p[f"{prefix}.attn_norm.weight"]
    x = attention(p, f"{prefix}.attn", x.view(*ids.shape, -1), rope, arch)
    h = expand(h, x.reshape(ids.numel(), -1), post, comb)
    x, post, comb = hyper(p, f"{prefix}.hc_ffn", h, arch)
    x = rms(x, arch.norm_eps) * p[f"{prefix}.ffn_norm.weight"]
    x, load = moe(p, routing, f"{prefix}.ffn", x, ids.flatten(), arch)
    return expand(h, x, post, comb), load


def logits(
    p: Tensors, routing: Tensors, ids: Tensor, arch: Architecture, wanted: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits for ids (batch, length), and the experts' loads by layer.

    `p` must have passed through `symmetric_comb`. `wanted`: bool (batch, length), which
    positions to return; without it all. Logits are float32 (positions, vocab).
    """
    h = p["embed.weight"][ids.flatten()][:, None].repeat(1, arch.streams, 1)
    loads = {}
    for layer in range(arch.layers):
        h, loads[f"layers.{layer}.ffn.gate.bias"] = block(p, routing, layer, h, ids, arch)
    if wanted is not None:
        h = h[wanted.flatten()]
    mixes = F.linear(rms(h.flatten(1), arch.norm_eps), p["hc_head_fn"])
    pre = torch.sigmoid(mixes * p["hc_head_scale"] + p["hc_head_base"]) + arch.hc_eps
    x = rms((pre[..., None] * h).sum(1), arch.norm_eps) * p["norm.weight"]
    return F.linear(x, p["head.weight"]), loads
