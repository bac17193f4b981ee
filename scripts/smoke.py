"""Ask a running server the two questions of the plan, and judge the answers.

"Write one sentence about the moon." must come back as words and end by itself; "What is 17+28?"
must have 45 in content or reasoning_content. Every known way of being wrong has its own message:
nothing but BOS, empty, repetition, cut off by length without an answer, a wrong sum. Exit 0: both
answers are right; 1: one is not, or no server answers.

    .venv/bin/python scripts/smoke.py --port 8010
"""

from __future__ import annotations

import argparse
import re
from collections import Counter

from dsv4.chat import BOS
from dsv4.server import HOST, Answer, ask
from dsv4.stop import Stop, run

MOON = "Write one sentence about the moon."
SUM = "What is 17+28?"


def common_fault(answer: Answer) -> str | None:
    """The fault of an answer whatever the question was, or None."""
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
    """What is wrong with the moon sentence, or None."""
    if fault := common_fault(answer):
        return fault
    if answer.finish_reason != "stop":
        return f"finish_reason {answer.finish_reason!r}, expected 'stop': it does not end by itself"
    if "moon" not in answer.text.lower():
        return "words, but none about the moon"
    return None


def sum_fault(answer: Answer) -> str | None:
    """What is wrong with the answer to 17 + 28, or None."""
    if fault := common_fault(answer):
        return fault
    if re.search(r"(?<!\d)45(?!\d)", answer.text):
        return None
    if answer.finish_reason == "length":
        return "finish_reason 'length' and no 45 anywhere: cut off without an answer"
    return "a wrong sum: no 45 in content or reasoning_content"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8010)
    args = parser.parse_args()
    url = f"http://{HOST}:{args.port}"
    wrong = 0
    for question, limit, judge in ((MOON, 400, sentence_fault), (SUM, 200, sum_fault)):
        answer = ask(url, question, limit)
        fault = judge(answer)
        wrong += fault is not None
        print(f"{'WRONG' if fault else 'right'}  {question}")
        print(f"       content {answer.content[:200]!r}, reasoning {answer.reasoning[:200]!r}, "
              f"finish_reason {answer.finish_reason}")  # fmt: skip
        if fault:
            print(f"       {fault}")
    if wrong:
        raise Stop(url, f"{wrong} of 2 answers wrong", "both right", "see above")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
