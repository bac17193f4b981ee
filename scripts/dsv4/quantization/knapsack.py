"""Choose one option of each item: least total cost, total size within a budget.

The multiple-choice knapsack (Sinha and Zoltners, Operations Research 27, 1979), by dynamic
programming over the sizes in units of their greatest common divisor: exact, whatever the costs. The
layers of a model have one size, so the units are large and few. With more than UNITS units a
coarser unit is taken and sizes are rounded up to it: the result is then at least as good as the
best for a budget that is smaller by one unit an item.
"""

from __future__ import annotations

import math

import numpy as np

UNITS = 50_000

Option = tuple[int, float]  # size in bytes, cost


def min_size(items: list[list[Option]]) -> int:
    """Return the least total size of one option of each item."""
    return sum(min(size for size, _ in options) for options in items)


def choose(items: list[list[Option]], budget: int) -> list[int]:
    """Return the index of each item's option. The budget must hold `min_size(items)`.

    Of equal costs the smaller size is taken.
    """
    bases = [min(size for size, _ in options) for options in items]
    more = [[size - base for size, _ in of] for of, base in zip(items, bases, strict=True)]
    room = min(budget - sum(bases), sum(map(max, more)))
    unit = math.gcd(*(size for of in more for size in of)) or 1
    unit = max(unit, -(-room // UNITS))
    best = np.zeros(room // unit + 1)
    picks = []
    for options, sizes in zip(items, more, strict=True):
        steps = [-(-size // unit) for size in sizes]
        found, pick = np.full_like(best, np.inf), np.zeros(len(best), np.int32)
        for which in sorted(range(len(options)), key=lambda k: steps[k]):
            step, cost = steps[which], options[which][1]
            tried = np.full_like(best, np.inf)
            if step < len(best):
                tried[step:] = best[: len(best) - step] + cost
            better = tried < found
            found[better], pick[better] = tried[better], which
        best = found
        picks.append((pick, steps))
    chosen, at = [], int(np.argmin(best))
    for pick, steps in reversed(picks):
        chosen.append(int(pick[at]))
        at -= steps[chosen[-1]]
    return chosen[::-1]
