"""Compare TurboQuant (JANGTQ) experts: rotated rows, coded by the levels of a fixed codebook.

A row of d weights is multiplied by fixed signs, rotated by an orthonormal Walsh-Hadamard transform
and divided by its norm. Its elements are then distributed as one coordinate of a point on the unit
sphere, and each code is the index of the nearest Lloyd-Max level of that distribution. Rotations
keep distances, so that the error is measured on rotated rows. Checked are: each code is that of the
nearest level, so that a weight between the outermost levels is at most half a step from its level
(a step is the widest gap of the codebook, times the norm); each norm is the row's within a step of
F16 (sums in another order differ so far); tq_bits is the number of bits of a code. Signs and
codebook are computed here independently of the quantizer.

The format is that of jang_tools 2.5.50 (jang_tools.turboquant,
jang_tools.dsv4.convert_dsv4_jangtq).
"""

from __future__ import annotations

import math
from functools import cache

import numba
import numpy as np

from dsv4.storage.safetensors_file import NUMPY_DTYPE
from dsv4.storage.tensor_reader import TensorReader, as_float32
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import source_blocks
from dsv4.verification.numbers.tasks import Task, TensorResult

SEED = 42  # of the signs
POINTS, ROUNDS = 10_000, 200  # points of the grid for the levels, and iterations at most
# Indices of the counts that `_compare_rows` returns.
WRONG_CODES, WRONG_NORMS, FIRST_CODE, FIRST_NORM = range(4)
SLACK = 1e-4  # of 1 / √d, an element's magnitude: float32 sums in another order differ by less


@cache
def rotation_signs(columns: int) -> np.ndarray:
    """Return the signs of a row: float32 (columns,), ±1."""
    return np.random.default_rng(SEED).choice([-1.0, 1.0], size=columns).astype(np.float32)


@cache
def codebook(columns: int, bits: int) -> np.ndarray:
    """Return the levels, float32 (2^bits,), in rising order.

    Lloyd-Max on a grid, for the density (1 - x²)^((d - 3) / 2) of a coordinate of a random unit
    vector in d dimensions.
    """
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
    """Return the mean of a cell over its points; its old level if it has fewer than two."""
    if len(grid) < 2:
        return old
    return np.trapezoid(grid * density, grid) / max(np.trapezoid(density, grid), 1e-10)


def compare_turbo(task: Task, reader: TensorReader, result: TensorResult, weights: int) -> None:
    """Rotate the source's rows and compare, in blocks of rows of about `weights` weights."""
    packed, norms = task.parts["tq_packed"], task.parts["tq_norms"]
    bits, columns = task.label["bits"], task.columns
    check_tq_bits(task, reader, result)
    for first, last, values in source_blocks(task, reader, weights, result):
        words = reader.rows(packed, first, last).view(np.uint32)
        lengths = as_float32(reader.rows(norms, first, last), norms.dtype)
        if not np.isfinite(lengths).all():
            where = f"row {first + int(np.argmin(np.isfinite(lengths)))}"
            result.add_fault("nan-or-inf", where, "norm NaN or Inf", "numbers")
            return
        codes = unpack_codes(words, bits, last - first, columns)
        counts, energy, error, exact, worst, worst_at = _compare_rows(
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
        report_first_faults(task, result, first, counts, lengths)


def check_tq_bits(task: Task, reader: TensorReader, result: TensorResult) -> None:
    """Check that tq_bits is the number of bits of a packed code."""
    tensor = task.parts.get("tq_bits")
    if tensor is not None and tensor.dtype[0] in "IU":
        found = int(reader.read(tensor).view(NUMPY_DTYPE[tensor.dtype])[0])
        if found != task.label["bits"]:
            result.add_fault("label-bits-wrong", "tq_bits", f"{found}", f"{task.label['bits']}")


def report_first_faults(
    task: Task, result: TensorResult, first: int, counts: np.ndarray, lengths: np.ndarray
) -> None:
    """Report the first wrong code and the first wrong norm of a block of rows."""
    if counts[WRONG_CODES]:
        row, column = divmod(int(counts[FIRST_CODE]), task.columns)
        result.add_fault("expert-level-wrong", f"row {first + row}, rotated column {column}",
                      f"another level, one of {counts[WRONG_CODES]:,} in these rows",
                      "the nearest level")  # fmt: skip
    if counts[WRONG_NORMS]:
        row = int(counts[FIRST_NORM])
        result.add_fault("expert-beyond-bound", f"row {first + row}",
                      f"norm {lengths[row]:.6g}, one of {counts[WRONG_NORMS]:,} in these rows",
                      "the row's")  # fmt: skip


# Sums may be taken in any order, so that the compiler may vectorize loops.
_FAST = {"reassoc", "contract"}


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def rotate(row):
    """Transform float32 (d,) in place: orthonormal Walsh-Hadamard by blocks of powers of two.

    The largest block comes first.
    """
    start, rest = 0, len(row)
    while rest:
        block = 1
        while 2 * block <= rest:
            block *= 2
        values = row[start : start + block]
        half = _eights(values)
        while 4 * half <= block:
            _fours(values, half)
            half *= 4
        while half < block:
            _twos(values, half)
            half *= 2
        size = np.float32(1.0 / math.sqrt(block))
        for i in range(block):
            values[i] *= size
        start += block
        rest -= block


@numba.njit(inline="always")
def _eights(x):
    """Do the first three steps at once, on eight neighbours; return the next step's distance."""
    for at in range(0, len(x) // 8 * 8, 8):
        a, b, c, d = x[at], x[at + 1], x[at + 2], x[at + 3]
        e, f, g, h = x[at + 4], x[at + 5], x[at + 6], x[at + 7]
        a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
        a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
        x[at], x[at + 1], x[at + 2], x[at + 3] = a + e, b + f, c + g, d + h
        x[at + 4], x[at + 5], x[at + 6], x[at + 7] = a - e, b - f, c - g, d - h
    return 8 if len(x) >= 8 else 1


@numba.njit(inline="always")
def _fours(x, half):
    """Do two steps at once, on elements `half` apart."""
    for at in range(0, len(x), 4 * half):
        first, second = x[at : at + half], x[at + half : at + 2 * half]
        third, fourth = x[at + 2 * half : at + 3 * half], x[at + 3 * half : at + 4 * half]
        for i in range(half):
            a, b, c, d = first[i], second[i], third[i], fourth[i]
            a, b, c, d = a + b, a - b, c + d, c - d
            first[i], second[i], third[i], fourth[i] = a + c, b + d, a - c, b - d


@numba.njit(inline="always")
def _twos(x, half):
    """Do one step, on elements `half` apart."""
    for at in range(0, len(x), 2 * half):
        first, second = x[at : at + half], x[at + half : at + 2 * half]
        for i in range(half):
            first[i], second[i] = first[i] + second[i], first[i] - second[i]


def unpack_codes(words: np.ndarray, bits: int, rows: int, columns: int) -> np.ndarray:
    """Unpack words uint32, 32 // bits codes each, the lowest first → uint8 (rows, columns)."""
    each = 32 // bits
    codes = np.empty((len(words), each), np.uint8)
    if 32 % bits == 0:
        kernels.unpack(words.view(np.uint8), bits, codes.reshape(-1))
    else:
        shifts = bits * np.arange(each, dtype=np.uint32)
        np.bitwise_and(words[:, None] >> shifts, (1 << bits) - 1, codes, casting="unsafe")
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])


@numba.njit(nogil=True, cache=True, fastmath=_FAST)
def _compare_rows(values, signs, codes, lengths, levels):
    """Rotate rows and compare their codes and norms.

    values float32 (rows · columns,), codes uint8 (rows, columns), lengths float32 (rows,): the
    stored norms. Returns (counts int64 (4,), energy, error, rows without a fault, worst, worst_at).
    """
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
            if counts[WRONG_NORMS] == 0:
                counts[FIRST_NORM] = r
            counts[WRONG_NORMS] += 1
        wrong, missed, far = _row_errors(row, codes[r], levels, max(norm, 1e-10), lengths[r], miss)
        error += missed
        if far > worst * widest * lengths[r]:
            worst, worst_at = far / (widest * lengths[r]), columns * r + _index_of_error(miss, far)
        if wrong:  # count again, with slack for sums in another order
            wrong, first = _count_not_nearest(row, codes[r], levels, max(norm, 1e-10))
            if wrong and counts[WRONG_CODES] == 0:
                counts[FIRST_CODE] = columns * r + first
            counts[WRONG_CODES] += wrong
        exact += wrong == 0
    return counts, energy, error, exact, worst, worst_at


@numba.njit(inline="always")
def _row_errors(row, codes, levels, norm, length, miss):
    """Return the number of codes that are not the nearest, and the errors' squares and maximum.

    Writes the errors to `miss`.
    """
    near = np.zeros(len(row), np.int32)
    for code in range(1, len(levels)):
        middle = np.float32((levels[code - 1] + levels[code]) / 2 * norm)
        for i in range(len(row)):
            near[i] += np.int32(row[i] > middle)
    decoded = levels * length
    wrong, error = np.int32(0), np.float32(0)
    for i in range(len(row)):
        wrong += np.int32(near[i] != np.int32(codes[i]))
        miss[i] = row[i] - decoded[codes[i]]
        error += miss[i] * miss[i]
    return wrong, error, kernels.largest(miss)


@numba.njit(inline="always")
def _index_of_error(miss, far):
    """Return the index of the error of magnitude `far`; faster than np.argmax(np.abs(miss))."""
    for i in range(len(miss)):
        if abs(miss[i]) == far:
            return i
    return 0


@numba.njit(inline="always")
def _count_not_nearest(row, codes, levels, norm):
    """Return the number of codes that are not the nearest, with some slack, and the first one."""
    slack, wrong, first = SLACK / math.sqrt(len(row)), 0, 0
    for i in range(len(row)):
        code, y = codes[i], row[i] / norm
        low = (levels[code - 1] + levels[code]) / 2 if code > 0 else -np.inf
        high = (levels[code] + levels[code + 1]) / 2 if code + 1 < len(levels) else np.inf
        if y < low - slack or y > high + slack:
            first = first if wrong else i
            wrong += 1
    return wrong, first
