"""A share of the work: one job, several processes on one folder, each with shards of its own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class JobPart:
    """The `k`-th of `n` disjoint sets of shards, k from 1; 1/1 is all of them.

    whole: no part at all, which also completes index and config.
    """

    k: int = 1
    n: int = 1
    whole: bool = True

    def select(self, files: list[str]) -> list[str]:
        """Which of the shards, sorted by name, belong to this part."""
        return sorted(files)[self.k - 1 :: self.n]

    def lock_key(self, work: str) -> tuple[int, int, str] | None:
        """What `locks.held` is to hold: the part of some `work`, None for the whole folder."""
        return None if self.whole else (self.k, self.n, work)

    @property
    def message(self) -> str:
        """What is still to be done after a part; "" after a whole run."""
        if self.whole:
            return ""
        return "when all parts are done, run once without --part: it completes index and config"


def parse_part(text: str) -> JobPart:
    """Read K/N. Raises argparse.ArgumentTypeError unless 1 ≤ K ≤ N."""
    k, slash, n = text.partition("/")
    short = len(text) < 12 and slash and k.isdecimal() and n.isdecimal()
    if not (short and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 ≤ K ≤ N")
    return JobPart(int(k), int(n), whole=False)
