"""Brute force: the best of any list of assignments for any number of groups, all of them tried.

The walk (walk.py) goes through all 4,000 to 6,000 assignments of a range in 1 to 2 µs a group.
"""

from __future__ import annotations

import numpy as np

from dsv4.weights import walk
from dsv4.weights.assignments import VALUES


class Search:
    """Tries assignments of one range, int64 (n, values from `low` to `high`), on groups."""

    def __init__(self, rows: np.ndarray, low: int, high: int) -> None:
        """Assignments that give all values one level are left out: they never win."""
        self._inside = slice(VALUES.index(low), VALUES.index(high) + 1)
        wide = np.zeros((len(rows), len(VALUES)), np.int64)
        wide[:, self._inside] = rows
        steps, start = walk.walk_through(_near(wide[rows[:, -1] > 0]))
        self._levels = np.zeros((len(steps.rows), 16), np.float32)
        self._levels[:, : len(VALUES)] = steps.rows
        last = VALUES.index(high)
        changes = steps.places, steps.deltas, steps.squares
        self._walk = self._levels, *changes, 0, start, len(steps.places), last

    def best(self, packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For groups, packed as int64 (n, 2): the assignments (n, values) that leave the least
        squared error with real scales and biases, and these errors, float64 (n,), in halves."""
        found, sums = np.empty(len(packed), np.int32), np.empty((7, len(packed)))
        for at in range(0, len(packed), walk.GROUPS):
            now = slice(at, at + walk.GROUPS)
            whole, sums[:, now] = walk.go(np.ascontiguousarray(packed[now].T), *self._walk)
            found[now] = whole[0]
        first, second, mixed, values, squares = sums[:5]
        spread, shared = 32 * second - first**2, 32 * mixed - first * values
        explained = np.where(spread > 0, shared**2 / np.maximum(spread, 1), 0)
        rows = self._levels[found, self._inside]
        return rows.astype(np.int64), (32 * squares - values**2 - explained) / 32


def _near(rows: np.ndarray) -> np.ndarray:
    """The rows, each followed by the one of those left that differs from it in fewest places."""
    left, order = np.ones(len(rows), bool), [0]
    for _ in rows[1:]:
        left[order[-1]] = False
        order.append(int(((rows != rows[order[-1]]).sum(axis=1) + 99 * ~left).argmin()))
    return rows[order]
