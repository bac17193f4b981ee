"""What a client of OpenAI's chat completions sends and reads, whole or as a stream.

Nothing that the server says is believed before it has its form, and the key is in no text: it is
taken out of what comes, as a server may send it back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dsv4.errors import UserError
from dsv4.storage.checkpoint import parse_json
from dsv4.text import escape_line, join_some, short_repr
from dsv4.toolchain.server import (
    ANSWER,
    LM_NAME,
    TEXT,
    Answer,
    http_exchange,
    parse_answer_text,
    served_name,
)

COUNT = (int, None)
LIMITS = ("max_model_len", "context_length", "context_window", "max_context_length")
MODELS = {"data": [{"id": str, **{f"{name}?": COUNT for name in LIMITS}}]}
USAGE = ({"prompt_tokens?": COUNT, "completion_tokens?": COUNT}, None)
CALL = {"id?": TEXT, "function": {"name": str, "arguments": str}}
CALLS = ([CALL], None)
MESSAGE = {**ANSWER["choices"][0]["message"], "tool_calls?": CALLS}
WHOLE = {"choices": [{"message": MESSAGE, "finish_reason?": TEXT}], "usage?": USAGE}
DELTA = {"content?": TEXT, "reasoning_content?": TEXT, "reasoning?": TEXT}
CHUNK = {"choices": [{"delta?": (DELTA, None), "finish_reason?": TEXT}], "usage?": USAGE}
PIECES = 200_000  # of a stream: 2,000 tokens take 2,000


@dataclass(frozen=True)
class Endpoint:
    """A served model. most: tokens that it announces to take, 0 when it announces nothing."""

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    most: int = 0


@dataclass(frozen=True)
class Reply:
    """What came: the answer, calls of tools (id, name, arguments), and tokens, 0 when untold.

    first, seconds: from the request to the first text and to the end; of a stream only the first.
    whole: a stream that ended with [DONE].
    """

    answer: Answer
    calls: tuple[tuple[str, str, str], ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    whole: bool = True

    def __str__(self) -> str:
        asked = [call[1:] for call in self.calls]  # without its number, which is any
        calls = f", tool_calls {short_repr(asked)}" if asked else ""
        content, thought = (
            escape_line(repr(t), 600) for t in (self.answer.content, self.answer.reasoning)
        )
        why = short_repr(self.answer.finish_reason)
        return f"content {content}, reasoning {thought}, finish_reason {why}{calls}"


class HttpStatusError(UserError):
    """Another status than 200."""

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(url, f"HTTP {status}: {said}", "200", "read the server's log")
        self.status = status


def api_key(name: str) -> str:
    """The key in the environment variable `name`, "" without one. Raises UserError when it is
    none."""
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(name, "blanks or characters that no header takes", "a key", "set it again")
    return key


def find_model(url: str, name: str, key: str, setting: str = "MODEL_NAME") -> Endpoint:
    """The model `name` at `url`, or the one that is served there when no name is given.

    Raises UserError when no server answers, when it lists models but not this one, and when it
    lists several and none was named.
    """
    here = Endpoint(url, name, key)
    most = {one["id"]: max(one.get(limit) or 0 for limit in LIMITS) for one in _models(here)}
    if name and most and name not in most:
        raise UserError(setting, short_repr(name), f"one of {join_some(most)}", f"{setting}=…")
    if not name and not (name := served_name(list(most))):
        if len(most) > 1:
            raise UserError(url, f"several models: {join_some(most)}", "one", f"{setting}=…")
        name = next(iter(most), LM_NAME)
    return replace(here, model=name, most=max(0, most.get(name, 0)))


def _models(here: Endpoint) -> list[dict[str, Any]]:
    """What a server lists; [] when it has no list, or, as mlx_lm without a hub's cache, a void."""
    try:
        data = _send(here, "GET", "/v1/models", "", 30)
    except HttpStatusError as refused:
        if refused.status != 404:
            raise
        return []
    return parse_json(data, f"{here.url}: its models", MODELS)["data"] if data.strip() else []


def ask(endpoint: Endpoint, body: dict[str, Any], seconds: float) -> Reply:
    """The answer to a request, in one piece. Raises UserError when there is none in `seconds`."""
    start = time.monotonic()
    data = _send(endpoint, "POST", "/v1/chat/completions", _request_body(endpoint, body), seconds)
    value = parse_json(data, f"{endpoint.url}: its answer", WHOLE)
    answer = parse_answer_text(value, endpoint.url)
    calls = [(one.get("id") or "", one["function"]["name"], one["function"]["arguments"])
             for one in value["choices"][0]["message"].get("tool_calls") or []]  # fmt: skip
    usage = value.get("usage") or {}
    return Reply(
        answer,
        tuple(calls),
        usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0,
        seconds=time.monotonic() - start,
    )  # fmt: skip


def stream(endpoint: Endpoint, body: dict[str, Any], seconds: float, most: int = PIECES) -> Reply:
    """The same as a stream, which this side leaves after `most` pieces. Raises UserError as
    `ask`."""
    start, came = time.monotonic(), []

    def hear(piece: bytes) -> bool:
        came.append((time.monotonic() - start, piece))
        return len(came) < most

    asked = _request_body(
        endpoint, {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    data = _send(endpoint, "POST", "/v1/chat/completions", asked, seconds, hear)
    if data.lstrip()[:1] in (b"{", b"<"):
        raise UserError(
            endpoint.url, escape_line(data[:200]), "a stream of events", "read the server's log"
        )
    return _join_events(came, endpoint, time.monotonic() - start)


def _join_events(came: list[tuple[float, bytes]], endpoint: Endpoint, seconds: float) -> Reply:
    texts: dict[str, list[str]] = {"content": [], "reasoning": []}
    reason, usage, first, tokens, whole = "", {}, 0.0, 0, False
    for when, data in _events(came, endpoint.key):
        if data == b"[DONE]":
            whole = True
            continue
        chunk = parse_json(data, f"{endpoint.url}: a piece of its stream", CHUNK)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"][:1]:
            delta = choice.get("delta") or {}
            reason = choice.get("finish_reason") or reason
            content = delta.get("content") or ""
            thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
            if content or thought:
                first, tokens = first or when, tokens + 1
            texts["content"].append(content)
            texts["reasoning"].append(thought)
    answer = Answer("".join(texts["content"]), "".join(texts["reasoning"]), reason)
    counted = usage.get("completion_tokens") or tokens
    return Reply(answer, (), usage.get("prompt_tokens") or 0, counted, first, seconds, whole)


def _events(came: list[tuple[float, bytes]], key: str) -> Iterator[tuple[float, bytes]]:
    """The data of each event, and when its line was whole (seconds)."""
    rest = bytearray()
    for when, piece in came:
        rest += piece
        if b"\n" in piece:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield when, _redacted(bytes(line[5:].strip()), key)


def _request_body(endpoint: Endpoint, body: dict[str, Any]) -> str:
    return json.dumps({"model": endpoint.model, "temperature": 0, **body})


def _redacted(data: bytes, key: str) -> bytes:
    return data.replace(key.encode(), b"[key]") if key else data


def _send(endpoint: Endpoint, method: str, path: str, body: str, seconds: float,
          hear: Any = None) -> bytes:  # fmt: skip
    """The body of an answer with status 200. Raises UserError for another, and for a page of
    HTML."""
    url = endpoint.url
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    status, data = http_exchange(url, method, path, body, seconds, headers, hear)
    data = _redacted(data, endpoint.key)
    said = escape_line(data[:400].decode(errors="replace"), 400)
    if status != 200:
        raise HttpStatusError(url, status, said)
    if data.lstrip()[:1] == b"<":
        raise UserError(url, f"a page: {said}", "JSON", "check URL: is that a server of models?")
    return data
