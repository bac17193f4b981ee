"""Requests whose answers have an end: huggingface_hub's HTTP client, with bounds.

A server is not trusted to stop. What comes is counted after it is unpacked, so that a gzip bomb is
no way around; headers and an API's answer have a time to come in, and a file's bytes a least rate.
The body of a refusal is read here, and what huggingface_hub gets to see of it is its words alone:
it ends in a traceback on JSON of another form. A server that says when to come back is not waited
for by huggingface_hub, which would sleep in silence for however long, but by dsv4.hub.patience.
"""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from dsv4.hub.environment import check_login, check_settings, check_ways
from dsv4.hub.refusals import Odd, Slow, asked_wait, words

if TYPE_CHECKING:
    import httpx2

API_BYTES = 8 << 20  # a listing of 20,000 files has some 6 MB; Python makes 30 times that of `[],`
API_SECONDS = 120
HEAD_SECONDS = 90  # from the request to the end of an answer's headers
REFUSAL_BYTES = 64 << 10  # of a refusal's body; what comes after is left
WINDOW, FLOOR = 60, 1000  # a file has to bring so many bytes a second, over so many seconds
BUSY = "another conflicting operation"  # huggingface_hub would ask again at once, for ever
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")
FILE = "of a file"  # marks a request for a file, which is bounded by who reads it


def session() -> httpx2.Client:
    """huggingface_hub's client, with bounds. Raises Stop for settings that cannot work."""
    install()
    from huggingface_hub.utils import get_session

    return get_session()


@functools.cache
def install() -> None:
    """Let huggingface_hub make its clients here. Raises Stop for settings that cannot work."""
    check_settings()
    from huggingface_hub import set_client_factory

    set_client_factory(make_client)


def make_client() -> httpx2.Client:
    """A client as huggingface_hub makes it, that bounds answers, and that asks no proxy for this
    machine. Raises Stop as `session` does.
    """
    check_ways()
    check_login()
    import httpx2
    from huggingface_hub.utils._http import hf_request_event_hook

    return httpx2.Client(
        event_hooks={"request": [hf_request_event_hook], "response": [bound]},
        follow_redirects=True,
        timeout=httpx2.Timeout(300, connect=30),  # a commit of many files takes its time
        mounts=dict.fromkeys(LOOPBACK),
    )


def bound(response: httpx2.Response) -> None:
    """Bound one answer's body, before anything of it is read. Raises huggingface_hub's errors."""
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code >= 400:
        said = what_is_said(response)
        response.close()
        body = json.dumps(said).encode()
        response.iter_bytes = lambda chunk_size=None: iter((body,))
        busy = response.status_code == 409 and BUSY in said.get("error", "")
        if busy or "Retry-After" in response.headers or asked_wait(Answered(response)):
            hf_raise_for_status(response)
        return
    file = response.request.extensions.get(FILE) and response.status_code < 300
    limit, seconds = (None, None) if file else (API_BYTES, API_SECONDS)
    plain = response.iter_bytes
    response.iter_bytes = lambda chunk_size=None: bounded(plain(chunk_size), limit, seconds)


class Answered(Exception):
    """An answer, to be asked as an error is."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response


def bounded(
    chunks: Iterable[bytes],
    limit: int | None,
    seconds: float | None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[bytes]:
    """The chunks, as long as they are not too many, too late or too slow.

    Raises Odd after `limit` bytes, Slow after `seconds`, and when less than FLOOR bytes a second
    came over WINDOW seconds.
    """
    total, recent, start = 0, 0, clock()
    window = start
    for chunk in chunks:
        total, recent, now = total + len(chunk), recent + len(chunk), clock()
        if limit is not None and total > limit:
            raise Odd(f"an answer of more than {limit:,} bytes")
        if seconds is not None and now - start > seconds:
            raise Slow(f"an answer that had not ended after {seconds:,} s")
        if now - window > WINDOW:
            if recent < FLOOR * WINDOW:
                raise Slow(f"less than {FLOOR:,} bytes a second")
            window, recent = now, 0
        yield chunk


def what_is_said(response: httpx2.Response) -> dict[str, str]:
    """What a refusal's body says, as `words` shows it, and the URL by which create_repo goes on."""
    data = bytearray()
    with contextlib.suppress(Exception):  # a refusal is a refusal, whatever becomes of its body
        for chunk in bounded(response.iter_bytes(), REFUSAL_BYTES, API_SECONDS):
            data += chunk
    text = bytes(data).decode("utf-8", "replace")
    url = ""
    try:
        value = json.loads(text)
        said = spoken(value)
        url = value.get("url") if isinstance(value, dict) else ""
    except (ValueError, RecursionError):
        html = "html" in response.headers.get("Content-Type", "").lower()
        said = "" if html else text
    answer = {"error": words(said, 400), "url": words(url, 400) if isinstance(url, str) else ""}
    return {name: value for name, value in answer.items() if value}


def spoken(value: Any) -> str:
    """The words in a refusal's JSON: error, error_description, message, errors' messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(filter(None, map(spoken, value[:4])))
    if not isinstance(value, dict):
        return ""
    names = ("error", "error_description", "message", "errors")
    return "; ".join(filter(None, (spoken(value.get(name)) for name in names)))


def ask(url: str, params: dict[str, Any]) -> dict[str, Any]:
    """The JSON object that an API answers with. Raises Odd for any other answer."""
    client = session()
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    request = client.build_request("GET", url, params=params, headers=build_hf_headers(),
                                   timeout=30)  # fmt: skip
    with contextlib.closing(sent(client, request)) as response:
        hf_raise_for_status(response)
        if response.status_code != 200:
            raise Odd(f"HTTP {response.status_code}")
        data = response.read()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Odd("an answer that is no JSON") from None
    if not isinstance(value, dict):
        raise Odd(f"a JSON {type(value).__name__}")
    return value


def sent(client: httpx2.Client, request: httpx2.Request) -> httpx2.Response:
    """The answer's headers; its body is still to be read.

    The client's own timeout begins anew with every byte, so that it is sent by a thread of its own,
    which is left to itself when the time is up. Raises Slow then.
    """
    box: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put(client.send(request, stream=True))
        except BaseException as error:
            box.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        found = box.get(timeout=HEAD_SECONDS)
    except queue.Empty:
        raise Slow(f"an answer that had not begun after {HEAD_SECONDS} s") from None
    if isinstance(found, BaseException):
        raise found
    return found


@contextlib.contextmanager
def opened(repo: str, name: str, commit: str, part: str = "") -> Iterator[httpx2.Response]:
    """A file's answer, to be streamed; `part` is a Range header's value, which may be ignored.

    Raises Odd for an answer that is neither the file nor the part.
    """
    client = session()
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    headers |= {"Range": part} if part else {}
    url = hf_hub_url(repo, name, revision=commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    marks = {FILE: True}
    request = client.build_request("GET", url, headers=headers, timeout=timeout, extensions=marks)
    with contextlib.closing(sent(client, request)) as response:
        hf_raise_for_status(response)
        if response.status_code not in ((200, 206) if part else (200,)):
            raise Odd(f"HTTP {response.status_code} for {name}")
        yield response
