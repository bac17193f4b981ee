"""Compute the size of a bundle for a Mac's memory, and the Mac for a bundle's size.

    memory that the GPU may wire ≥ bundle without MTP + cache of the context + server

On a Mac of over 36 GB the GPU may wire three quarters of the memory or more by default: users
report 72 of 96 GiB (M2 Max), 96 of 128 (M3 Max), 107.5 of 128 (M4 and M5 Max), 239 of 256 (M3
Ultra). The least is assumed here. `sudo sysctl iogpu.wired_limit_mb=N` raises the limit until the
next start; a sixteenth of the memory, at least 4 GiB, is then left for macOS.
(antirez/ds4#893, raullenchai/Rapid-MLX#183, jundot/omlx#1533; not tried on a Mac.) A Mac's "96 GB"
are GiB.

The cache is that of jang_tools.dsv4.mlx_model, DeepseekV4Cache, 2.5.50. Each layer has a window of
`sliding_window` tokens and, if its compress ratio r is not 0, one entry for every r tokens, of
`head_dim` numbers. The indexer of a layer with ratio 4 has `index_head_dim` more. A number has two
bytes.

The server has SERVER, an allowance for Python, activations and MLX's own cache, and the indexer's
scores, which grow with the context: without VMLX_DSV4_INDEXER_KERNEL=1 a slice of QUERIES tokens of
a prompt has a score in float32 for each head and each entry of a layer with ratio 4, and two such
arrays are alive at one time. By reading jang_tools.dsv4.mlx_model; nothing was measured on a Mac.
What lies under mtp. no server loads.
"""

from __future__ import annotations

import argparse
from typing import Any

from dsv4.errors import UserError
from dsv4.settings import add_setting, parse_context, parse_memory, parse_size

GIB = 1 << 30
MACS = tuple(n * GIB for n in (64, 96, 128, 192, 256, 512))
SERVER = 3 * GIB
LEFT = 4 * GIB
CONTEXT = 32768  # tokens, unless another number is asked for
QUERIES = 512  # tokens of a slice of a prompt (DSV4_ATTN_SUBCHUNK)


def add_goal(parser: argparse.ArgumentParser) -> None:
    """Add the options FIT, SIZE and CONTEXT."""
    add_setting(parser, "FIT", type=parse_memory, metavar="96GB", help="a Mac's memory")
    add_setting(parser, "SIZE", type=parse_size, metavar="88GB", help="the bundle's size")
    add_setting(parser, "CONTEXT", type=parse_context, metavar="TOKENS", help=f"default {CONTEXT}")


def check_goal(args: argparse.Namespace) -> None:
    """Raise UserError when both FIT and SIZE are given."""
    if args.fit and args.size:
        raise UserError("FIT and SIZE", "both", "one of them", "leave the other out")


def size_goal(args: argparse.Namespace, config: dict[str, Any], unloaded: int) -> int:
    """Return the bytes that the bundle may have, by these options. unloaded: those of its MTP."""
    budget = args.size or bundle_budget(config, args.fit, args.context or CONTEXT) + unloaded
    return max(0, budget)


def default_wired_limit(memory: int) -> int:
    """Return the bytes that the GPU may wire at least by default."""
    return memory * 3 // 4


def max_wired_limit(memory: int) -> int:
    """Return the bytes that it may wire after `sysctl iogpu.wired_limit_mb`."""
    return memory - max(memory // 16, LEFT)


def cache_bytes(config: dict[str, Any], tokens: int) -> int:
    """Return the bytes of the cache of a context; 0 for an empty config."""
    ratios = (config.get("compress_ratios") or [])[: config.get("num_hidden_layers", 0)]
    window, head = config.get("sliding_window", 0), config.get("head_dim", 0)
    numbers = 0
    for ratio in ratios:
        numbers += window * head
        if ratio:
            indexer = config.get("index_head_dim", 0) * (ratio == 4)
            numbers += tokens // ratio * (head + indexer)
    return 2 * numbers


def server_bytes(config: dict[str, Any], tokens: int) -> int:
    """Return the bytes that a server needs beside weights and cache."""
    ratios = config.get("compress_ratios") or []
    scores = config.get("index_n_heads", 0) * QUERIES * (tokens // 4) * 4 if 4 in ratios else 0
    return SERVER + 2 * scores


def bundle_budget(config: dict[str, Any], memory: int, tokens: int) -> int:
    """Return the bytes that a bundle may load on a Mac; 0 or less: none fits."""
    return max_wired_limit(memory) - server_bytes(config, tokens) - cache_bytes(config, tokens)


def describe_fit(config: dict[str, Any], loaded: int, tokens: int, memory: int = 0) -> str:
    """Say whether a bundle fits a Mac of `memory` bytes; for 0, name the smallest it fits.

    loaded: its bytes without MTP.
    """
    need = loaded + cache_bytes(config, tokens) + server_bytes(config, tokens)
    context = f"with {tokens:,} tokens of context"
    fitting = [mac for mac in ((memory,) if memory else MACS) if need <= max_wired_limit(mac)]
    if not fitting:
        largest = f"{(memory or MACS[-1]) // GIB} GB"
        return f"does not fit {largest} {context}: {need / GIB:.1f} GiB to be wired"
    mac = fitting[0]
    said = f"fits {mac // GIB} GB {context}"
    if need <= default_wired_limit(mac):
        return f"{said}; no sysctl needed"
    limit = max_wired_limit(mac) >> 20
    return f"{said}; needs sudo sysctl iogpu.wired_limit_mb={limit}"
