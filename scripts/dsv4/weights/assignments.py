"""Which FP4 value of a group goes to which of 16 levels: all ways that can be the best one.

An affine group of 4 bits is a lattice of 16 points, bias + level · scale. Where the lattice lies
decides which level is nearest to each value, and that assignment decides the best lattice, by least
squares. So the optimum over all lattices is the best of finitely many assignments.

Values are counted in halves here: E2M1's 15 values are the whole numbers in VALUES. The border
between level k and k + 1 passes through a value u where bias = u - (k + 1/2) · scale: a line in the
plane of scales and biases. 15 such lines for each value cut the plane into cells, and one cell is
one assignment. `every_assignment` walks through all cells in whole numbers: some 4,000 to 6,000 for
each range of values. About 100 of them or fewer are needed for 32 weights, some more where columns
count unequally: they stand in assignments.txt, which derive_assignments.py makes and tries against
all of them.

A group needs none of this when its values lie on a lattice of 16 points anyway: `exact_step`.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np

VALUES = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
LEVELS = 16
SECTIONS = ("plain", "weighted")
KEPT = Path(__file__).with_name("assignments.txt")


def exact_step(values: list[int]) -> int:
    """The step of a 16-point lattice through all of `values` (sorted), or 0 if there is none.

    >>> exact_step([-12, 3, 12]), exact_step([-12, 1, 12]), exact_step([5])
    (3, 0, 1)
    """
    step = math.gcd(*(value - values[0] for value in values)) or 1
    return step if values[-1] - values[0] <= (LEVELS - 1) * step else 0


def ranges() -> list[tuple[int, int]]:
    """The (least, greatest) pairs of groups that no lattice holds: both even, 16 or more apart."""
    return [
        (low, high)
        for low in VALUES
        for high in VALUES
        if high - low >= LEVELS and not exact_step([v for v in VALUES if low <= v <= high])
    ]


def within(low: int, high: int) -> list[int]:
    """The values from `low` to `high`."""
    return [value for value in VALUES if low <= value <= high]


def every_assignment(values: list[int]) -> np.ndarray:
    """All assignments of `values` to levels that some scale > 0 and bias make the nearest.

    Returns int64 (n, len(values)), sorted, the least level of each moved to 0: a shift changes
    nothing but the bias. Exact: corners of cells have scale 2 · (difference of two values) / (of
    two odd numbers), and between two neighbouring such scales the order of the lines is fixed.
    """
    borders = np.arange(1, 2 * LEVELS - 1, 2)  # 2k + 1
    corners = {
        (2 * up // math.gcd(2 * up, across), across // math.gcd(2 * up, across))
        for up in range(1, values[-1] - values[0] + 1)
        for across in range(2, 2 * LEVELS - 2, 2)
    }
    ordered = sorted(corners, key=lambda corner: corner[0] / corner[1])
    between = [(1, 2 * LEVELS**2)]  # a scale before the first corner, one in each gap, one after
    between += [(a + c, b + d) for (a, b), (c, d) in pairwise(ordered)]
    between.append((ordered[-1][0] + 1, ordered[-1][1]))
    found = [_along(np.array(values), borders, up, across) for up, across in between]
    return np.unique(np.concatenate(found), axis=0)


def _along(values: np.ndarray, borders: np.ndarray, up: int, across: int) -> np.ndarray:
    """The assignments at scale up / across, for every bias; everything times 4 · across."""
    lines = 4 * across * values[:, None] - 2 * up * borders[None, :]
    cuts = np.unique(lines)
    middles = (cuts[1:] + cuts[:-1]) // 2
    biases = np.concatenate([[cuts[0] - 1], middles, [cuts[-1] + 1]])
    levels = (lines[None] > biases[:, None, None]).sum(axis=2)
    return np.unique(levels - levels.min(axis=1, keepdims=True), axis=0)


@cache
def kept_sections() -> dict[tuple[int, int], list[np.ndarray]]:
    """Range → the assignments in assignments.txt, one int64 (n, values) for each of SECTIONS.

    The file has ranges that reach further down than up; the others are their mirror images.
    """
    kept: dict[tuple[int, int], list[list[list[int]]]] = {}
    for line in KEPT.read_text(encoding="ascii").splitlines():
        if line.startswith("range"):
            low, high = map(int, line.split()[1:])
            sections = kept[low, high] = []
        elif line in SECTIONS:
            sections.append([])
        elif line and not line.startswith("#"):
            sections[-1] += [[int(digit, 16) for digit in word] for word in line.split()]
    out = {
        (low, high): [np.array(rows).reshape(-1, len(within(low, high))) for rows in sections]
        for (low, high), sections in kept.items()
    }
    for (low, high), sections in list(out.items()):
        if low != -high:
            out[-high, -low] = [mirrored(rows) for rows in sections]
    return out


def kept_assignments() -> dict[tuple[int, int], np.ndarray]:
    """Range → all assignments in assignments.txt, int64 (n, values), section after section."""
    return {pair: np.concatenate(sections) for pair, sections in kept_sections().items()}


def mirrored(rows: np.ndarray) -> np.ndarray:
    """The same assignments for the values with their signs changed."""
    return (rows.max(axis=1, keepdims=True) - rows)[:, ::-1]
