"""Run an acceptance case: named requests to a served model with a time limit and a verdict.

A case returns what is wrong in one line, or "". Its requests and responses are kept. The nano is
recognised by its answer to WHO, which no other model is trained to give. Cases that a model of its
size cannot pass are skipped by name.
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
SENT, RECEIVED = 700, 1500  # characters kept of each
TOKENS = 2000  # of an answer, its reasoning included


class CaseSession:
    """Send the requests of one case within its time limit; keep them and their responses."""

    def __init__(self, endpoint: Endpoint, seconds: float, nano: bool = False) -> None:
        self.endpoint, self.deadline = endpoint, time.monotonic() + seconds
        self.limit, self.nano = seconds, nano
        self.exchanges: list[tuple[str, str]] = []

    def ask(self, prompt: str | list[dict[str, Any]], **options: Any) -> Reply:
        """Return the reply to a question or to messages; `options` are those of the protocol.

        max_tokens is TOKENS by default. An option with the value None is left out of the request.
        """
        return self._keep(ask, prompt, options)

    def stream(
        self, prompt: str | list[dict[str, Any]], most: int | None = None, **options: Any
    ) -> Reply:
        """Return the reply to a streamed request; close it after `most` reads."""
        return self._keep(stream, prompt, options, *([most] if most else []))

    def _keep(self, send: Callable[..., Reply], prompt: Any, options: dict, *more: int) -> Reply:
        is_question = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if is_question else prompt
        body = {"messages": messages, "max_tokens": TOKENS, **options}
        body = {name: value for name, value in body.items() if value is not None}
        request = prompt if is_question and not options else json.dumps(
            {"messages": prompt, **options}, ensure_ascii=False)  # fmt: skip
        received = "nothing"
        try:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise UserError(
                    self.endpoint.url, "no time left", f"all in {self.limit:g} s", "see it"
                )
            reply = send(self.endpoint, body, round(left, 1), *more)
            received = str(reply)
            return reply
        except UserError as stop:
            received = str(stop)
            raise
        finally:
            if len(self.exchanges) < KEPT:
                kept = (escape_line(request, SENT), escape_line(received, RECEIVED))
                self.exchanges.append(kept)


@dataclass(frozen=True)
class Case:
    """A case; limit in seconds; nano: whether the nano can pass.

    run: returns what is wrong, "" for nothing; raises UserError when the server gives no usable
    answer. skip: why the case cannot be run, "" when it can.
    """

    name: str
    expected: str
    limit: float
    run: Callable[[CaseSession], str] = field(repr=False)
    nano: bool = False
    skip: str = ""


@dataclass(frozen=True)
class CaseResult:
    """Verdict of a case (right, wrong or skipped), the reason, and its requests and responses."""

    name: str
    expected: str
    limit: float
    verdict: str
    why: str
    seconds: float
    exchanges: list[tuple[str, str]]


def run_case(endpoint: Endpoint, case: Case, nano: bool = False) -> CaseResult:
    """Run a case within its limit, or skip it."""
    about = (case.name, case.expected, case.limit)
    if skip := case.skip or ("" if case.nano or not nano else SMALL):
        return CaseResult(*about, "skipped", skip, 0.0, [])
    session, start = CaseSession(endpoint, case.limit, nano), time.monotonic()
    try:
        why = case.run(session)
    except UserError as stop:
        why = str(stop)
    seconds = round(time.monotonic() - start, 2)
    return CaseResult(
        *about, "wrong" if why else "right", escape_line(why, 700), seconds, session.exchanges
    )


def identify_model(endpoint: Endpoint) -> tuple[CaseResult, bool]:
    """Ask WHO. Return the result, and True when the answer is the nano's."""
    contents: list[str] = []

    def run(session: CaseSession) -> str:
        answer = session.ask(WHO).answer
        contents.append(answer.content.strip())
        return "" if answer.text else "an empty answer"

    result = run_case(endpoint, Case("answers", f"an answer to {WHO}", 180, run, True))
    return result, contents == [NANO]
