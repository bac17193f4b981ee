"""Measure the largest errors of affine quantizers on FP4 weights of full width.

verify judges weights of no known formula by these figures (verification/numbers/tolerances.py). The
quantizers: mx.quantize with scales in F16 and BF16, least squares with and without an imatrix,
symmetric levels, the clipping search of AWQ, GPTQ as mlx_lm 0.32.2 has it (its updates within a
group reach beyond it), and scales and biases trained on outputs as DWQ trains them. The inputs that
the last three are fitted to are random: one set nearly white, one of few directions with outliers.

Errors are measured in steps: a group's range (its greatest less its least weight, or its greatest
magnitude) over the number of levels less one, and no less than the RMS of its row's steps.

    .venv/bin/python scripts/lab/error_bounds.py [--rows 32] [BITS …]

Prints a table of bits and group: the worst RMS of a matrix, and of a group, and which quantizer
left it. Three minutes for each number of bits. Exit status: 0; 2 usage.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import locations  # noqa: F401
import mlx.core as mx
import numpy as np

from dsv4.quantization import least_squares
from dsv4.quantization.synthetic import pack, random_weights, to_fp4
from dsv4.verification.numbers.range_errors import range_errors

COLUMNS, SAMPLES = 4096, 8192
Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]  # levels (rows, columns), scales, biases


def as_dtype(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Round float32 to another dtype and back."""
    return np.array(mx.array(values).astype(dtype).astype(mx.float32))


def unpack(weight: mx.array, like: mx.array, bits: int, group: int) -> np.ndarray:
    """Return the levels of packed weights, float32 (rows, columns)."""
    ones, zeros = mx.ones_like(like), mx.zeros_like(like)
    return np.array(mx.dequantize(weight, ones, zeros, group, bits, stream=mx.cpu))


def by_mlx(w: np.ndarray, bits: int, group: int, dtype: mx.Dtype = mx.bfloat16) -> Rounded:
    """Quantize as mx.quantize does, scales and biases rounded to `dtype`."""
    weight, scales, biases = mx.quantize(mx.array(w), group, bits, stream=mx.cpu)
    levels = unpack(weight, scales, bits, group)
    return levels, as_dtype(np.array(scales), dtype), as_dtype(np.array(biases), dtype)


def by_least_squares(
    packed: np.ndarray, exponents: np.ndarray, importance: np.ndarray | None, bits: int, group: int
) -> Rounded:
    """Quantize FP4 codes by this project's own quantizer."""
    rows, n = len(packed), 2 * packed.size
    parts = (np.empty(n * bits // 8, np.uint8), *np.empty((2, n // group), np.uint16))
    flat = packed.reshape(-1), exponents.reshape(-1)
    least_squares.quantize(*flat, importance, (bits, group), parts)
    scales, biases = (p.view(np.float16).astype(np.float32).reshape(rows, -1) for p in parts[1:])
    words = mx.array(parts[0].view(np.uint32).reshape(rows, -1))
    return unpack(words, mx.array(scales), bits, group), scales, biases


def by_symmetry(w: np.ndarray, bits: int, group: int) -> Rounded:
    """Quantize to levels around 0, as absmax quantizers do."""
    half = 1 << (bits - 1)
    most = np.abs(w.reshape(len(w), -1, group)).max(-1)
    scales = as_dtype(np.where(most > 0, most, 1) / (half - 0.5), mx.float16)
    return nearest(w, scales, -half * scales, bits), scales, -half * scales


def nearest(w: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Return the level nearest to each weight."""
    groups = w.reshape(*scales.shape, -1)
    levels = np.rint((groups - biases[..., None]) / scales[..., None])
    return np.clip(levels, 0, (1 << bits) - 1).reshape(w.shape)


def decode(levels: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Return the weights."""
    groups = levels.reshape(*scales.shape, -1)
    return (groups * scales[..., None] + biases[..., None]).reshape(levels.shape)


def by_clipping(w: np.ndarray, bits: int, group: int, inputs: np.ndarray) -> Rounded:
    """Clip each group to the share of its range that changes its output least, as AWQ's search."""
    rows, best = len(w), np.full((len(w), w.shape[1] // group), np.inf)
    groups = w.reshape(rows, -1, group)
    most, found = np.abs(groups).max(-1, keepdims=True), w.copy().reshape(groups.shape)
    frames = inputs[:512].reshape(min(512, len(inputs)), -1, group)
    for share in 1 - np.arange(10) / 20:
        clipped = np.clip(groups, -share * most, share * most)
        wrong = decode(*by_mlx(clipped.reshape(w.shape), bits, group)).reshape(groups.shape)
        errors = np.einsum("rgc,tgc->rgt", wrong - groups, frames, optimize=True)
        loss = np.square(errors).sum(-1)
        found[loss < best] = clipped[loss < best]
        best = np.minimum(best, loss)
    return by_mlx(found.reshape(w.shape), bits, group)


def inverse_root(inputs: np.ndarray) -> np.ndarray:
    """Return the upper Cholesky factor of the inverse of the inputs' second moments, as GPTQ."""
    moments = inputs.astype(np.float64).T @ inputs
    moments[np.diag_indices(len(moments))] += 1e-2 * np.diag(moments).mean() + 1e-30
    return np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)


def by_gptq(w: np.ndarray, bits: int, group: int, root: np.ndarray) -> Rounded:
    """Quantize column by column and correct the columns to come (mlx_lm.quant.gptq, 0.32.2)."""
    w, made = w.copy(), []
    for i in range(0, w.shape[1], group):
        j = i + group
        _, scales, biases = by_mlx(w[:, i:j], bits, group, mx.float32)
        errors = np.zeros((len(w), group), np.float32)
        for k in range(i, j):
            column = w[:, k : k + 1]
            wrong = column - decode(nearest(column, scales, biases, bits), scales, biases)
            errors[:, k - i : k - i + 1] = wrong = wrong / root[k, k]
            w[:, k : k + j] -= wrong @ root[k : k + 1, k : k + j]
        w[:, j:] -= errors @ root[i:j, j:]
        made.append((scales, biases))
    scales, biases = (
        as_dtype(np.concatenate(part, 1), mx.bfloat16) for part in zip(*made, strict=True)
    )
    return nearest(w, scales, biases, bits), scales, biases


def by_training(w: np.ndarray, bits: int, group: int, inputs: np.ndarray) -> Rounded:
    """Train scales and biases on the outputs, the levels of mx.quantize kept, as DWQ (Adam)."""
    levels, *parts = by_mlx(w, bits, group, mx.float32)
    parts = np.stack(parts).astype(np.float64)
    moments = inputs.astype(np.float64).T @ inputs / len(inputs)
    rate = 0.02 * np.abs(parts[0]).mean() * np.array([2.0**-bits, 1.0])[:, None, None]
    first, second = np.zeros_like(parts), np.zeros_like(parts)
    for turn in range(1, 61):
        slope = ((decode(levels, *parts) - w) @ moments).reshape(*parts.shape[1:], group)
        slopes = np.stack([(slope * levels.reshape(slope.shape)).sum(-1), slope.sum(-1)])
        first, second = 0.9 * first + 0.1 * slopes, 0.999 * second + 0.001 * slopes**2
        steps = first / (1 - 0.9**turn) / (np.sqrt(second / (1 - 0.999**turn)) + 1e-12)
        parts = parts - rate * steps
    return levels, *(as_dtype(part.astype(np.float32), mx.bfloat16) for part in parts)


def random_inputs(
    rng: np.random.Generator, columns: int, decay: float, spread: float
) -> np.ndarray:
    """Return inputs whose directions decay by rank, and whose columns differ by e^spread."""
    turn = rng.standard_normal((columns, columns)) / np.sqrt(columns)
    sizes = np.arange(1.0, columns + 1) ** (-decay / 2)
    found = rng.standard_normal((SAMPLES, columns)) * sizes @ turn
    return (found * np.exp(spread * rng.standard_normal(columns))).astype(np.float32)


def matrices(rows: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield FP4 codes, exponents, weights and inputs: of both rules, both distributions."""
    cases = (("ceil", "normal", 1.0, 0.3), ("floor", "laplace", 2.0, 0.8))
    for seed, (rule, kind, decay, spread) in enumerate(cases):
        rng = np.random.default_rng(seed)
        sizes = 0.02 * np.exp2(rng.uniform(0, 1, (rows, 1)) + rng.normal(0, 0.3, COLUMNS // 32))
        weights = sizes.reshape(-1, 1) * random_weights(rng, sizes.size, kind)
        halves, powers = to_fp4(weights, rule)
        values = np.ldexp(halves.astype(np.float32), powers[:, None] - 1).reshape(rows, COLUMNS)
        exponents = (powers + 127).astype(np.uint8).reshape(rows, -1)
        inputs = random_inputs(rng, COLUMNS, decay, spread)
        yield pack(halves).reshape(rows, -1), exponents, values, inputs


def measure(w: np.ndarray, made: Rounded, bits: int, group: int) -> tuple[float, float]:
    """Return the RMS of a matrix's errors, and the largest of a group, in steps."""
    levels, scales, biases = (np.ascontiguousarray(a, np.float32).reshape(-1) for a in made)
    found = range_errors(
        w.reshape(-1), levels.astype(np.uint8), scales, biases, bits, group, w.shape[1]
    )
    return float(np.sqrt(found.squares / len(scales))), found.worst


def main() -> int:
    """Print the table. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("bits", nargs="*", type=int, default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    importance = np.exp(2 * np.random.default_rng(9).standard_normal(COLUMNS))
    worst: dict[tuple[int, int], dict[str, tuple[float, float]]] = {}
    for packed, exponents, w, inputs in matrices(args.rows):
        root = inverse_root(inputs)
        ways: dict[str, Callable[[int, int], Rounded]] = {
            "mx.quantize, F16": partial(by_mlx, w, dtype=mx.float16),
            "mx.quantize, BF16": partial(by_mlx, w),
            "least squares": partial(by_least_squares, packed, exponents, None),
            "with an imatrix": partial(by_least_squares, packed, exponents, importance),
            "symmetric": partial(by_symmetry, w),
            "AWQ's clipping": partial(by_clipping, w, inputs=inputs),
            "GPTQ": partial(by_gptq, w, root=root),
            "DWQ": partial(by_training, w, inputs=inputs),
        }
        for bits in args.bits:
            for group in (32, 64, 128):
                found = worst.setdefault((bits, group), {})
                for name, make in ways.items():
                    errors = measure(w, make(bits, group), bits, group)
                    found[name] = tuple(map(max, errors, found.get(name, errors)))
    print("| bits | group | matrix | group | by quantizer: matrix, group |")
    print("|---|---|---|---|---|")
    for (bits, group), found in worst.items():
        most = [max(errors[i] for errors in found.values()) for i in (0, 1)]
        each = "; ".join(f"{name} {a:.2f}, {b:.2f}" for name, (a, b) in found.items())
        print(f"| {bits} | {group} | {most[0]:.2f} | {most[1]:.2f} | {each} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
