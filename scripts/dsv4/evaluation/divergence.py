"""Compute the divergence of a bundle's next-token distributions from its source's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv4.evaluation.activations import LOGITS, read_rows

ROWS = 64  # of the logits, taken together


@dataclass(frozen=True)
class Distributions:
    """For each token but the last, shape (tokens - 1,).

    bundle, source: negative log-likelihood of the next token, float64. kl: KL divergence of the
    bundle from the source in nats, float64. same: whether both have the same most likely token.
    """

    bundle: np.ndarray
    source: np.ndarray
    kl: np.ndarray
    same: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 log-probabilities of logits (tokens, vocabulary)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(bundle: Path, source: Path, ids: list[int]) -> Distributions:
    """Compare the logits in the folders of two passes."""
    parts = zip(*_logit_rows(bundle, source, np.array(ids[1:])), strict=True)
    return Distributions(*(np.concatenate(part) for part in parts))


def _logit_rows(
    bundle: Path, source: Path, following: np.ndarray
) -> Iterator[tuple[np.ndarray, ...]]:
    ours, theirs = read_rows(bundle / LOGITS), read_rows(source / LOGITS)
    for first in range(0, len(following), ROWS):
        some = slice(first, min(first + ROWS, len(following)))
        q, p = log_softmax(ours[some]), log_softmax(theirs[some])
        at = np.arange(len(q)), following[some]
        kl = (np.exp(p) * (p - q)).sum(axis=1)
        yield -q[at], -p[at], kl, q.argmax(axis=1) == p.argmax(axis=1)
