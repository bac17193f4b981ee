"""Errors of the hub, its file store and the network: one clear line each, transient or final.

The user's token (`hf auth login` or HF_TOKEN) is never printed: `one_line` redacts it in the
messages of servers and libraries.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from dsv4.errors import UserError
from dsv4.text import escape_line

AGAIN = "run the same command again: it resumes"
LOGIN = "`hf auth login`, with an account that has access"
OTHER = "check HF_ENDPOINT, and whether a proxy answers instead"
CERTIFICATES = "set SSL_CERT_FILE to this network's certificates, then "
OLD_LINK = (400, 401, 403, 404, 410)  # what stores answer to a link that has expired
LIBRARIES = (
    "huggingface_hub", "httpx2", "httpcore2", "h11", "json", "idna", "encodings", "socket",
)  # fmt: skip
REFUSAL = (": the hub refuses it", "an accepted request",
           "mend what the hub names; the same request would be refused again")  # fmt: skip
FAULT = (": the hub has a fault", "an answer", "")  # "": wait, and run it again
CHANGED = (": somebody else changed it", "one writer", AGAIN)
STATUS = {
    401: (": the login is rejected", "a valid login", LOGIN),
    403: (": this login may not do that", "access to it", LOGIN),
    404: (": no such file there", "the file", "check the repository's page"),
    408: FAULT,
    409: CHANGED,
    412: CHANGED,
    429: (": too many requests", "an answer", ""),
}
FINAL = (  # of httpx2 and huggingface_hub
    "LocalProtocolError", "UnsupportedProtocol", "ProxyError", "InvalidURL", "OfflineModeIsEnabled",
)  # fmt: skip


class TruncatedResponse(Exception):
    """The server ended a response before all of its bytes had come."""


class BadResponse(Exception):
    """A response that the hub does not give: of another status, form or length."""


class RevisionNotFound(UserError):
    """The hub does not have the revision that was asked for."""


# --- One line for each error ----------------------------------------------------------------------


@contextlib.contextmanager
def translated(repo: str) -> Iterator[None]:
    """Turn the exceptions of huggingface_hub and of its HTTP library into a UserError.

    Raises RevisionNotFound, which is one, when the hub does not have the revision.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        parts = describe(error)
        if parts is None:
            raise
        from huggingface_hub.errors import RevisionNotFoundError

        kind = RevisionNotFound if isinstance(error, RevisionNotFoundError) else UserError
        raise kind(f"hub: {one_line(repo)}", *parts) from None


def describe(error: BaseException) -> tuple[str, str, str] | None:
    """Return (found, expected, what to do) for an error of the hub or the network, else None."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return describe(error.__cause__)  # how huggingface_hub wraps a failed upload
    if isinstance(error, errors.HfHubHTTPError):
        return describe_status(error)
    if isinstance(error, errors.HFValidationError):
        return "no repository's name", "user/name", "check its name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE set", "leave to use the network", f"unset it, then {AGAIN}"
    if isinstance(error, TruncatedResponse):
        return f"{error}", "the whole file", AGAIN
    if isinstance(error, BadResponse):
        return f"{error}", "the hub's API", OTHER
    message = one_line(error) or type(error).__name__
    if is_connection_error(error):
        todo = CERTIFICATES if "CERTIFICATE_VERIFY" in message else "check the network, then "
        todo = OTHER if type(error).__name__ in FINAL else todo + AGAIN
        return f"no connection ({message})", "the hub", todo
    if isinstance(error, RuntimeError):  # hf_xet's own messages, or huggingface_hub's
        return f"a failed transfer ({message})", "an answer", AGAIN
    if isinstance(error, json.JSONDecodeError):
        return "an answer that is no JSON", "the hub's API", OTHER
    if raised_in_library(error):
        found = f"an answer that huggingface_hub does not take ({message})"
        return found, "the hub's API", OTHER
    return None


def describe_status(error: Any) -> tuple[str, str, str]:
    """Return the same for a response whose status is an error, with the server's own message."""
    from huggingface_hub import errors

    code, message = status(error), one_line(getattr(error, "server_message", None) or "")
    no_login = "" if read_token() else ", and no login"
    if from_store(error):
        host = urlsplit(str(error.response.request.url)).netloc
        meaning = (f" from {one_line(host, 60)}, where the hub keeps files", "an answer", "")
    elif isinstance(error, errors.GatedRepoError):
        todo = f"accept its conditions on its page, then {LOGIN}"
        return f"a gated repository{no_login}", "access to it", todo
    elif isinstance(error, errors.RepositoryNotFoundError):
        found = f"no such repository, or a private one{no_login}"
        return found, "a readable repository", f"check its name, or {LOGIN}"
    elif isinstance(error, errors.RevisionNotFoundError):
        return "no such revision", "a commit hash, tag or branch of it", "check REVISION"
    elif code == 401 and no_login:
        meaning = (no_login, "a valid login", LOGIN)
    else:
        meaning = STATUS.get(code, FAULT if code >= 500 else REFUSAL)
    seconds = requested_delay(error)
    later = f"wait {seconds:,.0f} s, as the hub asks" if seconds else "wait some minutes"
    found, expected, todo = meaning
    quoted = f' ("{message}")' if message else ""
    return f"HTTP {code}{found}{quoted}", expected, todo or f"{later}, then {AGAIN}"


# --- Text from others -----------------------------------------------------------------------------


def one_line(text: object, limit: int = 160) -> str:
    """Return untrusted text as one short escaped line without tokens and passwords."""
    text = str(text)[: 1 << 16]
    if token := read_token():
        text = text.replace(token, "[token]")
    text = re.sub(r"(hf_|Bearer )\w+", "[token]", text)
    return escape_line(" ".join(re.sub(r"//[^/\s]*@", "//…@", text).split()), limit)


def read_token() -> str | None:
    """Return the user's token; None where there is none, or none that can be read."""
    from huggingface_hub import get_token

    with contextlib.suppress(Exception):
        return get_token()
    return None


# --- Kinds of errors ------------------------------------------------------------------------------


def status(error: BaseException) -> int:
    """Return the HTTP status that an error carries, or 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def is_connection_error(error: BaseException) -> bool:
    """True for no connection, a timeout or a broken one: errors of httpx2, and of hf_xet, which
    raises Python's own."""
    of_httpx = type(error).__module__.split(".")[0] in ("httpx2", "httpcore2")
    return of_httpx or isinstance(error, ConnectionError | TimeoutError)


def raised_in_library(error: BaseException) -> bool:
    """True for what huggingface_hub raises, or meets, when an answer is of another form."""
    kinds = (TypeError, ValueError, LookupError, AttributeError)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    named = type(error).__module__.split(".")[0] == "huggingface_hub"
    return named or (isinstance(error, kinds) and where.split(".")[0] in LIBRARIES)


def from_store(error: BaseException) -> bool:
    """True when the response is that of a store (CDN) to which the hub had redirected."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import _url_origin

    request = getattr(getattr(error, "response", None), "request", None)
    return request is not None and _url_origin(str(request.url)) != _url_origin(constants.ENDPOINT)


def is_transient(error: BaseException) -> bool:
    """True for what may be over in a minute: lost connections, timeouts, 408, 409, 429, 5xx.

    And for a store that does not take the hub's link: it has expired, and the next one is new.
    """
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return is_transient(error.__cause__)  # of a failed upload
    code = status(error)
    if isinstance(error, TruncatedResponse) or code in (408, 409, 429) or code >= 500:
        return True
    if code in OLD_LINK and from_store(error):
        return True
    return is_connection_error(error) and not code and type(error).__name__ not in FINAL


def requested_delay(error: BaseException) -> float:
    """Return the seconds that the server asks to wait, by Retry-After or RateLimit, or 0."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "").strip()
    delays = [float(value) if re.fullmatch("[0-9]{1,9}", value) else 0.0]
    limit = parse_ratelimit_headers(headers)
    if status(error) == 429 and limit is not None and limit.remaining == 0:
        delays.append(float(limit.reset_in_seconds))
    return max(delays)
