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

from dsv4.storage.safetensors_file import NUMPY_DTYPE
from dsv4.storage.tensor_reader import TensorReader, as_float32
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import source_rows
from dsv4.verification.numbers.tasks import Task, TensorResult

SEED = 42  # of the signs
POINTS, ROUNDS = 10_000, 200  # of the grid on which levels are found
ODD_CODE, ODD_NORM, FIRST_CODE, FIRST_NORM = range(4)
SLACK = 1e-4  # of 1 / √d, the size of an element: float32 in another order errs by less


@cache
def rotation_signs(columns: int) -> np.ndarray:
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


def compare_turbo(task: Task, reader: TensorReader, result: TensorResult, weights: int) -> None:
    """Rotate the source's rows and compare, some rows of about so many weights at a time."""
    packed, norms = task.parts["tq_packed"], task.parts["tq_norms"]
    bits, columns = task.label["bits"], task.columns
    check_tq_bits(task, reader, result)
    rows = max(1, weights // columns)
    for first in range(0, packed.shape[0], rows):
        last = min(first + rows, packed.shape[0])
        _, exponents, values = source_rows(task, reader, first, last)
        if (exponents == 255).any() or not np.isfinite(values).all():
            result.add_fault("source-broken", f"rows from {first}", "NaN or Inf", "numbers")
            return
        words = reader.rows(packed, first, last).view(np.uint32)
        lengths = as_float32(reader.rows(norms, first, last), norms.dtype)
        if not np.isfinite(lengths).all():
            where = f"row {first + int(np.argmin(np.isfinite(lengths)))}"
            result.add_fault("nan-or-inf", where, "norm NaN or Inf", "numbers")
            return
        codes = unpack_codes(words, bits, last - first, columns)
        counts, energy, error, exact, worst, worst_at = _judge(
            values, rotation_signs(columns), codes, lengths, codebook(columns, bits)
        )
        if worst > result.worst:
            row, column = divmod(int(worst_at), columns)
            result.worst = worst
            result.worst_at = f"row {first + row}, rotated column {column}"
        result.numbers += len(values)
        result.groups += len(lengths)
        result.exact += exact
        result.energy += energy
        result.error += error
        report_first_mismatch(task, result, first, counts, lengths)


def check_tq_bits(task: Task, reader: TensorReader, result: TensorResult) -> None:
    """What tq_bits says is how the codes are packed."""
    tensor = task.parts.get("tq_bits")
    if tensor is not None and tensor.dtype[0] in "IU":
        found = int(reader.read(tensor).view(NUMPY_DTYPE[tensor.dtype])[0])
        if found != task.label["bits"]:
            result.add_fault("label-bits-wrong", "tq_bits", f"{found}", f"{task.label['bits']}")


def report_first_mismatch(
    task: Task, result: TensorResult, first: int, counts: np.ndarray, lengths: np.ndarray
) -> None:
    """Name the first code and the first norm that break the promise."""
    if counts[ODD_CODE]:
        row, column = divmod(int(counts[FIRST_CODE]), task.columns)
        result.add_fault("expert-level-wrong", f"row {first + row}, rotated column {column}",
                      f"another level, one of {counts[ODD_CODE]:,} in these rows",
                      "the nearest level")  # fmt: skip
    if counts[ODD_NORM]:
        row = int(counts[FIRST_NORM])
        result.add_fault("expert-beyond-bound", f"row {first + row}",
                      f"norm {lengths[row]:.6g}, one of {counts[ODD_NORM]:,} in these rows",
                      "the row's")  # fmt: skip


# Sums may be taken in any order: the compiler may make vector code of a loop.
_FAST = {"reassoc", "contract"}


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def rotate(row):
    """Orthonormal Walsh-Hadamard of float32 (d,), in place: by powers of two, the largest first."""
    start, rest = 0, len(row)
    while rest:
        block = 1
        while 2 * block <= rest:
            block *= 2
        part = row[start : start + block]
        half = _eights(part)
        while 4 * half <= block:
            _fours(part, half)
            half *= 4
        while half < block:
            _twos(part, half)
            half *= 2
        size = np.float32(1.0 / math.sqrt(block))
        for i in range(block):
            part[i] *= size
        start += block
        rest -= block


@numba.njit(inline="always")
def _eights(part):
    """The first three steps at one go, over neighbours; returns how far apart the next ones are."""
    for at in range(0, len(part) // 8 * 8, 8):
        a, b, c, d = part[at], part[at + 1], part[at + 2], part[at + 3]
        e, f, g, h = part[at + 4], part[at + 5], part[at + 6], part[at + 7]
        a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
        a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
        part[at], part[at + 1], part[at + 2], part[at + 3] = a + e, b + f, c + g, d + h
        part[at + 4], part[at + 5], part[at + 6], part[at + 7] = a - e, b - f, c - g, d - h
    return 8 if len(part) >= 8 else 1


@numba.njit(inline="always")
def _fours(part, half):
    """Two steps at one go, over elements `half` apart."""
    for at in range(0, len(part), 4 * half):
        first, second = part[at : at + half], part[at + half : at + 2 * half]
        third, fourth = part[at + 2 * half : at + 3 * half], part[at + 3 * half : at + 4 * half]
        for i in range(half):
            a, b, c, d = first[i], second[i], third[i], fourth[i]
            a, b, c, d = a + b, a - b, c + d, c - d
            first[i], second[i], third[i], fourth[i] = a + c, b + d, a - c, b - d


@numba.njit(inline="always")
def _twos(part, half):
    """One step, over elements `half` apart."""
    for at in range(0, len(part), 2 * half):
        first, second = part[at : at + half], part[at + half : at + 2 * half]
        for i in range(half):
            first[i], second[i] = first[i] + second[i], first[i] - second[i]


def unpack_codes(words: np.ndarray, bits: int, rows: int, columns: int) -> np.ndarray:
    """32 // bits codes of each word uint32, the lowest first → uint8 (rows, columns)."""
    each = 32 // bits
    codes = np.empty((len(words), each), np.uint8)
    if 32 % bits == 0:
        kernels.unpack(words.view(np.uint8), bits, codes.reshape(-1))
    else:
        shifts = bits * np.arange(each, dtype=np.uint32)
        np.bitwise_and(words[:, None] >> shifts, (1 << bits) - 1, codes, casting="unsafe")
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _judge(values, signs, codes, lengths, levels):
    """values float32 (rows · columns,), codes uint8 (rows, columns), lengths float32 (rows,)."""
    counts = np.zeros(4, np.int64)
    energy, error, exact = 0.0, 0.0, 0
    columns = len(signs)
    worst, worst_at = 0.0, 0
    widest = np.max(levels[1:] - levels[:-1])
    miss = np.empty(columns, np.float32)
    row = np.empty(columns, np.float32)
    for r in range(len(lengths)):
        given = values[columns * r : columns * (r + 1)]
        total = np.float32(0)
        for i in range(columns):
            row[i] = given[i] * signs[i]
        rotate(row)
        for i in range(columns):
            total += row[i] * row[i]
        energy += total
        norm = math.sqrt(total)
        step = math.ldexp(1.0, max(math.frexp(norm)[1] - 11, -24)) if norm > 0 else 0.0
        if abs(lengths[r] - norm) > 1.51 * step:
            if counts[ODD_NORM] == 0:
                counts[FIRST_NORM] = r
            counts[ODD_NORM] += 1
        odd, missed, far = _row_errors(row, codes[r], levels, max(norm, 1e-10), lengths[r], miss)
        error += missed
        if far > worst * widest * lengths[r]:
            worst, worst_at = far / (widest * lengths[r]), columns * r + _largest_at(miss, far)
        if odd:  # or as near as sums in another order tell
            odd, first = _count_not_nearest(row, codes[r], levels, max(norm, 1e-10))
            if odd and counts[ODD_CODE] == 0:
                counts[FIRST_CODE] = columns * r + first
            counts[ODD_CODE] += odd
        exact += odd == 0
    return counts, energy, error, exact, worst, worst_at


@numba.njit(inline="always")
def _row_errors(row, codes, levels, norm, length, miss):
    """How many codes of a row do not name the nearest level; of the errors, which `miss` gets, the
    sum of squares and the largest.
    """
    near = np.zeros(len(row), np.int32)
    for code in range(1, len(levels)):
        middle = np.float32((levels[code - 1] + levels[code]) / 2 * norm)
        for i in range(len(row)):
            near[i] += np.int32(row[i] > middle)
    decoded = levels * length
    odd, error = np.int32(0), np.float32(0)
    for i in range(len(row)):
        odd += np.int32(near[i] != np.int32(codes[i]))
        miss[i] = row[i] - decoded[codes[i]]
        error += miss[i] * miss[i]
    return odd, error, kernels.largest(miss)


@numba.njit(inline="always")
def _largest_at(miss, far):
    """Where the largest error is."""
    for i in range(len(miss)):
        if abs(miss[i]) == far:
            return i
    return 0


@numba.njit(inline="always")
def _count_not_nearest(row, codes, levels, norm):
    """How many codes name a level that is not the nearest by more than some slack; the first."""
    slack, odd, first = SLACK / math.sqrt(len(row)), 0, 0
    for i in range(len(row)):
        code, y = codes[i], row[i] / norm
        low = (levels[code - 1] + levels[code]) / 2 if code > 0 else -np.inf
        high = (levels[code] + levels[code + 1]) / 2 if code + 1 < len(levels) else np.inf
        if y < low - slack or y > high + slack:
            first = first if odd else i
            odd += 1
    return odd, first
