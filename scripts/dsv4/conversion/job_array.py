"""Divide the shards of a bundle among the processes of a job array."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.settings import InvalidValue


@dataclass(frozen=True)
class JobPart:
    """The `k`-th of `n` disjoint sets of shards, k from 1.

    whole: a run without --part, which makes all shards and completes index and config.
    """

    k: int = 1
    n: int = 1
    whole: bool = True

    def select(self, files: list[str]) -> list[str]:
        """Return the names of the shards of this part, sorted."""
        return sorted(files)[self.k - 1 :: self.n]

    def lock_key(self, work: str) -> tuple[int, int, str] | None:
        """Return the `part` argument of `locks.locked`: None locks the whole folder.

        work: a text that all parts of one job have in common.
        """
        return None if self.whole else (self.k, self.n, work)

    @property
    def message(self) -> str:
        """The text for the user after a part: the runs that are left; "" after a whole run."""
        if self.whole:
            return ""
        return "when all parts are done, run once without --part: it completes index and config"


def parse_part(text: str) -> JobPart:
    """Read K/N. Raises InvalidValue unless 1 ≤ K ≤ N."""
    k, slash, n = text.partition("/")
    short = len(text) < 12 and slash and k.isdecimal() and n.isdecimal()
    if not (short and 1 <= int(k) <= int(n)):
        raise InvalidValue(text, "K/N with 1 ≤ K ≤ N")
    return JobPart(int(k), int(n), whole=False)
