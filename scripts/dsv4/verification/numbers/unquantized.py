"""Compare unquantized tensors with the source, and scan tensors without a source.

Unquantized are control tensors, integers, norms, and matrices that other tools left so.
"""

from __future__ import annotations

import numpy as np

from dsv4.model.names import parse_expert
from dsv4.storage.safetensors_file import FLOATS, ITEMSIZE, NUMPY_DTYPE, Tensor
from dsv4.storage.tensor_reader import (
    TensorReader,
    as_float32,
    element_index,
    format_element,
    round_to_dtype,
)
from dsv4.verification.numbers.decode import source_rows
from dsv4.verification.numbers.tasks import Task, TensorResult

CHUNK_NUMBERS = 1 << 17  # elements compared at one time
CHUNK_BYTES = 4 << 20  # bytes scanned at one time


def report_nan(tensor: Tensor, data: np.ndarray, first: int, result: TensorResult) -> bool:
    """Report the first NaN or Inf of `data`, from element `first` on; return False without one."""
    if tensor.dtype not in FLOATS:
        return False
    bad = np.flatnonzero(~np.isfinite(as_float32(data, tensor.dtype)))
    if len(bad):
        where = element_index(tensor, first + int(bad[0]))
        result.add_fault("nan-or-inf", where, "NaN or Inf", "numbers")
    return len(bad) > 0


def scan_values(tensor: Tensor, reader: TensorReader) -> TensorResult:
    """Report NaN and Inf, and routed experts of zero bytes, in a tensor without a source."""
    expert, size = parse_expert(tensor.name), ITEMSIZE[tensor.dtype]
    result = TensorResult(tensor.name, "expert" if expert else "tensor", tensor.dtype)
    result.numbers = tensor.nbytes // size
    zero = True
    for first in range(0, tensor.nbytes, CHUNK_BYTES):
        data = reader.read(tensor, first, min(CHUNK_BYTES, tensor.nbytes - first))
        zero = zero and not data.any()
        if report_nan(tensor, data, first // size, result):
            break
        if expert and expert[4] == "scales" and tensor.dtype == "U8" and (data == 255).any():
            result.add_fault("nan-or-inf", "scales", "exponent 255", "0 to 254")
    if zero and expert:
        result.add_fault("experts-zero", "whole tensor", "only zero bytes", "weights")
    return result


def compare_unquantized(
    task: Task, reader: TensorReader, result: TensorResult, exact: bool = False
) -> None:
    """Check that the tensor is the source rounded to the bundle's dtype, byte for byte.

    exact: report also values that this rounding changes.
    """
    tensor, origin = task.parts["weight"], task.origin
    size = ITEMSIZE[tensor.dtype]
    result.numbers = tensor.nbytes // size
    same = origin.dtype == tensor.dtype and task.scale is None
    decoded = task.scale is not None or origin.dtype in FLOATS
    integers = tensor.dtype[0] in "IU" and origin.dtype[0] in "IU"
    comparable = same or (tensor.dtype in FLOATS and decoded) or integers
    step = CHUNK_NUMBERS
    if task.scale is not None:  # decoded by whole rows
        step = max(1, step // task.columns) * task.columns
    reported: set[str] = set()  # each fault is reported at its first place only
    for first in range(0, result.numbers, step):
        count = min(step, result.numbers - first)
        found = reader.read(tensor, first * size, count * size)
        if "nan" not in reported and report_nan(tensor, found, first, result):
            reported.add("nan")
        if not comparable or "differs" in reported:
            continue  # level 1 reports the dtype
        expected, given = unquantized_source(task, reader, first, count)
        if given is not None:
            missed = as_float32(expected, tensor.dtype)
            missed -= given
            result.energy += float(np.dot(given, given))
            result.error += float(np.dot(missed, missed))
        if exact and given is not None and task.scale is None and "rounded" not in reported:
            lost = np.flatnonzero(as_float32(expected, tensor.dtype) != given)
            if len(lost):
                reported.add("rounded")
                where = element_index(tensor, first + int(lost[0]))
                result.add_fault("rounded", where, tensor.dtype, f"{given[lost[0]]:.8g}")
        differing = np.flatnonzero(found != expected)
        if len(differing) and task.scale is not None:  # by value: FP4 has zeros of both signs
            values = (as_float32(data, tensor.dtype) for data in (found, expected))
            differing = size * np.flatnonzero(np.not_equal(*values))
        if len(differing):
            reported.add("differs")
            at = int(differing[0]) // size
            elements = [format_element(data, tensor.dtype, at) for data in (found, expected)]
            name = {"control": "control-differs", "module": "module-differs"}
            fault = name.get(task.what, "passthrough-differs")
            result.add_fault(fault, element_index(tensor, first + at), *elements)


def unquantized_source(
    task: Task, reader: TensorReader, first: int, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return `count` elements of the source from element `first` on, whole rows if it has a scale.

    As bytes of the bundle's dtype, and as float32 if that is another dtype than the source's.
    """
    origin, dtype = task.origin, task.parts["weight"].dtype
    if task.scale is not None:
        row = first // task.columns
        values = source_rows(task, reader, row, row + count // task.columns)[2]
        return round_to_dtype(values, dtype), values
    size = ITEMSIZE[origin.dtype]
    data = reader.read(origin, first * size, count * size)
    if origin.dtype == dtype:
        return data, None
    if origin.dtype not in FLOATS:  # integers, kept in fewer bytes
        return data.view(NUMPY_DTYPE[origin.dtype]).astype(NUMPY_DTYPE[dtype]).view(np.uint8), None
    values = as_float32(data, origin.dtype)
    return round_to_dtype(values, dtype), values
