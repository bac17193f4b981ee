"""Find matrices whose values cannot be weights, by samples of a source.

A destroyed source can be legal in every header: FP8 codes written as BF16 numbers, without their
scales, load and run, and the model says nothing. Such matrices show by their magnitude: all
matrices of one kind have nearly the same, in every layer.

A shard with the hub's hash is as its maker published it: its zeros are no hole of a download. Codes
without their scales are no weights there either.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from dsv4.hub.provenance import is_published
from dsv4.model.expected_tensors import SourceFaults
from dsv4.model.names import parse_expert
from dsv4.model.tensor_table import row_of
from dsv4.quantization.fp4 import E2M1, UE8M0, ue8m0_bytes
from dsv4.quantization.fp8 import E4M3
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, ITEMSIZE, Tensor
from dsv4.storage.tensor_reader import as_float32

RANGES, RANGE_BYTES = 3, 8192  # of each sampled tensor
EXPERTS = 8  # sampled of each layer's, for each of the three matrices
FACTOR = 100  # between a matrix's RMS and the median of its kind
RAW_RMS = 1.0  # RMS of values on the E4M3 grid beyond which they are codes and no weights
GRID = np.unique(np.abs(E4M3[np.isfinite(E4M3)]))

Read = Callable[[Tensor, int, int], np.ndarray]  # (tensor, first byte, bytes) → uint8


@dataclass(frozen=True)
class Sample:
    """Statistics of a few thousand values of one matrix.

    on_grid: all are E4M3 numbers. hole: the matrix or scale whose sampled bytes are all zero.
    """

    name: str
    rms: float
    constant: bool
    on_grid: bool
    hole: str = ""


class WeightSamples:
    """Samples of a source's matrices by kind. The shards may come one after the other."""

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._todo = list(sampled_matrices(source))
        self._kinds: dict[str, list[Sample]] = defaultdict(list)
        self.number = 0  # of matrices sampled

    def check(self, read: Read, shards: Container[str]) -> None:
        """Raise SourceFaults when `faults` finds some."""
        if faults := self.faults(read, shards):
            raise SourceFaults(
                self._source.folder, faults, "values that can be weights",
                "take these tensors from the release that this is a copy of",
            )  # fmt: skip

    def faults(self, read: Read, shards: Container[str]) -> list[str]:
        """Sample the matrices that lie in `shards` with their scales, each once.

        Returns a phrase for each matrix whose values cannot be weights. Magnitudes are compared
        with those of all matrices sampled so far. Reads 24 kB of each matrix and of its scale, of
        at most EXPERTS routed experts for each layer and projection.
        """
        faults, published = [], cache(is_published)
        ready = [t for t in self._todo if all(n in shards for n in self._shards_of(t))]
        sampled = {tensor.name for tensor in ready}
        self._todo = [tensor for tensor in self._todo if tensor.name not in sampled]
        self.number += len(ready)
        for tensor in ready:
            sample = sample_matrix(self._source, tensor, read)
            self._kinds[row_of(tensor.name).name].append(sample)
            faults += _faults_alone(tensor, sample, published(tensor.path))
        for samples in self._kinds.values():
            faults += _unlike_their_kind(samples)
        return faults

    def _shards_of(self, weight: Tensor) -> set[str]:
        scale = self._source.tensors.get(weight.name.removesuffix("weight") + "scale", weight)
        return {weight.path.name, scale.path.name}


def _faults_alone(tensor: Tensor, sample: Sample, published: bool) -> Iterator[str]:
    if sample.hole and not published:
        yield f"{sample.hole}: only zero bytes in all samples: a download left a hole"
    elif sample.constant:
        if not published and not tensor.name.startswith(("embed.", "head.")):
            yield f"{tensor.name}: all sampled values are the same"
    elif tensor.dtype in FLOATS and sample.on_grid and sample.rms > RAW_RMS:
        yield (
            f"{tensor.name}: {tensor.dtype} values that are all FP8 codes, RMS "
            f"{sample.rms:.3g}, as when a scale was dropped"
        )


def _unlike_their_kind(samples: list[Sample]) -> Iterator[str]:
    sound = [sample.rms for sample in samples if not sample.constant and sample.rms > 0]
    median = statistics.median(sound) if len(sound) > 2 else 0
    for sample in samples:
        ratio = sample.rms / median if median and sample.rms else 1
        if not 1 / FACTOR <= ratio <= FACTOR:
            yield f"{sample.name}: RMS {sample.rms:.3g}, {median:.3g} in others of its kind"


def sampled_matrices(source: Checkpoint) -> Iterator[Tensor]:
    """Yield the matrices to sample: all but experts beyond the first EXPERTS."""
    for name, tensor in source.tensors.items():
        row, expert = row_of(name), parse_expert(name)
        if row is None or len(tensor.shape) != 2 or row.stored in ("F32", "INT"):
            continue
        if expert is None or expert[2] < EXPERTS:
            yield tensor


def sample_matrix(source: Checkpoint, weight: Tensor, read: Read) -> Sample:
    """Sample one matrix. Of FP4 and FP8 codes and scales are sampled apart."""
    data = read_sample(weight, read)
    if not data.any() and not weight.name.startswith(("embed.", "head.")):
        return Sample(weight.name, 0.0, True, False, hole=weight.name)
    if weight.dtype in FLOATS:
        values = as_float32(data, weight.dtype)
    elif weight.dtype == "F8_E4M3":
        values = E4M3[data]
    else:
        values = E2M1[np.stack((data & 15, data >> 4))].ravel()
    values = values[np.isfinite(values)]
    if not len(values):
        return Sample(weight.name, 0.0, False, False)
    scale = source.tensors.get(weight.name.removesuffix("weight") + "scale")
    rms, constant = _rms(values), bool(values.min() == values.max())
    if scale is not None:
        exponents = ue8m0_bytes(read_sample(scale, read), scale)
        if not exponents.any():
            return Sample(weight.name, 0.0, True, False, hole=scale.name)
        factors = UE8M0[exponents]
        rms *= _rms(factors[np.isfinite(factors)])
        return Sample(weight.name, rms, constant, False)
    on_grid = bool(np.isin(np.abs(values), GRID).all())
    return Sample(weight.name, rms, constant, on_grid)


def _rms(values: np.ndarray) -> float:
    return math.sqrt(np.square(values, dtype=np.float64).mean()) if len(values) else 0.0


def read_sample(tensor: Tensor, read: Read) -> np.ndarray:
    """Return RANGES ranges of a tensor's bytes, spread over it; all of a small one."""
    if tensor.nbytes <= RANGES * RANGE_BYTES:
        return read(tensor, 0, tensor.nbytes)
    size = ITEMSIZE[tensor.dtype]
    step = (tensor.nbytes - RANGE_BYTES) // (RANGES - 1) // size * size
    return np.concatenate([read(tensor, at * step, RANGE_BYTES) for at in range(RANGES)])
