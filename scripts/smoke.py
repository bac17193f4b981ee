"""Ask a running server two questions and judge the answers.

The answer to "Write one sentence about the moon." must be words and stop by itself. The answer to
"What is 17+28?" must have 45 in content or reasoning_content. Each known fault has its own message:
BOS tokens only, empty, repetition, cut off by length without an answer, a wrong sum. Both requests
have a max_tokens; those of accept have none. Exit 0: both answers are right; 1: one is wrong, or no
server answers.

    .venv/bin/python scripts/smoke.py --port 8010
"""

from __future__ import annotations

import argparse

from dsv4.acceptance.client import ask_question, find_model
from dsv4.acceptance.smoke_questions import MOON, SUM, sentence_fault, sum_fault
from dsv4.errors import UserError, run
from dsv4.settings import add_setting
from dsv4.text import escape_line, short_repr
from dsv4.toolchain.server import HOST


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "PORT", default=8010)
    args = parser.parse_args()
    url = f"http://{HOST}:{args.port}"
    endpoint, wrong = find_model(url, "", ""), 0
    for question, limit, judge in ((MOON, 400, sentence_fault), (SUM, 200, sum_fault)):
        answer = ask_question(endpoint, question, limit)
        fault = judge(answer)
        wrong += fault is not None
        print(f"{'WRONG' if fault else 'right'}  {question}")
        content, reasoning = short_repr(answer.content), short_repr(answer.reasoning)
        why = escape_line(answer.finish_reason)
        print(f"       content {content}, reasoning {reasoning}, finish_reason {why}")
        if fault:
            print(f"       {escape_line(fault)}")
    if wrong:
        raise UserError(url, f"{wrong} of 2 answers wrong", "both right", "see above")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
