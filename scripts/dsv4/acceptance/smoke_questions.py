"""Judge the answers to two questions.

Each known fault has its own message: nothing but BOS, empty, repetition, cut off by length without
an answer, a wrong sum.
"""

from __future__ import annotations

import re
from collections import Counter

from dsv4.acceptance.client import Answer
from dsv4.model.special_tokens import BOS

MOON = "Write one sentence about the moon."
SUM = "What is 17+28?"


def common_fault(answer: Answer) -> str | None:
    """Return the fault of an answer to any question, or None."""
    words = answer.text.split()
    if not answer.text.replace(BOS, "").strip():
        if BOS in answer.text:
            return f"nothing but {BOS}: the experts are garbage; run `make verify`"
        return "empty: no token or only BOS, which some servers hide; run `make verify`"
    most = Counter(words).most_common(1)[0]
    if len(words) >= 12 and most[1] > len(words) / 2:
        return f"repetition: {most[1]} of {len(words)} words are {most[0]!r}"
    return None


def sentence_fault(answer: Answer) -> str | None:
    """Return the fault of an answer to MOON, or None."""
    if fault := common_fault(answer):
        return fault
    if answer.finish_reason != "stop":
        return f"finish_reason {answer.finish_reason!r}, expected 'stop': it does not end by itself"
    if "moon" not in answer.text.lower():
        return "words, but none about the moon"
    return None


def sum_fault(answer: Answer) -> str | None:
    """Return the fault of an answer to SUM, or None."""
    if fault := common_fault(answer):
        return fault
    if re.search(r"(?<!\d)45(?!\d)", answer.text):
        return None
    if answer.finish_reason == "length":
        return "finish_reason 'length' and no 45 anywhere: cut off without an answer"
    return "a wrong sum: no 45 in content or reasoning_content"
