"""Time the quantizers on one tensor in memory, beside mx.quantize and jang's TurboQuant."""

from __future__ import annotations

import time
from collections.abc import Callable

import locations  # noqa: F401
import numpy as np
from on_weights import MEASURED
from race import GROUPS, WIDE

from dsv4.model.labels import parts_of
from dsv4.model.names import GROUP
from dsv4.quantization.formats import get_quantizer
from dsv4.quantization.fp4 import E2M1, UE8M0
from dsv4.quantization.synthetic import RULES, pack, random_weights, to_fp4
from dsv4.storage.safetensors_file import ITEMSIZE


def kernel_times(rule: str, runs: int) -> dict[str, float]:
    """Return the least CPU milliseconds for one 2048 × 4096 tensor of normal weights.

    The methods take turns.
    """
    import mlx.core as mx
    from jang_tools.turboquant.linear import tq_quantize_weight

    rng = np.random.default_rng(0)
    halves, exponents = to_fp4(0.02 * random_weights(rng, GROUPS, "normal"), rule)
    packed, exponents = pack(halves).reshape(-1), (exponents + 127).astype(np.uint8)
    decoder = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)

    def turn_of(name: str) -> Callable[[], None]:
        quantizer = get_quantizer(name)
        shapes = parts_of(quantizer.label, *WIDE).items()
        sizes = {part: ITEMSIZE[kind] * int(np.prod(shape)) for part, (kind, shape) in shapes}
        parts = {part: np.empty(size, np.uint8) for part, size in sizes.items()}
        return lambda: quantizer.encode(packed, exponents, parts)

    def decode() -> np.ndarray:
        return decoder[packed].reshape(GROUPS, GROUP) * UE8M0[exponents][:, None]

    def plan() -> None:
        mx.eval(mx.quantize(mx.array(decode()), group_size=GROUP, bits=4, stream=mx.cpu))

    def jang() -> None:
        tq_quantize_weight(decode().reshape(WIDE), bits=2)

    turns = {name: turn_of(name) for name in MEASURED} | {PLAN_KERNEL: plan, JANG_KERNEL: jang}
    spent: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(runs + 1):  # the first compiles and is not counted
        for name, method in turns.items():
            for _ in range(4):  # the method before has filled the caches
                start = time.process_time()
                method()
                spent[name].append(time.process_time() - start)
    return {name: 1e3 * min(times[4:]) for name, times in spent.items()}


PLAN_KERNEL, JANG_KERNEL = "decode, then mx.quantize", "decode, then jang's TurboQuant"


def kernel_table(runs: int = 4) -> str:
    """Return a Markdown table: each quantizer's time for one tensor, and its ratio to mlx's."""
    by_rule = {rule: kernel_times(rule, runs) for rule in RULES}
    rows = [
        "| CPU ms a tensor | " + " | ".join(f"scales by {r} | × mlx" for r in RULES) + " |",
        "|---" * (1 + 2 * len(RULES)) + "|",
    ]
    for name in next(iter(by_rule.values())):
        cells = (f"{t[name]:.1f} | {t[name] / t['mlx']:.1f}" for t in by_rule.values())
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)
