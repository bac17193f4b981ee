"""Cases of short questions. A right server of the nano passes all but one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dsv4.acceptance.case import Case, CaseSession
from dsv4.acceptance.client import Answer, Reply, list_models
from dsv4.acceptance.nano import held_out
from dsv4.acceptance.smoke_questions import MOON, SUM, sentence_fault, sum_fault
from dsv4.model.special_tokens import BOS, EOS
from dsv4.text import short_repr
from dsv4.toolchain.python_env import ROOT

ADDITIONS = 50
FRANCE = "What is the capital of France?"
MANY = (MOON, SUM, FRANCE, "What is 52+39?", "Hello!")
NUMBERS = 200
ALL_NUMBERS = f"Write all whole numbers from 1 to {NUMBERS} in digits, separated by commas."
COUNT = "Count from one to five hundred in words."
MARKS = ("<think>", "</think>", BOS, EOS, "<｜")


def thinking_options(on: bool, **more: Any) -> dict[str, Any]:
    """Return the options that turn thinking on or off in every server that has it."""
    return {"enable_thinking": on, "chat_template_kwargs": {"enable_thinking": on, **more}, **more}


def leaked_markers(answer: Answer) -> str:
    """Return where a marker of the chat template stands in an answer; "" for nowhere."""
    for where, text in (("content", answer.content), ("reasoning", answer.reasoning)):
        for mark in MARKS:
            if mark in text:
                return f"{mark} in {where}: {short_repr(text)}"
    return ""


def ask_additions(session: CaseSession) -> str:
    pairs = held_out(ROOT / "scripts" / "nano" / "checkpoint", ADDITIONS)
    wrong = []
    for a, b in pairs:
        answer = session.ask(f"What is {a}+{b}?").answer
        numbers = re.findall(r"\d+", answer.content.replace(",", ""))
        if numbers[-1:] != [str(a + b)] or answer.finish_reason != "stop":
            wrong.append(
                f"{a}+{b}: {short_repr(answer.content)}, {short_repr(answer.finish_reason)}"
            )
    return f"{len(wrong)} of {len(pairs)} wrong; {wrong[0]}" if wrong else ""


def lists_model(session: CaseSession) -> str:
    """Check what clients do first: GET /v1/models lists the model that is asked."""
    names = [model["id"] for model in list_models(session.endpoint)]
    if session.endpoint.model in names:
        return ""
    return f"{session.endpoint.model!r} is not listed: {short_repr(names)}"


def sentence(session: CaseSession) -> str:
    answer = session.ask(MOON).answer
    return sentence_fault(answer) or leaked_markers(answer)


def stop_word(session: CaseSession) -> str:
    answer = session.ask(FRANCE, stop=["Paris"]).answer
    if "Paris" in answer.content:
        return f"the stop word in {short_repr(answer.content)}"
    return "" if answer.finish_reason == "stop" else f"finish_reason {answer.finish_reason!r}"


def max_tokens(session: CaseSession) -> str:
    reply = session.ask(MOON, max_tokens=2)
    if reply.answer.finish_reason != "length":
        return f"finish_reason {reply.answer.finish_reason!r}"
    return f"{reply.tokens} tokens" if reply.tokens > 2 else ""


def no_max_tokens(session: CaseSession) -> str:
    """Check that an answer without max_tokens is not cut short by a server's own limit.

    The numbers take at least 399 tokens, as no token has digits and a comma. The nano is asked for
    a sentence.
    """
    answer = session.ask(MOON if session.nano else ALL_NUMBERS, max_tokens=None).answer
    if answer.finish_reason != "stop":
        reached = f"after {len(answer.text):,} characters: …{answer.text[-40:]}"
        return f"finish_reason {answer.finish_reason!r} {reached}"
    numbers = set(re.findall(r"\d+", answer.content))
    missing = [n for n in range(1, NUMBERS + 1) if f"{n}" not in numbers]
    if session.nano or not missing:
        return ""
    return f"{len(missing)} of {NUMBERS} numbers missing, first {missing[0]}"


def thinks(session: CaseSession) -> str:
    answer = session.ask(SUM, **thinking_options(True)).answer
    return (
        sum_fault(answer)
        or leaked_markers(answer)
        or ("" if answer.reasoning.strip() else "no reasoning")
    )


def thinks_not(session: CaseSession) -> str:
    answer = session.ask(SUM, **thinking_options(False)).answer
    if answer.reasoning.strip():
        return f"reasoning {short_repr(answer.reasoning)}"
    return sum_fault(answer) or leaked_markers(answer)


def effort_options(name: str) -> Callable[[CaseSession], str]:
    """Return a case's run with that effort; DeepSeek-V4's encodings have high and max."""

    def run(session: CaseSession) -> str:
        answer = session.ask(SUM, **thinking_options(True, reasoning_effort=name)).answer
        return sum_fault(answer) or leaked_markers(answer)

    return run


def first_difference(a: Reply, b: Reply) -> str:
    """Return both answers to one request when they differ, else ""."""
    return "" if a.answer == b.answer else f"{a} and then {b}"


def twice(session: CaseSession) -> str:
    return first_difference(session.ask(MOON), session.ask(MOON))


def streamed(session: CaseSession) -> str:
    whole, pieces = session.ask(MOON), session.stream(MOON)
    return first_difference(whole, pieces) or (
        "" if pieces.whole else "a stream that does not end in [DONE]"
    )


def among_others(session: CaseSession) -> str:
    alone = [session.ask(question) for question in MANY]
    with ThreadPoolExecutor(len(MANY)) as pool:
        together = list(pool.map(session.ask, MANY))
    found = [first_difference(*pair) for pair in zip(alone, together, strict=True)]
    return next((f"{q}: {fault}" for q, fault in zip(MANY, found, strict=True) if fault), "")


def cancelled(session: CaseSession) -> str:
    session.stream(COUNT, most=1, max_tokens=500)
    answer = session.ask(SUM).answer
    return sum_fault(answer) or ("" if len(answer.content) < 500 else "the answer that was left")


CASES = (
    Case("models", "GET /v1/models lists the model", 60, lists_model, True),
    Case("additions", f"{ADDITIONS} exact, each with finish_reason stop", 600, ask_additions, True),
    Case("sentence", "a sentence about the moon that ends by itself", 120, sentence, True),
    Case("stop-word", "the answer ends before Paris, finish_reason stop", 60, stop_word, True),
    Case("max-tokens", "two tokens, finish_reason length", 60, max_tokens, True),
    Case("no-max-tokens", "an answer to its end, all 200 numbers", 600, no_max_tokens, True),
    Case("thinking-on", "45, reasoning of its own, no mark in either", 180, thinks, True),
    Case("thinking-off", "45 without reasoning", 60, thinks_not, True),
    Case("effort-high", "45, with reasoning_effort high", 180, effort_options("high"), True),
    Case("effort-max", "45, with reasoning_effort max", 300, effort_options("max")),
    Case("twice", "the same answer again", 120, twice, True),
    Case("streamed", "the same answer as a stream, ended by [DONE]", 120, streamed, True),
    Case("among-others", "each of five at once as when alone", 300, among_others, True),
    Case("cancelled", "45, after a request that was left in its middle", 120, cancelled, True),
)  # fmt: skip
