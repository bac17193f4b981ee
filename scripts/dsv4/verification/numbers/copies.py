"""Compare codes and scales that were copied from the source: mxfp4 from FP4, mxfp8 from FP8."""

from __future__ import annotations

import numpy as np

from dsv4.model.fp8_blocks import block_of
from dsv4.model.names import GROUP
from dsv4.quantization.fp4 import ue8m0_bytes
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers.tasks import Task, TensorResult

COPY_BYTES = 1 << 18  # bytes of codes compared at one time, which fit a core's cache


def compare_copies(task: Task, reader: TensorReader, result: TensorResult) -> None:
    """Compare every byte of codes and exponents with the source's."""
    fp8 = task.label["mode"] == "mxfp8"
    result.numbers = task.origin.nbytes * (1 if fp8 else 2)
    result.groups = task.parts["scales"].nbytes
    result.recomputed = True
    wrong = np.zeros(result.groups, bool)
    for part, tensor in task.parts.items():
        reported, infinite = False, False
        row_bytes = tensor.nbytes // tensor.shape[0]
        group_bytes = GROUP * task.label["bits"] // 8 if part == "weight" else 1
        rows = max(1, COPY_BYTES // row_bytes)
        for first in range(0, tensor.shape[0], rows):
            last = min(first + rows, tensor.shape[0])
            found = reader.rows(tensor, first, last)
            expected = copied_rows(task, part, reader, first, last)
            differing = np.flatnonzero(found != expected)
            if len(differing) and not reported:
                reported, at = True, differing[0]
                row, byte = divmod(int(at), row_bytes)
                where = f"row {first + row}, group {byte // group_bytes}"
                if fp8:
                    where = f"row {first + row}, {'column' if part == 'weight' else 'group'} {byte}"
                difference = f"{part} byte {found[at]:#04x}", f"{expected[at]:#04x}"
                result.wrong_places.append((where, *difference))
            wrong[(first * row_bytes + differing) // group_bytes] = True
            nan = found == 255 if part == "scales" else (found & 127) == 127
            infinite |= (fp8 or part == "scales") and bool(nan.any())
        if infinite:
            what = ("exponent 255", "0 to 254") if part == "scales" else ("NaN", "numbers")
            result.add_fault("nan-or-inf", part, *what)
    result.wrong = int(wrong.sum())
    result.exact = result.lossless = result.groups - result.wrong


def copied_rows(task: Task, part: str, reader: TensorReader, first: int, last: int) -> np.ndarray:
    """Return the bytes that rows of a part have if codes and scales are the source's."""
    if part == "weight" or task.label["mode"] == "mxfp4":
        stored = task.origin if part == "weight" else task.scale
        return ue8m0_bytes(reader.rows(stored, first, last), stored)
    blocks = ue8m0_bytes(reader.read(task.scale), task.scale).reshape(task.scale.shape)
    height, width = block_of(task.origin.shape, task.scale.shape)
    rows = np.arange(first, last) // height
    columns = np.arange(task.origin.shape[1] // GROUP) * GROUP // width
    return blocks[rows[:, None], columns[None, :]].reshape(-1)
