"""Compare affine modules: bounds on every weight, and the bytes of the quantizer or MLX's formula.

Rows whose bytes equal the quantizer's need no decoding if case_table.py checked every case of their
exponents. All other rows are decoded, and so is one block of every tensor.
"""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import numpy as np

from dsv4.quantization.formats import Quantizer
from dsv4.quantization.fp4 import ue8m0_bytes
from dsv4.quantization.imatrix import normalized
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers.affine_block import AffineBlock
from dsv4.verification.numbers.case_table import check_cases, count_exact_groups, count_zeros
from dsv4.verification.numbers.tasks import Task, TensorResult
from dsv4.verification.numbers.tolerances import CORRELATION, SIZE_BOUNDS, promises_of

RUN_BLOCKS = 8  # blocks of rows whose bytes are compared at one time


class AffineComparer:
    """Compares affine modules, in any thread; checks the quantizer's cases once.

    recorded: name of the quantizer that the shards record; quantizer: None if its bytes cannot be
    recomputed.
    """

    def __init__(self, recorded: str | None, quantizer: Quantizer | None) -> None:
        self._recorded, self._quantizer = recorded, quantizer
        if quantizer is not None:
            self._cases = check_cases(quantizer, promises_of(quantizer.name))

    def compare(
        self, task: Task, reader: TensorReader, result: TensorResult, block_weights: int
    ) -> None:
        """Compare one tensor, in blocks of rows of about `block_weights` weights."""
        expert = task.what == "expert"
        promises = promises_of(self._recorded if expert else None)
        quantizer = self._quantizer.for_tensor(task.base) if expert and self._quantizer else None
        if quantizer is not None and quantizer.label != task.label:
            quantizer = None
        importance = quantizer and self._quantizer.importance.get(task.base)
        if importance is not None:
            importance = normalized(importance, task.base)
        out, columns = task.origin.shape[0], task.columns
        rows = max(1, block_weights // columns)
        sample = zlib.crc32(task.base.encode()) % -(-out // rows) * rows
        limits = {*range(0, out, RUN_BLOCKS * rows), sample, min(out, sample + rows), out}
        for first, last in pairwise(sorted(limits)):
            by_bytes = quantizer is not None and first != sample
            if by_bytes and self._compare_bytes(task, reader, first, last, result):
                continue
            for row in range(first, last, rows):
                block = AffineBlock(task, reader, row, min(last, row + rows), columns)
                if not block.check_source(result):
                    return
                block.check_bounds(result, promises)
                wrong = result.wrong
                if quantizer:
                    block.check_bytes(result, quantizer, importance)
                else:
                    block.check_formula(result)
                if result.wrong > wrong:
                    block.check_size(result)
        check_whole(result, task.label["bits"])

    def _compare_bytes(
        self, task: Task, reader: TensorReader, first: int, last: int, result: TensorResult
    ) -> bool:
        """Count rows that hold the quantizer's bytes, of checked cases; return False for others."""
        exponents = ue8m0_bytes(reader.rows(task.scale, first, last), task.scale)
        if not self._cases.holds[exponents].all():
            return False
        codes = reader.rows(task.origin, first, last)
        stored = {part: reader.rows(tensor, first, last) for part, tensor in task.parts.items()}
        expected = {part: np.empty_like(data) for part, data in stored.items()}
        stats = self._quantizer.encode(codes, exponents, expected)
        if not all(np.array_equal(expected[part], data) for part, data in stored.items()):
            return False
        result.recomputed = True
        result.numbers += 2 * len(codes)
        result.groups += len(exponents)
        result.exact += len(exponents)
        result.lossless += count_exact_groups(codes, exponents, self._cases.exact_codes)
        result.energy += stats.energy
        result.error += stats.error
        result.zeros += count_zeros(codes.view(np.int64))
        if self._cases.worst >= result.worst:
            result.worst, result.worst_at = self._cases.worst, ""
        return True


def check_whole(result: TensorResult, bits: int) -> None:
    """Check a whole tensor's error, unless its bytes are the quantizer's."""
    if result.recomputed and result.exact == result.groups:
        return
    name, bound = f"{result.what}-imprecise", SIZE_BOUNDS[bits].matrix
    rms = math.sqrt(result.steps / result.measured) if result.measured else 0.0
    if rms > bound:
        expected = f"at most {bound:.2f} for {bits} bits"
        result.add_fault(name, "whole tensor", f"RMS {rms:.2f} steps of its range", expected)
    elif result.measured and result.correlation < CORRELATION:
        found = f"correlation {result.correlation:.2f} with the source"
        result.add_fault(name, "whole tensor", found, f"at least {CORRELATION}")
