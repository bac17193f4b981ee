"""Measure a quantizer's error on a synthetic expert of full shape, and Flash's size by it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, lru_cache

import locations  # noqa: F401
import numpy as np
import turbo_kernels
from source_tensors import FLASH, headers

from dsv4.model.bundle_tensors import plan_shards
from dsv4.model.labels import TURBO, parts_of
from dsv4.model.names import GROUP
from dsv4.quantization.formats import Quantizer, get_quantizer
from dsv4.quantization.synthetic import pack, random_weights, to_fp4
from dsv4.storage.safetensors_file import NUMPY_DTYPE, TensorSpec

OUT, COLUMNS = 2048, 4096
SEED = 2026
MLX = "-mx"  # affine4g32-mx: what mx.quantize makes in the format of affine4g32


@dataclass(frozen=True)
class WeightError:
    """Error on one synthetic expert.

    rms: of the error, relative to the weights' RMS; exact: share of groups without error;
    seconds: of one thread.
    """

    rms: float
    exact: float
    seconds: float


def encode(
    quantizer: Quantizer, packed: np.ndarray, exponents: np.ndarray
) -> tuple[dict[str, np.ndarray], float]:
    """Quantize one matrix. Return its parts and one thread's seconds, after a short warm-up call.

    packed: uint8 (out, in/2); exponents: uint8 (out, in/32).
    """
    shapes = parts_of(quantizer.label, len(packed), 2 * packed.shape[1])
    flat = {part: np.empty(TensorSpec("", *of).nbytes, np.uint8) for part, of in shapes.items()}
    warm = {part: array[: len(array) // len(packed)] for part, array in flat.items()}
    quantizer.encode(packed[0], exponents[0], warm)
    start = time.thread_time()
    quantizer.encode(packed.reshape(-1), exponents.reshape(-1), flat)
    seconds = time.thread_time() - start
    parts = {
        part: flat[part].view(NUMPY_DTYPE[dtype]).reshape(shape)
        for part, (dtype, shape) in shapes.items()
    }
    return parts, seconds


def decode(label: dict, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Decode a matrix as its runtime does, float32; F16 scales and biases are widened first."""
    import mlx.core as mx

    if label["mode"] == TURBO:
        return turbo_kernels.decode({**parts, "tq_bits": np.array([label["bits"]])})
    rest = [parts[part] for part in ("scales", "biases") if part in parts]
    rest = [array if array.dtype == np.uint8 else array.astype(np.float32) for array in rest]
    arrays = map(mx.array, [parts["weight"], *rest])
    return np.array(mx.dequantize(*arrays, **label, stream=mx.cpu).astype(mx.float32))


@lru_cache(maxsize=1)
def expert(rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an expert of normal weights, with FP4 scales rounded by `rule`.

    Codes uint8 (out, in/2), exponents uint8 (out, in/32), values float32 (out, in).
    """
    rng = np.random.default_rng(SEED)
    groups = OUT * COLUMNS // GROUP
    # Row sizes vary by up to a factor of two, so that none relative to a power of two is favoured.
    sizes = 0.02 * np.exp2(rng.uniform(0, 1, OUT)).repeat(COLUMNS // GROUP)
    halves, exponents = to_fp4(sizes[:, None] * random_weights(rng, groups, "normal"), rule)
    packed = pack(halves).reshape(OUT, COLUMNS // 2)
    scale_bytes = (exponents + 127).astype(np.uint8).reshape(OUT, COLUMNS // GROUP)
    values = np.ldexp(halves.astype(np.float32), exponents[:, None] - 1)
    return packed, scale_bytes, values.reshape(OUT, COLUMNS)


def by_mlx(values: np.ndarray, label: dict) -> dict[str, np.ndarray]:
    """Quantize float32 (out, in) with mx.quantize, scales and biases rounded to F16."""
    import mlx.core as mx

    weight, *rest = mx.quantize(mx.array(values), **label, stream=mx.cpu)
    scales, biases = (np.array(part.astype(mx.float16)) for part in rest)
    return {"weight": np.array(weight), "scales": scales, "biases": biases}


def weight_error(name: str, rule: str) -> WeightError:
    """Quantize a synthetic expert, decode it and compare. A name may end with MLX."""
    packed, scale_bytes, true = expert(rule)
    quantizer = get_quantizer(name.removesuffix(MLX))
    if name.endswith(MLX):
        start = time.thread_time()
        parts = by_mlx(true, quantizer.label)
        seconds = time.thread_time() - start
    else:
        parts, seconds = encode(quantizer, packed, scale_bytes)
    wrong = decode(quantizer.label, parts).astype(np.float64) - true
    rms = np.sqrt((wrong**2).mean() / (true.astype(np.float64) ** 2).mean())
    exact = (wrong.reshape(-1, GROUP) == 0).all(axis=1).mean()
    return WeightError(float(rms), float(exact), seconds)


@cache
def flash_bytes(quantizer: str) -> int:
    """Return the bytes of DeepSeek-V4-Flash's shards by a quantizer, as convert plans them."""
    form = get_quantizer(quantizer).form
    return sum(shard.size for shard in plan_shards(headers(FLASH), form, {"format": "mlx"}))
