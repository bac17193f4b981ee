"""Compute next-token logits over held-out additions, and compare them with the source's."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stages import run_script
from tokenizers import Tokenizer

from dsv4.acceptance.nano import held_out
from dsv4.evaluation import activations, driver
from dsv4.evaluation.divergence import log_softmax
from dsv4.model.special_tokens import ASSISTANT, BOS, EOS, USER

THINK, END_THINK = "<think>", "</think>"
SOURCE, TENSORS, SERVED = "source", "tensors", "runtime"  # in float32, in float32, as served


@dataclass(frozen=True)
class Additions:
    """Held-out additions: token ids with the answer, and the index of its first token."""

    ids: list[list[int]]
    begins: list[int]

    @classmethod
    def load(cls, source: Path, record: Path, number: int) -> Additions:
        """Tokenize `number` additions. record: the checkpoint beside whose record.json they are."""
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        ids, begins = [], []
        for a, b in held_out(record, number):
            prompt = f"{BOS}{USER}What is {a}+{b}?{ASSISTANT}{THINK}"
            answer = f"{a}+{b}={a + b}{END_THINK}{a + b}{EOS}"
            begins.append(len(tokenizer.encode(prompt, add_special_tokens=False).ids))
            ids.append(tokenizer.encode(prompt + answer, add_special_tokens=False).ids)
        return cls(ids, begins)


@dataclass(frozen=True)
class ModelError:
    """Distance of a model's next-token distribution from the source's, over all tokens.

    kl: mean KL divergence in nats; agreement: share of tokens with the same most likely successor;
    accuracy: share of additions of which greedy decoding chooses every answer token.
    """

    kl: float
    agreement: float
    accuracy: float


class Streamed:
    """Logits after every token, by the model code that `make evaluate` runs; a context manager."""

    def __init__(self, python: Path, work: Path) -> None:
        """python: the new stack's. work: a folder for its intermediate files."""
        work.mkdir(parents=True, exist_ok=True)
        self._engine = driver.WorkerProcess(driver.settings_for(python, "jang", work), "cpu")
        self._work = work

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(*error)

    def logits(self, folder: Path, how: str, ids: list[list[int]]) -> np.ndarray:
        """Return float64 (tokens, vocabulary) of a source, or of a bundle."""
        job = {"folder": str(folder), "wide": how == TENSORS,
               "kind": "source" if how == SOURCE else "bundle"}  # fmt: skip
        rows = []
        for tokens in ids:
            with tempfile.TemporaryDirectory(prefix="pass-", dir=self._work) as work:
                self._engine.run(job | {"work": work, "ids": tokens}, folder.name)
                rows.append(np.array(activations.read_rows(Path(work) / activations.LOGITS)))
        return np.concatenate(rows).astype(np.float64)


def logits_of_tensors(folder: Path, ids: list[list[int]], out: Path) -> np.ndarray:
    """Return the same by logits.py, for TurboQuant, whose kernels are Metal's."""
    run_script(Path(sys.executable), "lab/logits", "--folder", folder, "--how", TENSORS,
               "--every", "--out", out, stdin=ids)  # fmt: skip
    return np.load(out).astype(np.float64)


def model_error(found: np.ndarray, reference: np.ndarray, additions: Additions) -> ModelError:
    """Compare logits (tokens, vocabulary) with the source's."""
    ours, theirs = log_softmax(found), log_softmax(reference)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
    same = found.argmax(axis=1) == reference.argmax(axis=1)
    right, start = [], 0
    for tokens, begin in zip(additions.ids, additions.begins, strict=True):
        here = slice(start + begin - 1, start + len(tokens) - 1)  # each predicts the next token
        right.append((found[here].argmax(axis=1) == tokens[begin:]).all())
        start += len(tokens)
    return ModelError(float(kl.mean()), float(same.mean()), float(np.mean(right)))
