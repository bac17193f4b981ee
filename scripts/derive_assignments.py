"""Derive dsv4/assignments.txt: the assignments of FP4 values to 16 levels that are ever the best.

Goes through all assignments (dsv4/assignments.py), asks for many groups of 32 weights which one
leaves the least squared error, and keeps those that win: groups of normal, Laplace, Student-t and
uniform weights under both scale rules, which set the order; groups with random sets of values in
random, often very uneven, numbers; and ordinary groups whose columns count unequally, as an imatrix
has it. A maintainer's tool: no stage runs it. Takes minutes.

    .venv/bin/python scripts/derive_assignments.py [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsv4.assignments import KEPT, VALUES, every_assignment, ranges, within
from dsv4.synthetic import KINDS, RULES, random_groups

MAX = 512
HEAD = """\
# Assignments of FP4 values to the levels 0-15 that leave the least squared error for some group of
# 32 weights. After "range LEAST GREATEST" (in halves), one hexadecimal digit for each value between
# them in increasing order. The most frequent come first. Made by scripts/derive_assignments.py.
"""


def errors(counts: np.ndarray, values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Least squared error of each assignment for each group.

    counts: float64 (groups, values); values: (values,); levels: (n, values). Returns (groups, n):
    the sum of squares about the mean, less what a straight line through the levels explains.
    """
    total = counts.sum(axis=1, keepdims=True)
    first, second = counts @ levels.T, counts @ (levels**2).T
    mixed, sums = (counts * values) @ levels.T, counts @ values[:, None]
    spread = total * second - first**2
    shared = total * mixed - first * sums
    explained = np.where(spread > 0.5, shared**2 / np.maximum(spread, 0.5), 0)
    return (counts @ (values**2)[:, None]) - (sums**2 + explained) / total


def natural(rng: np.random.Generator, low: int, high: int, n: int) -> np.ndarray:
    """Counts of the values of groups with this range, among `n` groups of every kind."""
    out = []
    for kind in KINDS:
        for rule in RULES:
            groups = random_groups(rng, n, kind, rule)
            counts = (groups[:, :, None] == np.array(VALUES)).sum(axis=1)
            out += [of_range(counts, low, high), of_range(counts[:, ::-1], low, high)]
    return np.concatenate(out)


def of_range(counts: np.ndarray, low: int, high: int) -> np.ndarray:
    """The rows with this least and greatest value and an odd one between, as (n, values)."""
    first, last = VALUES.index(low), VALUES.index(high)
    inside = counts[:, first : last + 1]
    odd = inside[:, [v % 2 == 1 for v in within(low, high)]].sum(axis=1) > 0
    whole = inside.sum(axis=1) == counts.sum(axis=1)
    return inside[whole & odd & (inside[:, 0] > 0) & (inside[:, -1] > 0)].astype(np.float64)


def uneven(rng: np.random.Generator, low: int, high: int, n: int) -> np.ndarray:
    """Counts (n, values) of 32 weights: random sets of values, random shares."""
    values = np.array(within(low, high))
    present = rng.random((n, len(values))) < rng.choice([0.2, 0.4, 0.6, 0.8, 1], (n, 1))
    present[:, [0, -1]] = True
    present[np.arange(n), rng.choice(np.flatnonzero(values % 2), n)] = True
    shares = rng.gamma(rng.choice([0.1, 0.3, 1, 5], (n, 1)), size=present.shape) + 1e-12
    shares *= present / (shares * present).sum(axis=1, keepdims=True)
    counts = present + np.floor(shares * (32 - present.sum(axis=1, keepdims=True)))
    counts[np.arange(n), shares.argmax(axis=1)] += 32 - counts.sum(axis=1)
    return counts


def weighted(rng: np.random.Generator, low: int, high: int, n: int) -> np.ndarray:
    """Shares of the values when weights count as much as random numbers say, in three ways."""
    out = []
    for sharpness in (0.3, 1, 3):
        counts = natural(rng, low, high, n)
        shares = rng.gamma(sharpness * np.maximum(counts, 1e-9)) + 1e-3 * counts
        out.append(shares * (counts > 0))
    return np.concatenate(out)


def winners(counts: np.ndarray, low: int, high: int, levels: np.ndarray) -> Counter:
    """How often each assignment, by its index, is the best for these groups."""
    found: Counter = Counter()
    for part in np.array_split(counts, len(counts) // 1000 + 1):
        found.update(errors(part, np.array(within(low, high)), levels).argmin(axis=1).tolist())
    return found


def derive(low: int, high: int, rounds: int) -> np.ndarray:
    """The assignments worth keeping for one range, the most frequent first, at most MAX."""
    levels = every_assignment(within(low, high))
    rng = np.random.default_rng([-low, high])
    often, ever, unequal = Counter(), Counter(), Counter()
    for _ in tqdm(range(rounds), desc=f"{low} … {high}", disable=None):
        often += winners(natural(rng, low, high, 1000), low, high, levels)
        ever += winners(uneven(rng, low, high, 4000), low, high, levels)
        unequal += winners(weighted(rng, low, high, 500), low, high, levels)
    order = [index for index, _ in often.most_common()]
    order += [index for index, _ in ever.most_common() if index not in often]
    plain = len(order)
    order += [index for index, _ in unequal.most_common() if index not in often | ever]
    print(f"{low} … {high}: {len(levels)} assignments; {len(often)}, {plain}, {len(order)} won")
    return levels[order[:MAX]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40, help="of 36,000 groups a range")
    parser.add_argument("--out", type=Path, default=KEPT)
    args = parser.parse_args()
    lines = [HEAD]
    for low, high in ranges():
        if -low >= high:
            words = ["".join(f"{q:x}" for q in row) for row in derive(low, high, args.rounds)]
            lines.append(f"range {low} {high}\n")
            lines += [" ".join(words[i : i + 6]) + "\n" for i in range(0, len(words), 6)]
    args.out.write_text("".join(lines), encoding="ascii")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
