"""Client of OpenAI's chat completions: whole answers, streams, and the list of models.

Every response is validated before it is used. The API key is removed from whatever a server sends
back, so that it stands in no text.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dsv4.errors import UserError
from dsv4.storage.checkpoint import parse_json
from dsv4.text import escape_line, join_some, short_repr
from dsv4.toolchain.server import LM_NAME, served_name

TEXT, COUNT = (str, None), (int, None)
LIMITS = ("max_model_len", "context_length", "context_window", "max_context_length")
MODELS = {"data": [{"id": str, **{f"{name}?": COUNT for name in LIMITS}}]}
USAGE = ({"prompt_tokens?": COUNT, "completion_tokens?": COUNT}, None)
CALLS = ([{"id?": TEXT, "function": {"name": str, "arguments": str}}], None)
DELTA = {"content?": TEXT, "reasoning_content?": TEXT, "reasoning?": TEXT}
MESSAGE = {**DELTA, "tool_calls?": CALLS}
COMPLETION = {"choices": [{"message": MESSAGE, "finish_reason?": TEXT}], "usage?": USAGE}
CHUNK = {"choices": [{"delta?": (DELTA, None), "finish_reason?": TEXT}], "usage?": USAGE}
STREAM_READS = 200_000  # of a stream: 2,000 tokens take 2,000
RESPONSE_BYTES = 4 << 20  # 1,000 tokens take 10 KB
LOG = "read the server's log"


@dataclass(frozen=True)
class Endpoint:
    """A served model. most: context length that it announces in tokens, 0 without one."""

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    most: int = 0


@dataclass(frozen=True)
class Answer:
    """The visible text of an answer, its reasoning, and its finish_reason."""

    content: str
    reasoning: str
    finish_reason: str

    @property
    def text(self) -> str:
        return f"{self.reasoning} {self.content}".strip()


@dataclass(frozen=True)
class Reply:
    """The answer, tool calls as (id, name, arguments), and token counts, 0 where not reported.

    first: seconds from the request to the first text, of a stream only; seconds: to the end.
    whole: False for a stream that did not end with [DONE].
    """

    answer: Answer
    calls: tuple[tuple[str, str, str], ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    whole: bool = True

    def __str__(self) -> str:
        without_ids = [call[1:] for call in self.calls]  # servers choose ids freely
        calls = f", tool_calls {short_repr(without_ids)}" if without_ids else ""
        content = escape_line(repr(self.answer.content), 600)
        reasoning = escape_line(repr(self.answer.reasoning), 600)
        why = short_repr(self.answer.finish_reason)
        return f"content {content}, reasoning {reasoning}, finish_reason {why}{calls}"


class HttpStatusError(UserError):
    """A status other than 200."""

    def __init__(self, url: str, status: int, start: str) -> None:
        super().__init__(url, f"HTTP {status}: {start}", "200", LOG)
        self.status = status


def api_key(name: str) -> str:
    """Return the key in the environment variable `name`, "" without one.

    Raises UserError when it is no value of an HTTP header.
    """
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(name, "blanks or characters that no header takes", "a key", "set it again")
    return key


# --- Requests -----------------------------------------------------------------------------------


def find_model(url: str, name: str, key: str, setting: str = "MODEL_NAME") -> Endpoint:
    """Return the endpoint of the model `name` at `url`, or of the served one without a name.

    Raises UserError when no server answers, when it lists models but not this one, and when it
    lists several and no name is given.
    """
    endpoint = Endpoint(url, name, key)
    limits = {
        model["id"]: max(model.get(limit) or 0 for limit in LIMITS)
        for model in list_models(endpoint)
    }
    if name and limits and name not in limits:
        raise UserError(setting, short_repr(name), f"one of {join_some(limits)}", f"{setting}=…")
    if not name and not (name := served_name(list(limits))):
        if len(limits) > 1:
            raise UserError(url, f"several models: {join_some(limits)}", "one", f"{setting}=…")
        name = next(iter(limits), LM_NAME)
    return replace(endpoint, model=name, most=max(0, limits.get(name, 0)))


def list_models(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return what GET /v1/models lists; [] for HTTP 404 and for an empty body.

    mlx_lm 0.31.3 answers with an empty body where there is no hub cache.
    """
    try:
        data = _send(endpoint, "GET", "/v1/models", "", 30)
    except HttpStatusError as refused:
        if refused.status != 404:
            raise
        return []
    return parse_json(data, f"{endpoint.url}: its models", MODELS)["data"] if data.strip() else []


def ask_question(
    endpoint: Endpoint, question: str, max_tokens: int, seconds: float = 600
) -> Answer:
    """Return the answer to one question at temperature 0. Raises UserError as `ask`."""
    messages = [{"role": "user", "content": question}]
    return ask(endpoint, {"messages": messages, "max_tokens": max_tokens}, seconds).answer


def ask(endpoint: Endpoint, body: dict[str, Any], seconds: float) -> Reply:
    """Return the reply to a request at temperature 0, unless `body` has another.

    Raises UserError when there is no usable answer within `seconds`.
    """
    start = time.monotonic()
    data = _send(endpoint, "POST", "/v1/chat/completions", _request_body(endpoint, body), seconds)
    completion = parse_json(data, f"{endpoint.url}: its answer", COMPLETION)
    if not completion["choices"]:
        raise UserError(
            endpoint.url, "no choices in its answer", "an answer",
            "start the server with `make serve`",
        )  # fmt: skip
    choice, usage = completion["choices"][0], completion.get("usage") or {}
    message = choice["message"]
    calls = [
        (call.get("id") or "", call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or []
    ]
    reason = choice.get("finish_reason") or ""
    return Reply(
        Answer(message.get("content") or "", _reasoning(message), reason),
        tuple(calls),
        usage.get("prompt_tokens") or 0,
        usage.get("completion_tokens") or 0,
        seconds=time.monotonic() - start,
    )


def stream(
    endpoint: Endpoint, body: dict[str, Any], seconds: float, most: int = STREAM_READS
) -> Reply:
    """Return the reply to a streamed request; close the connection after `most` reads.

    Raises UserError as `ask`.
    """
    start, received = time.monotonic(), []

    def receive(data: bytes) -> bool:
        received.append((time.monotonic() - start, data))
        return len(received) < most

    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    request = _request_body(endpoint, streamed)
    data = _send(endpoint, "POST", "/v1/chat/completions", request, seconds, receive)
    if data.lstrip()[:1] in (b"{", b"<"):
        raise UserError(endpoint.url, escape_line(data[:200]), "a stream of events", LOG)
    return _join_events(received, endpoint, time.monotonic() - start)


def _join_events(received: list[tuple[float, bytes]], endpoint: Endpoint, seconds: float) -> Reply:
    contents, reasonings = [], []
    reason, usage, first, tokens, whole = "", {}, 0.0, 0, False
    for when, data in _events(received, endpoint.key):
        if data == b"[DONE]":
            whole = True
            continue
        chunk = parse_json(data, f"{endpoint.url}: a piece of its stream", CHUNK)
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"][:1]:
            delta = choice.get("delta") or {}
            reason = choice.get("finish_reason") or reason
            content, reasoning = delta.get("content") or "", _reasoning(delta)
            if content or reasoning:
                first, tokens = first or when, tokens + 1
            contents.append(content)
            reasonings.append(reasoning)
    answer = Answer("".join(contents), "".join(reasonings), reason)
    counted = usage.get("completion_tokens") or tokens
    return Reply(answer, (), usage.get("prompt_tokens") or 0, counted, first, seconds, whole)


def _events(received: list[tuple[float, bytes]], key: str) -> Iterator[tuple[float, bytes]]:
    """Yield each event's data with the time (seconds) at which its line was complete."""
    rest = bytearray()
    for when, data in received:
        rest += data
        if b"\n" in data:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield when, _redacted(bytes(line[5:].strip()), key)


def _reasoning(message: Mapping[str, Any]) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _request_body(endpoint: Endpoint, body: dict[str, Any]) -> str:
    return json.dumps({"model": endpoint.model, "temperature": 0, **body})


def _redacted(data: bytes, key: str) -> bytes:
    return data.replace(key.encode(), b"[key]") if key else data


# --- HTTP ---------------------------------------------------------------------------------------

Receiver = Callable[[bytes], bool]


def _send(
    endpoint: Endpoint, method: str, path: str, body: str, seconds: float,
    receive: Receiver | None = None,
) -> bytes:  # fmt: skip
    """Return the body of a response. Raises UserError for a status other than 200 and for HTML."""
    url = endpoint.url
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    status, data = http_exchange(url, method, path, body, seconds, headers, receive)
    data = _redacted(data, endpoint.key)
    start = escape_line(data[:400].decode(errors="replace"), 400)
    if status != 200:
        raise HttpStatusError(url, status, start)
    if data.lstrip()[:1] == b"<":
        raise UserError(url, f"a page: {start}", "JSON", "check URL: is that a server of models?")
    return data


def http_exchange(
    url: str, method: str, path: str, body: str, seconds: float, headers: Mapping[str, str] = {},
    receive: Receiver | None = None,
) -> tuple[int, bytes]:  # fmt: skip
    """Send one request and return (status, body). No proxy is used, no redirection is followed.

    receive: called with each piece of the body; when it returns False the connection is closed.
    Raises UserError when the exchange takes longer than `seconds` in all, however the server
    behaves, and when the body is larger than RESPONSE_BYTES.
    """
    results: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()
    sockets: list[socket.socket] = []

    def work() -> None:
        try:
            results.put(_http_exchange(url, method, path, body, seconds, headers, receive, sockets))
        except Exception as error:
            results.put(error)

    threading.Thread(target=work, daemon=True).start()  # a stuck thread ends with this process
    try:
        result = results.get(timeout=max(seconds, 0))
    except queue.Empty as error:
        for connected in sockets:  # so that the server stops generating
            _close_connection(connected)
        raise UserError(url, f"no whole answer in {seconds:g} s", "one", "see its log") from error
    if isinstance(result, (OSError, ValueError, http.client.HTTPException)):
        todo = "start the server with `make serve`"
        raise UserError(url, f"{type(result).__name__}: {result}", "an answer", todo) from result
    if isinstance(result, Exception):
        raise result
    status, data = result
    if len(data) > RESPONSE_BYTES:
        raise UserError(url, f"more than {RESPONSE_BYTES:,} bytes", "an answer", LOG)
    return status, data


def _http_exchange(
    url: str, method: str, path: str, body: str, seconds: float, headers: Mapping[str, str],
    receive: Receiver | None, sockets: list[socket.socket],
) -> tuple[int, bytes]:  # fmt: skip
    scheme, _, rest = url.partition("://")
    host, _, prefix = rest.partition("/")
    secure = scheme == "https"
    connection_type = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    # The socket waits a little longer than `http_exchange`, whose message is the clearer one.
    with contextlib.closing(connection_type(host, timeout=seconds + 5)) as connection:
        connection.connect()
        sockets.append(connection.sock)
        headers = {"Content-Type": "application/json", **headers}
        connection.request(method, f"{prefix and '/'}{prefix}{path}", body.encode(), headers)
        with connection.getresponse() as response:
            data = bytearray()
            while len(data) <= RESPONSE_BYTES and (piece := response.read1(65536)):
                data += piece
                if receive and not receive(piece):
                    _close_connection(sockets[0])
                    break
            return response.status, bytes(data)


def _close_connection(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
