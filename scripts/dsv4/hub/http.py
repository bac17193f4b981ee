"""HTTP to the hub: huggingface_hub's client with time limits, and its http_get for one file.

huggingface_hub does login, redirects, ranges and short retries. What is added here: a client that
does not wait for ever, an end to a body that goes on past the size that was announced, and one
line for settings of the environment with which no connection can be made.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from dsv4.errors import UserError
from dsv4.hub.hub_errors import BadResponse, TruncatedResponse, one_line
from dsv4.text import short_repr

if TYPE_CHECKING:
    import httpx2

CHUNK = 64 << 10  # bytes written at once: what a lost connection costs, and when a stop is noticed
UNSET = "set it right, or unset it"
TIMEOUTS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
CONNECTION = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


# --- The client -----------------------------------------------------------------------------------


@functools.cache
def install() -> None:
    """Let huggingface_hub use `make_client`. Raises UserError for settings that it cannot
    import."""
    for name in TIMEOUTS:
        value = os.environ.get(name, "1")
        if not re.fullmatch("[0-9]{1,5}", value):
            raise UserError(name, short_repr(value), "whole seconds", UNSET)
    from huggingface_hub import constants, set_client_factory

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK  # http_get's 10 MB are never complete on a poor line
    set_client_factory(make_client)


def make_client() -> httpx2.Client:
    """Return huggingface_hub's own client, with timeouts and `raise_when_limited`.

    Raises UserError for a proxy or certificates that cannot be used.
    """
    from huggingface_hub.utils import httpx
    from huggingface_hub.utils._http import default_client_factory

    try:
        client = default_client_factory()
    except (OSError, ValueError, ImportError, httpx.InvalidURL) as error:
        given = [n for n in CONNECTION if os.environ.get(n) or os.environ.get(n.lower())]
        raise UserError(", ".join(given) or "the system's proxy", one_line(error),
                   "a proxy as http://HOST:PORT or socks5://HOST:PORT, a file of certificates",
                   UNSET) from None  # fmt: skip
    client.timeout = httpx.Timeout(300, connect=30)  # a commit of many files takes its time
    client.event_hooks = {**client.event_hooks, "response": [raise_when_limited]}
    return client


def check_login() -> None:
    """Raise UserError for a token that cannot be read, or that no request can carry."""
    install()
    from huggingface_hub import errors, get_token

    try:
        token = get_token() or ""
        sound = token.isascii() and token.isprintable()
        found = "" if sound else "a token with characters that none has"
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
    except (ValueError, errors.OIDCError) as error:
        found = f"a token that cannot be read ({type(error).__name__})"
    if found:
        raise UserError("the hub's login", found, "a token that can be read, or none",
                   "`hf auth login` writes one; HF_TOKEN goes before it, HF_HOME says where it "
                   "lies")  # fmt: skip


def raise_when_limited(response: httpx2.Response) -> None:
    """Raise for an answer that says when to come back, or that there were too many requests.

    huggingface_hub would sleep in silence for as long as it says; retry.py tells, and has a limit.
    """
    from huggingface_hub.utils import hf_raise_for_status

    code = response.status_code
    if code in (408, 429) or (code >= 500 and "Retry-After" in response.headers):
        response.read()
        hf_raise_for_status(response)


# --- One file -------------------------------------------------------------------------------------


class EndReached(Exception):
    """All announced bytes are there, and more came."""


class BoundedFile:
    """The file that http_get writes to: reports progress, and takes no byte beyond `size`.

    `advance` is called with the bytes of each change (negative when a server that ignores Range
    makes http_get start again); an exception of it ends the transfer.
    """

    def __init__(self, file: IO[bytes], size: int, advance: Callable[[int], Any]) -> None:
        self._file, self._size, self._advance = file, size, advance
        self.seek, self.tell, self.nbytes = file.seek, file.tell, file.tell()

    def write(self, data: bytes) -> int:
        kept = data[: self._size - self.nbytes]
        self._advance(len(kept))
        self._file.write(kept)
        self.nbytes += len(kept)
        if len(kept) < len(data):
            raise EndReached
        return len(data)

    def truncate(self) -> None:
        self._file.truncate()
        self._advance(self.tell() - self.nbytes)
        self.nbytes = self.tell()


def get(repo: str, name: str, commit: str, out: BoundedFile, size: int, part: str = "") -> None:
    """Fetch a file, or the range `part` of it, from where `out` ends until it has `size` bytes.

    Raises TruncatedResponse when the server ends too early, EndReached when it goes on after that,
    and huggingface_hub's errors.
    """
    check_login()
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    headers |= {"Range": part} if part else {}
    url = hf_hub_url(repo, name, revision=commit)
    try:
        http_get(url, out, resume_size=out.nbytes, headers=headers, expected_size=size)
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        found = f"{name} ending after {out.nbytes:,} of {size:,} bytes"
        raise TruncatedResponse(found) from None  # what http_get calls a failed consistency check


def resume(
    repo: str, name: str, commit: str, file: IO[bytes], size: int, advance: Callable[[int], Any]
) -> None:
    """Append the bytes that `file` still lacks of a published file of `size` bytes. Raises as
    `get` does; bytes after the last one are left.
    """
    with contextlib.suppress(EndReached):
        get(repo, name, commit, BoundedFile(file, size, advance), size)


def read_range(repo: str, name: str, commit: str, begin: int, end: int) -> bytes:
    """Return bytes `begin` to `end` of a published file. Raises as `get` does, and BadResponse for
    a server that sends others.
    """
    data, size = io.BytesIO(), end - begin
    out = BoundedFile(data, size, lambda count: None)
    try:
        get(repo, name, commit, out, size, f"bytes={begin}-{end - 1}")
    except EndReached:
        if begin:
            raise BadResponse(f"all of {name} in place of a range of it") from None
    return data.getvalue()
