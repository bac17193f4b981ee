"""Compare codes and scales that were kept from the source: mxfp4 of FP4, mxfp8 of FP8."""

from __future__ import annotations

import numpy as np

from dsv4.model.names import BLOCK, GROUP
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers.tasks import Task, TensorResult

COPY_BYTES = 1 << 18  # of codes compared at one time, which a core's cache holds


def compare_copies(task: Task, reader: TensorReader, result: TensorResult) -> None:
    """Codes and exponents kept as they are, FP4's or FP8's: every byte is the source's."""
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
            odd = np.flatnonzero(found != expected)
            if len(odd) and not reported:
                reported = True
                row, byte = divmod(int(odd[0]), row_bytes)
                where = f"row {first + row}, group {byte // group_bytes}"
                if fp8:
                    where = f"row {first + row}, {'column' if part == 'weight' else 'group'} {byte}"
                result.wrong_places.append(
                    (where, f"{part} byte {found[odd[0]]:#04x}", f"{expected[odd[0]]:#04x}")
                )
            wrong[(first * row_bytes + odd) // group_bytes] = True
            nan = found == 255 if part == "scales" else (found & 127) == 127
            infinite |= (fp8 or part == "scales") and bool(nan.any())
        if infinite:
            what = ("exponent 255", "0 to 254") if part == "scales" else ("NaN", "numbers")
            result.add_fault("nan-or-inf", part, *what)
    result.wrong = int(wrong.sum())
    result.exact = result.lossless = result.groups - result.wrong


def copied_rows(task: Task, part: str, reader: TensorReader, first: int, last: int) -> np.ndarray:
    """What some rows of a part are where the source's codes and scales were kept: bytes."""
    if part == "weight" or task.label["mode"] == "mxfp4":
        return reader.rows(task.origin if part == "weight" else task.scale, first, last)
    blocks = reader.read(task.scale).reshape(task.scale.shape)
    rows = np.arange(first, last) // BLOCK
    columns = np.arange(task.origin.shape[1] // GROUP) * GROUP // BLOCK
    return blocks[rows[:, None], columns[None, :]].reshape(-1)
