"""Level 2 of TurboQuant (JANGTQ): rotated rows, each weight the nearest level of a fixed codebook.

A row of d weights is multiplied by fixed signs, rotated by an orthonormal Walsh-Hadamard transform
and divided by its norm; its elements are then distributed as one coordinate of a point on the unit
sphere, and a code names the Lloyd-Max level of that distribution nearest to one of them. Rotations
keep distances, so that the error is measured there, and nothing is rotated back. The promise: each
code names the nearest level, so that a weight between the outermost levels lies half a step from
its own at most (a step being the widest gap of the codebook, times the norm), each norm is the
row's within a step of F16 (sums in another order move it so far), and tq_bits says how many bits a
code has. Signs and codebook are made here once more, by code of its own: others judge others.

After what jang_tools writes (jang_tools.turboquant, jang_tools.dsv4.convert_dsv4_jangtq, 2.5.50).
"""

from __future__ import annotations

import math
from functools import cache

import numba
import numpy as np

from dsv4.proof.decode import source_rows
from dsv4.proof.tasks import Outcome, Task
from dsv4.storage.reading import Reader, as_float32
from dsv4.storage.shard import NUMPY_DTYPE

SEED = 42  # of the signs
POINTS, ROUNDS = 10_000, 200  # of the grid on which levels are found
ODD_CODE, ODD_NORM, FIRST_CODE, FIRST_NORM = range(4)
SLACK = 1e-4  # of 1 / √d, the size of an element: float32 in another order errs by less


@cache
def signs(columns: int) -> np.ndarray:
    """float32 (columns,), ±1."""
    return np.random.default_rng(SEED).choice([-1.0, 1.0], size=columns).astype(np.float32)


@cache
def codebook(columns: int, bits: int) -> np.ndarray:
    """The levels, float32 (2^bits,), rising: Lloyd-Max on the grid for the density
    (1 - x²)^((d - 3) / 2) of a coordinate of a random unit vector in d dimensions."""
    grid = np.linspace(-1.0, 1.0, POINTS)
    constant = math.lgamma(columns / 2) - 0.5 * math.log(math.pi) - math.lgamma((columns - 1) / 2)
    density = np.exp(constant + (columns - 3) / 2 * np.log(np.maximum(1 - grid**2, 1e-30)))
    density /= np.trapezoid(density, grid)
    levels = np.linspace(-3 / math.sqrt(columns), 3 / math.sqrt(columns), 1 << bits)
    for _ in range(ROUNDS):
        edges = np.searchsorted(grid, (levels[1:] + levels[:-1]) / 2)
        cells = zip((0, *edges), (*edges, POINTS), strict=True)
        new = np.array([centroid(grid[a:b], density[a:b], old)
                        for (a, b), old in zip(cells, levels, strict=True)])  # fmt: skip
        if np.allclose(levels, new, atol=1e-10):
            break
        levels = new
    return np.sort(levels).astype(np.float32)


def centroid(grid: np.ndarray, density: np.ndarray, old: float) -> float:
    """The mean of a cell by its own points; its old level where there is at most one."""
    if len(grid) < 2:
        return old
    return np.trapezoid(grid * density, grid) / max(np.trapezoid(density, grid), 1e-10)


def compare_turbo(task: Task, reader: Reader, outcome: Outcome, weights: int) -> None:
    """Rotate the source's rows and compare, some rows of about so many weights at a time."""
    packed, norms = task.parts["tq_packed"], task.parts["tq_norms"]
    bits, columns = task.label["bits"], task.columns
    check_bits(task, reader, outcome)
    rows = max(1, weights // columns)
    for first in range(0, packed.shape[0], rows):
        last = min(first + rows, packed.shape[0])
        _, exponents, values = source_rows(task, reader, first, last)
        if (exponents == 255).any():
            outcome.fault("source-broken", f"rows from {first}", "exponent 255", "numbers")
            return
        words = reader.rows(packed, first, last).view(np.uint32)
        lengths = as_float32(reader.rows(norms, first, last), norms.dtype)
        if not np.isfinite(lengths).all():
            where = f"row {first + int(np.argmin(np.isfinite(lengths)))}"
            outcome.fault("nan-or-inf", where, "norm NaN or Inf", "numbers")
            return
        counts, energy, error, exact, worst, worst_at = _judge(
            values, signs(columns), words, lengths, codebook(columns, bits), bits, columns
        )
        if worst > outcome.worst:
            row, column = divmod(int(worst_at), columns)
            outcome.worst = worst
            outcome.worst_at = f"row {first + row}, rotated column {column}"
        outcome.numbers += len(values)
        outcome.groups += len(lengths)
        outcome.exact += exact
        outcome.energy += energy
        outcome.error += error
        blame(task, outcome, first, counts, lengths)


def check_bits(task: Task, reader: Reader, outcome: Outcome) -> None:
    """What tq_bits says is how the codes are packed."""
    tensor = task.parts.get("tq_bits")
    if tensor is not None and tensor.dtype[0] in "IU":
        found = int(reader.read(tensor).view(NUMPY_DTYPE[tensor.dtype])[0])
        if found != task.label["bits"]:
            outcome.fault("label-bits-wrong", "tq_bits", f"{found}", f"{task.label['bits']}")


def blame(
    task: Task, outcome: Outcome, first: int, counts: np.ndarray, lengths: np.ndarray
) -> None:
    """Name the first code and the first norm that break the promise."""
    if counts[ODD_CODE]:
        row, column = divmod(int(counts[FIRST_CODE]), task.columns)
        outcome.fault("expert-level-wrong", f"row {first + row}, rotated column {column}",
                      f"another level, one of {counts[ODD_CODE]:,} in these rows",
                      "the nearest level")  # fmt: skip
    if counts[ODD_NORM]:
        row = int(counts[FIRST_NORM])
        outcome.fault("expert-beyond-bound", f"row {first + row}",
                      f"norm {lengths[row]:.6g}, one of {counts[ODD_NORM]:,} in these rows",
                      "the row's")  # fmt: skip


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def rotate(row):
    """Orthonormal Walsh-Hadamard of float32 (d,), in place: by powers of two, the largest first."""
    start, rest = 0, len(row)
    while rest:
        block = 1
        while 2 * block <= rest:
            block *= 2
        part = row[start : start + block]
        half = 1
        while half < block:
            for at in range(0, block, 2 * half):
                for i in range(at, at + half):
                    a, b = part[i], part[i + half]
                    part[i], part[i + half] = a + b, a - b
            half *= 2
        size = np.float32(1.0 / math.sqrt(block))
        for i in range(block):
            part[i] *= size
        start += block
        rest -= block


@numba.njit(nogil=True, cache=True)
def _judge(values, signs, words, lengths, levels, bits, columns):
    counts = np.zeros(4, np.int64)
    energy, error, exact = 0.0, 0.0, 0
    worst, worst_at = 0.0, 0
    widest = np.max(levels[1:] - levels[:-1])
    each, mask = 32 // bits, (1 << bits) - 1
    width = (columns + each - 1) // each
    slack = SLACK / math.sqrt(columns)
    row = np.empty(columns, np.float32)
    for r in range(len(lengths)):
        for i in range(columns):
            row[i] = values[columns * r + i] * signs[i]
        rotate(row)
        total = 0.0
        for i in range(columns):
            total += np.float64(row[i]) * np.float64(row[i])
        energy += total
        norm = math.sqrt(total)
        step = math.ldexp(1.0, max(math.frexp(norm)[1] - 11, -24)) if norm > 0 else 0.0
        if abs(lengths[r] - norm) > 1.51 * step:
            if counts[ODD_NORM] == 0:
                counts[FIRST_NORM] = r
            counts[ODD_NORM] += 1
        odd = 0
        for i in range(columns):
            code = (words[width * r + i // each] >> np.uint32(bits * (i % each))) & mask
            y = row[i] / max(norm, 1e-10)
            low = (levels[code - 1] + levels[code]) / 2 if code else -np.inf
            high = (levels[code] + levels[code + 1]) / 2 if code < mask else np.inf
            if y < low - slack or y > high + slack:
                if counts[ODD_CODE] == 0:
                    counts[FIRST_CODE] = columns * r + i
                counts[ODD_CODE] += 1
                odd += 1
            miss = np.float64(row[i]) - np.float64(levels[code]) * np.float64(lengths[r])
            error += miss * miss
            if abs(miss) > worst * widest * lengths[r]:
                worst, worst_at = abs(miss) / (widest * lengths[r]), columns * r + i
        exact += odd == 0
    return counts, energy, error, exact, worst, worst_at
