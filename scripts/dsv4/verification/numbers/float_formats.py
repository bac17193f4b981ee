"""Level 2 of the modes that store small floats: mxfp4, mxfp8, nvfp4, and the source's own form.

Each code is the nearest one to the source's weight, and a scale is large enough: what MLX rounds
it to, a power of two or an E4M3 number near greatest / 6 (or 448), cuts the greatest off by no more
(ml-explore/mlx, mlx/backend/cpu/quantized.cpp, fp_quantize: 0.32 rounds the exponent up, 0.31 to
the nearest, in the dtype of the weights). Where the source's numbers are of the mode's own kind
(FP4 under mxfp4, FP8 under mxfp8) and their scales were kept, the nearest is the source's own;
where they were quantized once more, which loses without need, that is said.
"""

from __future__ import annotations

from functools import cache

import numba
import numpy as np

from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import MAGNITUDES, source_rows, stored_rows
from dsv4.verification.numbers.tasks import Task, TensorResult

# A power of two whose exponent, of -32 to 32, was rounded in BF16, to an eighth, and then to a
# whole: 1.473 was measured, of weights from 2^-12 (mlx 0.31.2, mxfp8).
HALF_OCTAVE = 2 ** (1 / 2 + 1 / 16)
SLACK = 1e-5  # of a magnitude
BAD, ODD, FIRST_BAD, FIRST_ODD, WORST_AT, LOSSLESS = range(6)


def is_exact(task: Task) -> bool:
    """True where the mode can hold the source's own numbers."""
    bits = task.label["bits"]
    own = (task.what == "expert" and bits == 4) or (task.origin.dtype == "F8_E4M3" and bits == 8)
    return own and task.label["mode"] in ("mxfp4", "mxfp8", "source")


def compare_floats(task: Task, reader: TensorReader, result: TensorResult, weights: int) -> None:
    """Decode and compare, some rows of about so many weights at a time."""
    exact, bits = is_exact(task), task.label["bits"]
    rows = max(1, weights // task.columns)
    for first in range(0, task.origin.shape[0], rows):
        last = min(first + rows, task.origin.shape[0])
        _, exponents, values = source_rows(task, reader, first, last)
        if (exponents == 255).any() or not np.isfinite(values).all():
            result.add_fault("source-broken", f"rows from {first}", "NaN", "numbers")
            return
        codes, scales, group = stored_rows(task, reader, first, last)
        top = MAGNITUDES[bits][-1]
        limits = top * np.float32(HALF_OCTAVE) * scales
        if task.label["mode"] == "nvfp4":
            limits = top * np.float32(1.00001) * (scales + np.maximum(scales / 16, 2.0**-10))
        limits = limits.astype(np.float32)
        answer = count_not_nearest(values, codes, scales, limits, MAGNITUDES[bits], bits, group)
        report_first_mismatch(task, result, first, (values, codes, scales, group), answer, exact)
    if exact and result.error and not result.faults:
        found = f"relative RMS {result.relative:.3%}"
        result.add_fault("quantized-again", "whole tensor", found, "the source's own codes: none")


def report_first_mismatch(
    task: Task, result: TensorResult, first: int, rows: tuple, answer: tuple, exact: bool
) -> None:
    """Count what one block of rows gave, and name the first of what breaks the promise."""
    values, codes, scales, group = rows
    counts, energy, error, worst = answer
    result.numbers += len(values)
    result.groups += len(scales)
    result.lossless += int(counts[LOSSLESS])
    result.exact += int(counts[LOSSLESS]) if exact else 0
    result.energy += energy
    result.error += error

    def place(at: int) -> str:
        row, column = divmod(int(at), task.columns)
        return f"row {first + row}, column {column}"

    if worst > result.worst:
        result.worst, result.worst_at = worst, place(counts[WORST_AT])
    if counts[BAD]:
        at = int(counts[FIRST_BAD])
        result.add_fault("nan-or-inf", place(at), f"scale {scales[at // group]}", "numbers")
    if counts[ODD]:
        at = int(counts[FIRST_ODD])
        table, sign = MAGNITUDES[task.label["bits"]], 1 << (task.label["bits"] - 1)
        decoded = table[min(codes[at] & (sign - 1), len(table) - 1)] * scales[at // group]
        decoded = -decoded if codes[at] & sign else decoded
        name = "expert-differs" if exact else "expert-level-wrong"
        name = name if result.what == "expert" else "module-differs"
        wanted = f"the number nearest {values[at]:.6g}"
        found = f"{decoded:.6g}, one of {int(counts[ODD]):,} in these rows"
        result.add_fault(name, place(at), found, wanted)


def count_not_nearest(values, codes, scales, limits, table, bits, group):
    """values float32 (n,), codes uint8 (n,), scales and limits float32 (n / group,), table: the
    magnitudes → (counts int64 (6,), energy, error, worst in scales). Raises nothing."""
    finite = np.isfinite(scales)
    if finite.all() and scales.all():
        right, *found = _all_nearest(values, codes, scales, limits, *code_cells(bits), group)
        if right:
            return tuple(found)
    return _judge(values, codes, scales, limits, finite, table, np.uint8(1 << (bits - 1)),
                  group)  # fmt: skip


@cache
def code_cells(bits: int) -> np.ndarray:
    """What each code stands for, and between what the weights lie that it is nearest to, with some
    slack: float32 (3, 2^bits), in scales. The greatest has no end here; nothing is near a NaN."""
    table, sign = MAGNITUDES[bits], 1 << (bits - 1)
    top = len(table) - 1
    found = np.full((3, 2 * sign), np.inf, np.float32)
    for code in range(top + 1):
        low = (table[code - 1] + table[code]) / 2 - SLACK * table[code] if code else None
        high = (
            (table[code] + table[code + 1]) / 2 + SLACK * table[code + 1] if code < top else np.inf
        )
        low = -high if low is None else low
        found[:, code], found[:, sign + code] = (
            (table[code], low, high),
            (-table[code], -high, -low),
        )
    return found


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _all_nearest(values, codes, scales, limits, decoded, low, high, group):
    """What `_judge` gives where each code is the nearest one, found by vectors; whether it is."""
    counts = np.zeros(6, np.int64)
    energy, error, worst, odd = 0.0, 0.0, np.float32(0), 0
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
        odd += outside + (kernels.largest(given) > limits[g])
        counts[LOSSLESS] += far == 0
        energy += squares
        error += errors
        if far > worst * scale:
            worst = far / scale
            counts[WORST_AT] = start + np.argmax(np.abs(miss))
    return odd == 0, counts, energy, error, worst


@numba.njit(nogil=True, cache=True)
def _judge(values, codes, scales, limits, finite, table, sign, group):
    counts = np.zeros(6, np.int64)
    energy, error, worst = 0.0, 0.0, 0.0
    top = len(table) - 1
    for g in range(len(scales)):
        scale, same = scales[g], True
        for i in range(group * g, group * (g + 1)):
            code = codes[i] & np.uint8(sign - np.uint8(1))
            if not finite[g] or code > top:
                if counts[BAD] == 0:
                    counts[FIRST_BAD] = i
                counts[BAD] += 1
                same = False
                continue
            value = values[i]
            decoded = table[code] * scale
            decoded = -decoded if codes[i] & sign else decoded
            miss = abs(value - decoded)
            energy += value * value
            error += miss * miss
            same &= miss == 0
            if miss > worst * scale:
                worst = miss / scale if scale > 0 else np.inf
                counts[WORST_AT] = i
            if miss != 0 and _is_not_nearest(
                value, codes[i], code, scale, limits[g], table, sign, top
            ):
                if counts[ODD] == 0:
                    counts[FIRST_ODD] = i
                counts[ODD] += 1
        counts[LOSSLESS] += same
    return counts, energy, error, worst


@numba.njit(inline="always")
def _is_not_nearest(value, stored, code, scale, limit, table, sign, top):
    """True when another code comes nearer, or the greatest is cut off too far."""
    slack = np.float32(SLACK) * scale
    size = abs(value)
    if scale == 0:
        return size > limit
    if code and size > slack and (value < 0) != (stored & sign != 0):
        return True
    low = (table[code - 1] + table[code]) * np.float32(0.5) * scale if code else np.float32(-1)
    high = (table[code] + table[code + 1]) * np.float32(0.5) * scale if code < top else limit
    return size < low - slack * table[code] or size > high + slack * table[min(code + 1, top)]
