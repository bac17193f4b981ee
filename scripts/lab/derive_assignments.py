"""Derive assignments.txt of dsv4/weights/: which FP4 values to which of 16 levels, ever the best.

For each range of values, all assignments (assignments.py beside it) are tried on many groups of 32
weights, and of the best ones so many are kept that none of these groups loses more than 0.2%:
- plain: groups of normal, Laplace, Student-t and uniform weights under both scale rules, and groups
  with random sets of values in random, very uneven numbers;
- weighted: ordinary groups whose columns count unequally, as an imatrix has it: what ever wins.
An adversary then climbs: it changes codes of some thousand groups at random and keeps what raises
the loss against all assignments. What it finds above 0.5% is added, until it finds nothing in
several runs from new groups. That is a search, not a proof.

Each section is put in an order in which few levels change from one assignment to the next. A
maintainer's tool: no stage runs it. About 10 minutes of one core, which all cores share.

    .venv/bin/python scripts/lab/derive_assignments.py [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import rooms  # noqa: F401
from tqdm import tqdm

from dsv4.weights.assignments import KEPT, SECTIONS, VALUES, every_assignment, ranges, within
from dsv4.weights.brute_force import Search
from dsv4.weights.synthetic import KINDS, RULES, pack, random_groups

MAX = 512  # of one range
ENOUGH, TOLERANCE = 0.002, 0.005  # loss at which a sample's groups, and the adversary's, are left
CALM = 4  # runs in which the adversary finds nothing, before it gives up
CLIMBERS, CLIMB = 3000, 200  # groups, and changes of each, in one run of the adversary
HEAD = """\
# Assignments of FP4 values to the levels 0-15 that leave the least squared error for some group of
# 32 weights. After "range LEAST GREATEST" (in halves), one hexadecimal digit for each value between
# them in increasing order; then what groups need too whose columns count unequally. Neighbours
# differ in few digits. Made by scripts/lab/derive_assignments.py.
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


def groups_of(counts: np.ndarray, low: int, high: int) -> np.ndarray:
    """Counts (n, values) of 32 weights → groups int64 (n, 32) in halves."""
    values = np.tile(within(low, high), len(counts))
    return values.repeat(counts.astype(np.int64).reshape(-1)).reshape(-1, 32)


def packed(groups: np.ndarray) -> np.ndarray:
    return pack(groups).view(np.int64)


def loss(kept: np.ndarray, words: np.ndarray, best: np.ndarray, low: int, high: int) -> np.ndarray:
    """How much more than the least error `best` the kept assignments leave, relative to it."""
    return Search(kept, low, high).best(words)[1] / np.maximum(best, 1e-9) - 1


def cover(
    kept: list[tuple[int, ...]], words: np.ndarray, every: Search, low: int, high: int
) -> list[tuple[int, ...]]:
    """`kept` and as many winners as these groups need to lose no more than ENOUGH."""
    rows, best = every.best(words)
    kept = kept or [tuple(rows[0])]
    while True:
        over = loss(np.array(kept), words, best, low, high) > ENOUGH
        if not over.any():
            return kept
        needed = Counter(map(tuple, rows[over].tolist()))
        kept = kept + [row for row, _ in needed.most_common(4)]


def climb(
    kept: np.ndarray, groups: np.ndarray, every: Search, low: int, high: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Groups (n, 32), changed at random while that raises their loss; returns them and the losses.

    A change moves some weights to another value; the range and an odd value stay.
    """
    mine, values, n = Search(kept, low, high), np.array(within(low, high)), len(groups)
    groups, lost, every_one = groups.copy(), np.full(n, -1.0), np.arange(n)
    for turn in range(CLIMB):
        tried = groups.copy()
        for _ in range(rng.integers(1, 4) if turn else 0):
            to, places = values[rng.integers(len(values), size=n)], rng.integers(32, size=n)
            if rng.random() < 0.3:  # all that are alike
                alike = tried == tried[every_one, places][:, None]
                tried = np.where(alike, to[:, None], tried)
            else:
                tried[every_one, places] = to
        counts = (tried[:, :, None] == values).sum(axis=1)
        fits = (counts[:, 0] > 0) & (counts[:, -1] > 0)
        fits &= (counts[:, values % 2 == 1] > 0).any(axis=1)
        words = packed(tried)
        new = mine.best(words)[1] / np.maximum(every.best(words)[1], 1e-6) - 1
        better = fits & (new >= lost)
        groups[better], lost[better] = tried[better], new[better]
    return groups, lost


def close(
    kept: list[tuple[int, ...]], every: Search, low: int, high: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """`kept` and what the adversary shows to be lacking."""
    calm, found = 0, []
    while calm < CALM:
        counts = np.concatenate([uneven(rng, low, high, 30000), natural(rng, low, high, 2000)])
        groups = groups_of(counts[rng.integers(len(counts), size=CLIMBERS)], low, high)
        groups, lost = climb(np.array(kept), groups, every, low, high, rng)
        found.append(f"{lost.max():.3f}")
        calm = calm + 1 if lost.max() <= TOLERANCE else 0
        words = packed(groups[lost > TOLERANCE])
        rows, best = every.best(words)
        while len(words) and (lost := loss(np.array(kept), words, best, low, high)).max() > 0.004:
            kept = [*kept, tuple(rows[lost.argmax()].tolist())]
    print(f"{low} … {high}: worst losses that the adversary found, run by run:", *found)
    return kept


def tour(rows: list[tuple[int, ...]]) -> np.ndarray:
    """The assignments in an order in which few levels change: nearest neighbours, then 2-opt."""
    if not rows:
        return np.empty((0, 0), np.int64)
    array = np.array(rows)
    apart = np.pad((array[:, None] != array).sum(axis=2), (0, 1))  # the last one: no assignment
    order, left = [0], set(range(1, len(rows)))
    while left:
        order.append(min(left, key=lambda i: (apart[order[-1], i], i)))
        left.remove(order[-1])
    order, better = [len(rows), *order, len(rows)], True
    while better:
        better = False
        for i in range(len(rows)):
            for j in range(i + 2, len(rows) + 1):
                a, b, c, d = order[i], order[i + 1], order[j], order[j + 1]
                if apart[a, c] + apart[b, d] < apart[a, b] + apart[c, d]:
                    order[i + 1 : j + 1] = order[i + 1 : j + 1][::-1]
                    better = True
    return array[order[1:-1]]


def derive(low: int, high: int, rounds: int) -> list[np.ndarray]:
    """The assignments worth keeping for one range: plain and weighted ones."""
    levels = every_assignment(within(low, high))
    every, rng = Search(levels, low, high), np.random.default_rng([-low, high])
    plain: list[tuple[int, ...]] = []
    unequal: Counter = Counter()
    for _ in tqdm(range(rounds), desc=f"{low} … {high}", disable=None):
        for counts in natural(rng, low, high, 10000), uneven(rng, low, high, 30000):
            plain = cover(plain, packed(groups_of(counts, low, high)), every, low, high)
        unequal += winners(weighted(rng, low, high, 1000), low, high, levels)
    plain = close(plain, every, low, high, rng)
    rest = [tuple(levels[index].tolist()) for index, _ in unequal.most_common()]
    rest = [row for row in rest if row not in set(plain)][: MAX - len(plain)]
    print(f"{low} … {high}: {len(levels)} assignments; kept {len(plain)} and {len(rest)}")
    return [tour(plain), tour(rest)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="of 190,000 groups")
    parser.add_argument("--out", type=Path, default=KEPT)
    args = parser.parse_args()
    lines = [HEAD]
    pairs = [(low, high) for low, high in ranges() if -low >= high]
    with ProcessPoolExecutor() as pool:
        found = pool.map(derive, *zip(*pairs, strict=True), [args.rounds] * len(pairs))
        for (low, high), sections in zip(pairs, found, strict=True):
            lines.append(f"range {low} {high}\n")
            for name, rows in zip(SECTIONS, sections, strict=True):
                words = ["".join(f"{level:x}" for level in row) for row in rows]
                lines.append(f"{name}\n")
                lines += [" ".join(words[i : i + 6]) + "\n" for i in range(0, len(words), 6)]
    args.out.write_text("".join(lines), encoding="ascii")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
