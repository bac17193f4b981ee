"""Questions to the nano model, and the accepted distance of its logits to the source's.

The additions are held out of its training; scripts/nano/record.json lists them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from dsv4.errors import UserError
from dsv4.model.special_tokens import ASSISTANT, BOS, USER
from dsv4.storage.checkpoint import read_json
from dsv4.toolchain.python_env import call_script, script_command

# Bounds for a right bundle. Relative L2 distances measured by tests/test_nano_faults.py: .025 for a
# right one, .063 for 3-bit experts, .068 for one dead expert, .097 for 2-bit, more for others.
MAX_DISTANCE = 0.05
MIN_EXACT = 49
QUESTIONS = 50


@dataclass(frozen=True)
class Logits:
    """Logits compared with a reference: cosine, relative L2 distance, share of equal argmax."""

    cosine: float
    distance: float
    agreement: float


def held_out(source: Path, number: int) -> list[tuple[int, int]]:
    """Return `number` additions (a, b), evenly spread over those held out of the training."""
    path = source.parent / "record.json"
    pairs = [text.partition("+") for text in str(read_json(path).get("held_out", "")).split()]
    if len(pairs) < number:
        raise UserError(f"{path}", f"{len(pairs)} held-out additions", f"{number}", "restore it")
    return [(int(a), int(b)) for a, _, b in pairs[:: len(pairs) // number][:number]]


def token_prompts(source: Path, additions: list[tuple[int, int]]) -> list[list[int]]:
    """Return token ids of prompts that end inside the answer, one for each addition.

    They end before the first digit, the second, and so on in turn.
    """
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    texts = [
        f"{BOS}{USER}What is {a}+{b}?{ASSISTANT}<think>{a}+{b}={str(a + b)[: i % len(str(a + b))]}"
        for i, (a, b) in enumerate(additions)
    ]
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def run_logits(
    python: Path, folder: Path, how: str, ids: list[list[int]], work: Path
) -> np.ndarray:
    """Return logits (prompts, vocabulary) by logits.py in the toolchain's Python."""
    out = work / f"logits-{folder.name}-{how}.npy"
    command = script_command(python, "lab/logits", "--folder", folder, "--how", how, "--out", out)
    call_script(command, f"logits of {folder}", "check the toolchain: make check", json.dumps(ids))
    return np.load(out)


def compare(found: np.ndarray, reference: np.ndarray) -> Logits:
    """Compare logits (prompts, vocabulary); those with a NaN have infinite distance."""
    if not np.isfinite(found).all():
        return Logits(float("nan"), float("inf"), 0.0)
    cosine = (found * reference).sum(1) / np.linalg.norm(found, axis=1)
    cosine = float((cosine / np.linalg.norm(reference, axis=1)).mean())
    distance = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
    agreement = float((found.argmax(1) == reference.argmax(1)).mean())
    return Logits(cosine, distance, agreement)
