"""Compare modules in the modes that store small floats: mxfp4, mxfp8, nvfp4, and the source's own.

Each code must be the nearest one to the source's weight, and each scale large enough. MLX rounds a
scale to a power of two or an E4M3 number near greatest / 6 (or 448), which may clip the greatest
weights; a module may clip them no more (ml-explore/mlx, mlx/backend/cpu/quantized.cpp, fp_quantize:
0.32 rounds the exponent up, 0.31 to the nearest, in the dtype of the weights). If the mode can hold
the source's own numbers (FP4 under mxfp4, FP8 under mxfp8) and the scales were kept, the nearest
code is the source's. If they were quantized again, with needless loss, `quantized-again` says so.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import MAGNITUDES, source_blocks, stored_rows
from dsv4.verification.numbers.tasks import Task, TensorResult

# The largest ratio of a scale to its rounded power of two: the exponent, of -32 to 32, is rounded
# in BF16, to an eighth, and then to an integer. 1.473 was measured, on weights from 2^-12 (mlx
# 0.31.2, mxfp8).
HALF_OCTAVE = 2 ** (1 / 2 + 1 / 16)
SLACK = 1e-5  # of a magnitude
# Indices of the counts that the kernels return.
BAD, NOT_NEAREST, FIRST_BAD, FIRST_NOT_NEAREST, WORST_AT, LOSSLESS = range(6)


def is_exact(task: Task) -> bool:
    """Return whether the mode can hold the source's own numbers."""
    bits = task.label["bits"]
    own = (task.what == "expert" and bits == 4) or (task.origin.dtype == "F8_E4M3" and bits == 8)
    return own and task.label["mode"] in ("mxfp4", "mxfp8", "source")


def compare_floats(task: Task, reader: TensorReader, result: TensorResult, weights: int) -> None:
    """Decode and compare a tensor, in blocks of rows of about `weights` weights."""
    exact, bits = is_exact(task), task.label["bits"]
    for first, last, values in source_blocks(task, reader, weights, result):
        codes, scales, group = stored_rows(
            task.parts, task.label, task.columns, reader, first, last
        )
        top = MAGNITUDES[bits][-1]
        limits = top * np.float32(HALF_OCTAVE) * scales
        if task.label["mode"] == "nvfp4":
            limits = top * np.float32(1.00001) * (scales + np.maximum(scales / 16, 2.0**-10))
        limits = limits.astype(np.float32)
        found = compare_codes(values, codes, scales, limits, bits, group)
        add_block(task, result, first, (values, codes, scales, group), found, exact)
    if exact and result.error and not result.faults:
        found = f"relative RMS {result.relative:.3%}"
        result.add_fault("quantized-again", "whole tensor", found, "the source's own codes: none")


def add_block(
    task: Task, result: TensorResult, first: int, rows: tuple, found: tuple, exact: bool
) -> None:
    """Add what `compare_codes` found in a block of rows to the result, with the first faults."""
    values, codes, scales, group = rows
    counts, energy, error, worst = found
    result.numbers += len(values)
    result.groups += len(scales)
    result.lossless += int(counts[LOSSLESS])
    result.exact += int(counts[LOSSLESS]) if exact else 0
    result.energy += energy
    result.error += error

    def position(at: int) -> str:
        row, column = divmod(int(at), task.columns)
        return f"row {first + row}, column {column}"

    if worst > result.worst:
        result.worst, result.worst_at = worst, position(counts[WORST_AT])
    if counts[BAD]:
        at = int(counts[FIRST_BAD])
        result.add_fault("nan-or-inf", position(at), f"scale {scales[at // group]}", "numbers")
    if counts[NOT_NEAREST]:
        at = int(counts[FIRST_NOT_NEAREST])
        table, sign = MAGNITUDES[task.label["bits"]], 1 << (task.label["bits"] - 1)
        decoded = table[min(codes[at] & (sign - 1), len(table) - 1)] * scales[at // group]
        decoded = -decoded if codes[at] & sign else decoded
        name = "expert-differs" if exact else "expert-level-wrong"
        name = name if result.what == "expert" else "module-differs"
        expected = f"the number nearest {values[at]:.6g}"
        number = f"{decoded:.6g}, one of {int(counts[NOT_NEAREST]):,} in these rows"
        result.add_fault(name, position(at), number, expected)


def compare_codes(values, codes, scales, limits, bits, group):
    """Decode codes and compare them with the source's values.

    values float32 (n,), codes uint8 (n,), scales float32 (n / group,), limits float32 (n / group,):
    the greatest weight allowed in a group. Returns (counts int64 (6,), energy, error, worst in
    scales).
    """
    cells, finite = code_cells(bits), np.isfinite(scales)
    if finite.all() and scales.all():
        right, *found = _all_nearest(values, codes, scales, limits, *cells, group)
        if right:
            return tuple(found)
    top = len(MAGNITUDES[bits]) - 1
    return _compare_one_by_one(values, codes, scales, limits, *cells, finite, top, group)


@cache
def code_cells(bits: int) -> np.ndarray:
    """Return each code's value, and the least and greatest weight that it is nearest to.

    float32 (3, 2^bits), in scales, with some slack. The largest code's cell is unbounded; NaN codes
    have an empty one.
    """
    table, sign = MAGNITUDES[bits], 1 << (bits - 1)
    top = len(table) - 1
    found = np.full((3, 2 * sign), np.inf, np.float32)
    for code in range(top + 1):
        high = np.inf
        if code < top:
            high = (table[code] + table[code + 1]) / 2 + SLACK * table[code + 1]
        low = (table[code - 1] + table[code]) / 2 - SLACK * table[code] if code else -high
        found[:, code] = table[code], low, high
        found[:, sign + code] = -table[code], -high, -low
    return found


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _all_nearest(values, codes, scales, limits, decoded, low, high, group):
    """Return (whether each code is the nearest one, and what `_compare_one_by_one` then returns).

    The loops have no branches, so that the compiler vectorizes them.
    """
    counts = np.zeros(6, np.int64)
    energy, error, worst, wrong = 0.0, 0.0, np.float32(0), 0
    miss = np.empty(group, np.float32)
    for g in range(len(scales)):
        start, scale = group * g, scales[g]
        given, stored = values[start : start + group], codes[start : start + group]
        squares, errors, outside = np.float32(0), np.float32(0), np.int32(0)
        for i in range(group):
            value, code = given[i], stored[i]
            miss[i] = value - decoded[code] * scale
            squares += value * value
            errors += miss[i] * miss[i]
            outside += np.int32((value < low[code] * scale) | (value > high[code] * scale))
        far = kernels.largest(miss)
        wrong += outside + (kernels.largest(given) > limits[g])
        counts[LOSSLESS] += far == 0
        energy += squares
        error += errors
        if far > worst * scale:
            worst = far / scale
            counts[WORST_AT] = start + np.argmax(np.abs(miss))
    return wrong == 0, counts, energy, error, worst


@numba.njit(nogil=True, cache=True)
def _compare_one_by_one(values, codes, scales, limits, decoded, low, high, finite, top, group):
    counts = np.zeros(6, np.int64)
    energy, error, worst = 0.0, 0.0, 0.0
    magnitudes = len(decoded) // 2  # of a sign; codes above `top` are NaN
    for g in range(len(scales)):
        scale, same = scales[g], True
        for i in range(group * g, group * (g + 1)):
            code = codes[i]
            if not finite[g] or code % magnitudes > top:
                if counts[BAD] == 0:
                    counts[FIRST_BAD] = i
                counts[BAD] += 1
                same = False
                continue
            value = values[i]
            miss = abs(value - decoded[code] * scale)
            energy += value * value
            error += miss * miss
            same &= miss == 0
            if miss > worst * scale:
                worst = miss / scale if scale > 0 else np.inf
                counts[WORST_AT] = i
            if scale == 0:
                wrong = abs(value) > limits[g]
            else:
                wrong = value < low[code] * scale or value > high[code] * scale
                slack = np.float32(SLACK) * decoded[top] * scale
                wrong |= code % magnitudes == top and abs(value) > limits[g] + slack
            if miss != 0 and wrong:
                if counts[NOT_NEAREST] == 0:
                    counts[FIRST_NOT_NEAREST] = i
                counts[NOT_NEAREST] += 1
        counts[LOSSLESS] += same
    return counts, energy, error, worst
