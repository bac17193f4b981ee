"""Runs of zeros, as a download manager leaves them: found where the model has none.

Catches: a hole that is missed because of where it begins, a run that is named and is none, a source
with a hole, or with a tensor of nothing but zeros, that is converted without a word.
"""

import random

import numpy as np

from dsv4.storage.zeros import zero_run


def runs(data: np.ndarray, least: int) -> list[int]:
    """Where runs of at least `least` zeros begin, found byte by byte."""
    found, length = [], 0
    for i, byte in enumerate([*data.tolist(), 1]):
        if byte == 0:
            length += 1
        else:
            if length >= least:
                found.append(i - length)
            length = 0
    return found


def test_a_run_is_found_wherever_it_begins():
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(400):
        data = rng.integers(0, 3, int(rng.integers(1, 6000))).astype(np.uint8)
        at = int(rng.integers(0, len(data)))
        data[at : at + int(rng.integers(0, 3000))] = 0
        least = int(rng.choice([1, 2, 7, 8, 9, 100, 512, 1000]))
        found, wanted = zero_run(data, least), runs(data, least)
        assert found in wanted if wanted else found is None, (least, found, wanted)
