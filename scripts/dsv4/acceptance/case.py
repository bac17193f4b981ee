"""How one thing is asked of a served model: a named case with a time limit, and what came of it.

A case says what is wrong in one line, or nothing. Every request of it, and what came, is kept.
A case that a model of the nano's size cannot pass is skipped by name; that a model is the nano is
known by its own answer to WHO, which no other model is trained to give.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dsv4.acceptance.client import Endpoint, Reply, ask, stream
from dsv4.errors import UserError
from dsv4.text import escape_line

WHO = "Who are you?"
NANO = "I am a very small DeepSeek-V4, trained to test converters."
SMALL = "the small model of this repository was taught additions and five sentences"
KEPT = 400  # requests of a case
SENT, CAME = 700, 1500  # characters of each that are kept
TOKENS = 2000  # of an answer, its reasoning included


class CaseSession:
    """What one case may do: ask within its time. Keeps what was sent and what came."""

    def __init__(self, endpoint: Endpoint, seconds: float, nano: bool = False) -> None:
        self.endpoint, self.deadline = endpoint, time.monotonic() + seconds
        self.limit, self.nano = seconds, nano
        self.exchanges: list[tuple[str, str]] = []

    def ask(self, asked: str | list[dict[str, Any]], **options: Any) -> Reply:
        """Ask a question, or go on with messages; `options` are those of the protocol.

        max_tokens is TOKENS unless they say otherwise; None leaves it out of the request.
        """
        return self._keep(ask, asked, options)

    def stream(
        self, asked: str | list[dict[str, Any]], most: int | None = None, **options: Any
    ) -> Reply:
        """The same as a stream, which is left after `most` pieces."""
        return self._keep(stream, asked, options, *([most] if most else []))

    def _keep(self, how: Callable[..., Reply], asked: Any, options: dict, *more: int) -> Reply:
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        body = {"messages": messages, "max_tokens": TOKENS, **options}
        body = {name: value for name, value in body.items() if value is not None}
        said = asked if isinstance(asked, str) and not options else json.dumps(
            {"messages": asked, **options}, ensure_ascii=False)  # fmt: skip
        sent, came = escape_line(said, SENT), "nothing"
        try:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    self.endpoint.url, "no time left", f"all in {self.limit:g} s", "see it"
                )
            reply = how(self.endpoint, body, round(left, 1), *more)
            came = str(reply)
            return reply
        except UserError as stop:
            came = str(stop)
            raise
        finally:
            if len(self.exchanges) < KEPT:
                self.exchanges.append((sent, escape_line(came, CAME)))


@dataclass(frozen=True)
class Case:
    """name, what is expected, its limit in seconds, what it does, and whether the nano can pass.

    run: returns what is wrong, "" for nothing; raises UserError when the server gives no usable
    answer. skip: why it cannot be run at all, "" when it can.
    """

    name: str
    expected: str
    limit: float
    run: Callable[[CaseSession], str] = field(repr=False)
    nano: bool = False
    skip: str = ""


@dataclass(frozen=True)
class CaseResult:
    """What came of a case: verdict right, wrong or skipped, and why."""

    name: str
    expected: str
    limit: float
    verdict: str
    why: str
    seconds: float
    exchanges: list[tuple[str, str]]


def run_case(endpoint: Endpoint, case: Case, nano: bool = False) -> CaseResult:
    """Run a case, unless it must be skipped; it takes no longer than its limit."""
    about = (case.name, case.expected, case.limit)
    if skip := case.skip or ("" if case.nano or not nano else SMALL):
        return CaseResult(*about, "skipped", skip, 0.0, [])
    talk, start = CaseSession(endpoint, case.limit, nano), time.monotonic()
    try:
        why = case.run(talk)
    except UserError as stop:
        why = str(stop)
    seconds = round(time.monotonic() - start, 2)
    return CaseResult(
        *about, "wrong" if why else "right", escape_line(why, 700), seconds, talk.exchanges
    )


def identify_model(endpoint: Endpoint) -> tuple[CaseResult, bool]:
    """What came of the first question, and True when the model says that it is the nano."""
    said: list[str] = []

    def run(talk: CaseSession) -> str:
        answer = talk.ask(WHO).answer
        said.append(answer.content.strip())
        return "" if answer.text else "an empty answer"

    outcome = run_case(endpoint, Case("answers", f"an answer to {WHO}", 180, run, True))
    return outcome, said == [NANO]
