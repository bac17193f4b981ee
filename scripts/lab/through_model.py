"""One model through a runtime or by its tensors, and how far its next-token distribution is."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import locations  # noqa: F401
import numpy as np
from tokenizers import Tokenizer

from dsv4.acceptance.nano import held_out
from dsv4.evaluation import activations, driver
from dsv4.evaluation.divergence import log_softmax
from dsv4.model.special_tokens import ASSISTANT, BOS, EOS, USER
from dsv4.toolchain.python_env import call_script, script_command

THINK, END_THINK = "<think>", "</think>"
ALONE = "run it alone to see why"
SOURCE, TENSORS, SERVED = "source", "tensors", "runtime"  # in float32, in float32, as served


@dataclass(frozen=True)
class ModelError:
    """Over held-out additions: KL divergence from the source's next-token distribution in nats, a
    mean over all tokens and over the answers' tokens; share of tokens with the same most likely
    successor; share of additions whose every answer token would be chosen greedily."""

    source: str
    quantizer: str
    how: str
    kl: float
    kl_answers: float
    agreement: float
    accuracy: float


def stage(name: str, *arguments: object) -> None:
    """Run one stage's script. Raises UserError when it fails."""
    command = script_command(Path(sys.executable), name, *arguments)
    call_script(command, f"stage {name}", ALONE)


def lessons(source: Path, record: Path, number: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of held-out additions with their answers, and where each answer begins."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids, begins = [], []
    for a, b in held_out(record, number):
        prompt = f"{BOS}{USER}What is {a}+{b}?{ASSISTANT}{THINK}"
        answer = f"{a}+{b}={a + b}{END_THINK}{a + b}{EOS}"
        begins.append(len(tokenizer.encode(prompt, add_special_tokens=False).ids))
        ids.append(tokenizer.encode(prompt + answer, add_special_tokens=False).ids)
    return ids, begins


class Streamed:
    """Logits after every token, by the model code that `make evaluate` runs; a context manager."""

    def __init__(self, python: Path, work: Path) -> None:
        """python: the new stack's. work: a folder that its passes may use."""
        work.mkdir(parents=True, exist_ok=True)
        self._engine = driver.WorkerProcess(driver.settings_for(python, "jang", work), "cpu")
        self._work = work

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(*error)

    def logits(self, folder: Path, how: str, ids: list[list[int]]) -> np.ndarray:
        """float64 (tokens, vocabulary) of a source, or of a bundle, in float32 or as served."""
        job = {"folder": str(folder), "wide": how == TENSORS,
               "kind": "source" if how == SOURCE else "bundle"}  # fmt: skip
        rows = []
        for tokens in ids:
            with tempfile.TemporaryDirectory(prefix="pass-", dir=self._work) as work:
                self._engine.run(job | {"work": work, "ids": tokens}, folder.name)
                rows.append(np.array(activations.read_rows(Path(work) / activations.LOGITS)))
        return np.concatenate(rows).astype(np.float64)


def every_logit(
    python: Path, folder: Path, how: str, ids: list[list[int]], out: Path
) -> np.ndarray:
    """The same by logits.py, for bundles that jang's own model cannot run."""
    command = script_command(python, "lab/logits", "--folder", folder, "--how", how)
    call_script(
        [*command, "--every", "--out", str(out)], f"logits of {folder}", ALONE, json.dumps(ids)
    )
    return np.load(out).astype(np.float64)


def model_error(
    found: np.ndarray, reference: np.ndarray, ids: list[list[int]], begins: list[int]
) -> tuple[float, float, float, float]:
    """(KL, KL in answers, agreement, accuracy) of logits (tokens, vocabulary), as ModelError."""
    ours, theirs = log_softmax(found), log_softmax(reference)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
    same = found.argmax(axis=1) == reference.argmax(axis=1)
    right, inside, start = [], np.zeros(len(kl), bool), 0
    for tokens, begin in zip(ids, begins, strict=True):
        here = slice(start + begin - 1, start + len(tokens) - 1)  # each predicts the next token
        right.append((found[here].argmax(axis=1) == tokens[begin:]).all())
        inside[here] = True
        start += len(tokens)
    return float(kl.mean()), float(kl[inside].mean()), float(same.mean()), float(np.mean(right))
