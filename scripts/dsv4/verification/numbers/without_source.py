"""Check a tensor of a bundle without its source."""

from __future__ import annotations

import numpy as np

from dsv4.model.names import parse_expert
from dsv4.storage.safetensors_file import FLOATS, ITEMSIZE, Tensor
from dsv4.storage.tensor_reader import TensorReader, as_float32, element_index
from dsv4.verification.numbers.tasks import TensorResult

CHUNK_BYTES = 4 << 20  # read at one time


def scan_values(tensor: Tensor, reader: TensorReader) -> TensorResult:
    """Report NaN and Inf, and routed experts of zero bytes."""
    expert = parse_expert(tensor.name)
    what = "expert" if expert else "tensor"
    result = TensorResult(tensor.name, what, tensor.dtype)
    result.numbers = tensor.nbytes // ITEMSIZE[tensor.dtype]
    zero, step = True, CHUNK_BYTES
    for first in range(0, tensor.nbytes, step):
        data = reader.read(tensor, first, min(step, tensor.nbytes - first))
        zero = zero and not data.any()
        if tensor.dtype in FLOATS:
            bad = np.flatnonzero(~np.isfinite(as_float32(data, tensor.dtype)))
            if len(bad):
                at = first // ITEMSIZE[tensor.dtype] + int(bad[0])
                result.add_fault("nan-or-inf", element_index(tensor, at), "NaN or Inf", "numbers")
                break
        if expert and expert[4] == "scales" and tensor.dtype == "U8" and (data == 255).any():
            result.add_fault("nan-or-inf", "scales", "exponent 255", "0 to 254")
    if zero and expert:
        result.add_fault("experts-zero", "whole tensor", "only zero bytes", "weights")
    return result
