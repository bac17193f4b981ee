"""Level 2 of the modes that store small floats: mxfp4, mxfp8, nvfp4, and the source's own form.

Each code is the nearest one to the source's weight, and a scale is large enough: what MLX rounds
it to, a power of two or an E4M3 number near greatest / 6 (or 448), cuts the greatest off by no more
(ml-explore/mlx, mlx/backend/cpu/quantized.cpp, fp_quantize, 0.32). Where the source's numbers are
of the mode's own kind (FP4 under mxfp4, FP8 under mxfp8) and their scales were kept, the nearest is
the source's own; where they were quantized once more, which loses without need, that is said.
"""

from __future__ import annotations

import numba
import numpy as np

from dsv4.proof.decode import MAGNITUDES, source_rows, stored_rows
from dsv4.proof.tasks import Outcome, Task
from dsv4.storage.reading import Reader

HALF_OCTAVE = 1.41422  # a power of two that is rounded in its exponent
BAD, ODD, FIRST_BAD, FIRST_ODD, WORST_AT, LOSSLESS = range(6)


def is_exact(task: Task) -> bool:
    """True where the mode can hold the source's own numbers."""
    bits = task.label["bits"]
    own = (task.what == "expert" and bits == 4) or (task.origin.dtype == "F8_E4M3" and bits == 8)
    return own and task.label["mode"] in ("mxfp4", "mxfp8", "source")


def compare_floats(task: Task, reader: Reader, outcome: Outcome, weights: int) -> None:
    """Decode and compare, some rows of about so many weights at a time."""
    exact, bits = is_exact(task), task.label["bits"]
    rows = max(1, weights // task.columns)
    for first in range(0, task.origin.shape[0], rows):
        last = min(first + rows, task.origin.shape[0])
        _, exponents, values = source_rows(task, reader, first, last)
        if (exponents == 255).any() or not np.isfinite(values).all():
            outcome.fault("source-broken", f"rows from {first}", "NaN", "numbers")
            return
        codes, scales, group = stored_rows(task, reader, first, last)
        top = MAGNITUDES[bits][-1]
        limits = top * np.float32(HALF_OCTAVE) * scales
        if task.label["mode"] == "nvfp4":
            limits = top * np.float32(1.00001) * (scales + np.maximum(scales / 16, 2.0**-10))
        answer = judge(values, codes, scales, limits.astype(np.float32), MAGNITUDES[bits],
                       bits, group)  # fmt: skip
        blame(task, outcome, first, (values, codes, scales, group), answer, exact)
    if exact and outcome.error and not outcome.faults:
        found = f"relative RMS {outcome.relative:.3%}"
        outcome.fault("quantized-again", "whole tensor", found, "the source's own codes: none")


def blame(
    task: Task, outcome: Outcome, first: int, rows: tuple, answer: tuple, exact: bool
) -> None:
    """Count what one block of rows gave, and name the first of what breaks the promise."""
    values, codes, scales, group = rows
    counts, energy, error, worst = answer
    outcome.numbers += len(values)
    outcome.groups += len(scales)
    outcome.lossless += int(counts[LOSSLESS])
    outcome.exact += int(counts[LOSSLESS]) if exact else 0
    outcome.energy += energy
    outcome.error += error

    def place(at: int) -> str:
        row, column = divmod(int(at), task.columns)
        return f"row {first + row}, column {column}"

    if worst > outcome.worst:
        outcome.worst, outcome.worst_at = worst, place(counts[WORST_AT])
    if counts[BAD]:
        at = int(counts[FIRST_BAD])
        outcome.fault("nan-or-inf", place(at), f"scale {scales[at // group]}", "numbers")
    if counts[ODD]:
        at = int(counts[FIRST_ODD])
        table, sign = MAGNITUDES[task.label["bits"]], 1 << (task.label["bits"] - 1)
        decoded = table[min(codes[at] & (sign - 1), len(table) - 1)] * scales[at // group]
        decoded = -decoded if codes[at] & sign else decoded
        name = "expert-differs" if exact else "expert-level-wrong"
        name = name if outcome.what == "expert" else "module-differs"
        wanted = f"the number nearest {values[at]:.6g}"
        found = f"{decoded:.6g}, one of {int(counts[ODD]):,} in these rows"
        outcome.fault(name, place(at), found, wanted)


def judge(values, codes, scales, limits, table, bits, group):
    """values float32 (n,), codes uint8 (n,), scales and limits float32 (n / group,), table: the
    magnitudes → (counts int64 (6,), energy, error, worst in scales). Raises nothing."""
    finite = np.isfinite(scales)
    return _judge(values, codes, scales, limits, finite, table, np.uint8(1 << (bits - 1)),
                  group)  # fmt: skip


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
            if miss != 0 and _is_odd(value, codes[i], code, scale, limits[g], table, sign, top):
                if counts[ODD] == 0:
                    counts[FIRST_ODD] = i
                counts[ODD] += 1
        counts[LOSSLESS] += same
    return counts, energy, error, worst


@numba.njit(inline="always")
def _is_odd(value, stored, code, scale, limit, table, sign, top):
    """True when another code comes nearer, or the greatest is cut off too far."""
    slack = np.float32(1e-5) * scale
    size = abs(value)
    if scale == 0:
        return size > limit
    if code and size > slack and (value < 0) != (stored & sign != 0):
        return True
    low = (table[code - 1] + table[code]) * np.float32(0.5) * scale if code else np.float32(-1)
    high = (table[code] + table[code + 1]) * np.float32(0.5) * scale if code < top else limit
    return size < low - slack * table[code] or size > high + slack * table[min(code + 1, top)]
