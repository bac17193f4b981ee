"""What the hub, its store and the network refuse, in clear words, temporary and final told apart.

A server's words are shown as `words` leaves them: one line, shortened, nothing in it that a
terminal obeys. The login is the user's own (`hf auth login` or HF_TOKEN); it is never printed,
stored or passed on here, and `scrubbed` keeps it out of other people's words.
"""

from __future__ import annotations

import contextlib
import email.utils
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from dsv4.stop import Stop
from dsv4.words import plain

AGAIN = "run the same command again: it resumes"
LOGIN = "`hf auth login`, with an account that has access"
OTHER = "check HF_ENDPOINT, and whether a proxy answers instead"
CERTIFICATES = "set SSL_CERT_FILE to this network's certificates, then "
OLD_LINK = (400, 401, 403, 404, 410)  # what stores answer to a link that has run out
THEIRS = ("huggingface_hub", "httpx2", "httpcore2", "h11", "json", "idna", "encodings", "socket")


class Short(Exception):
    """The server ended an answer before all of its bytes had come."""


class Slow(Exception):
    """An answer comes, but too slowly to wait for its end."""


class Odd(Exception):
    """An answer that the hub does not give: of another status, form or length."""


class Gone(Stop):
    """The hub does not have the revision that was asked for."""


# ------------------------------------------------------------------------------ errors, in words


@contextlib.contextmanager
def clear_words(repo: str) -> Iterator[None]:
    """Turn huggingface_hub's and its transport's exceptions into a Stop of one line each.

    Raises Gone, which is one, when it is the revision that the hub does not have.
    """
    try:
        yield
    except Stop:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        from huggingface_hub.errors import RevisionNotFoundError

        kind = Gone if isinstance(error, RevisionNotFoundError) else Stop
        raise kind(f"hub: {words(repo)}", *explained) from None


def explain(error: BaseException) -> tuple[str, str, str] | None:
    """(found, expected, what to do) for an error of the hub or the network, else None."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)  # how huggingface_hub wraps a failed upload
    if isinstance(error, errors.HfHubHTTPError):
        return explain_refusal(error)
    if isinstance(error, errors.HFValidationError):
        return "no repository's name", "user/name", "check its name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE set", "leave to use the network", f"unset it, then {AGAIN}"
    if isinstance(error, Short):
        return f"{error}", "the whole file", AGAIN
    if isinstance(error, Slow):
        return f"{error}", "a faster answer", f"check the network, then {AGAIN}"
    if isinstance(error, Odd):
        return f"{error}", "the hub's API", OTHER
    said = words(error) or type(error).__name__
    if is_transport(error) or isinstance(error, ConnectionError | TimeoutError):
        first = CERTIFICATES if "CERTIFICATE_VERIFY" in said else "check the network, then "
        return f"no connection ({said})", "the hub", first + AGAIN
    if isinstance(error, RuntimeError):  # hf_xet's own words, or huggingface_hub's
        return f"a failed transfer ({said})", "an answer", AGAIN
    if is_theirs(error):
        return f"an answer that huggingface_hub does not take ({said})", "the hub's API", OTHER
    return None


def explain_refusal(error: Any) -> tuple[str, str, str]:
    """The same for an answer whose status says no."""
    from huggingface_hub import errors

    if from_store(error):
        return explain_store(error)
    if isinstance(error, errors.GatedRepoError):
        todo = f"accept its conditions on its page, then {LOGIN}"
        return f"a gated repository{no_login()}", "access to it", todo
    if isinstance(error, errors.RepositoryNotFoundError):
        found = f"no such repository, or a private one{no_login()}"
        return found, "a readable repository", f"check its name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision", "a commit hash, tag or branch of it", "check REVISION"
    return explain_status(error)


def explain_store(error: Any) -> tuple[str, str, str]:
    """The same for the store's answer, to which the hub itself had sent the request."""
    host = words(urlsplit(str(error.response.request.url)).netloc.rpartition("@")[2], 60)
    found = f"HTTP {status(error)} from {host}, where the hub keeps files{quoted(error)}"
    return found, "an answer", f"{back(error)}, then {AGAIN}"


def explain_status(error: Any) -> tuple[str, str, str]:
    """The same for the hub's answer, by its status; with the hub's own words."""
    code, said = status(error), quoted(error)
    if code == 401:
        return f"HTTP 401{no_login() or ': the login is rejected'}{said}", "a valid login", LOGIN
    if code == 403:
        return f"HTTP 403: this login may not do that{said}", "access to it", LOGIN
    if code == 404:
        return f"HTTP 404: no such file there{said}", "the file", "check the repository's page"
    if code == 429:
        return f"HTTP 429: too many requests{said}", "an answer", f"{back(error)}, then {AGAIN}"
    if code in (409, 412):
        return f"HTTP {code}: somebody else changed it{said}", "one writer", AGAIN
    if code == 408 or code >= 500:
        found = f"HTTP {code}: the hub has a fault{said}"
        return found, "an answer", f"{back(error)}, then {AGAIN}"
    todo = "mend what the hub names; the same request would be refused again"
    return f"HTTP {code}: the hub refuses it{said}", "an accepted request", todo


def back(error: Any) -> str:
    """When to come back, in words."""
    seconds = asked_wait(error)
    return f"wait {seconds:,.0f} s, as the hub asks" if seconds else "wait some minutes"


def quoted(error: Any) -> str:
    """The server's own words, to stand behind ours."""
    said = words(getattr(error, "server_message", None) or "")
    return f' ("{said}")' if said else ""


def words(text: object, limit: int = 160) -> str:
    """Foreign text as one short plain line without tokens; blanks and line breaks are one space."""
    return plain(" ".join(scrubbed(str(text)[: 1 << 16]).split()), limit)


def scrubbed(text: str) -> str:
    """`text` without anything that looks like a token, the user's own first."""
    if secret := login():
        text = text.replace(secret, "[token]")
    return re.sub(r"(hf_|Bearer )\w+", "[token]", text)


def login() -> str | None:
    """The user's token; None where there is none, or none that can be read."""
    from huggingface_hub import get_token

    with contextlib.suppress(Exception):
        return get_token()
    return None


def no_login() -> str:
    """Words to add when the user is not logged in."""
    return "" if login() else ", and no login"


# ------------------------------------------------------------------------- what kind of error


def status(error: BaseException) -> int:
    """The HTTP status that an error carries, or 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def is_transport(error: BaseException) -> bool:
    """True for an error of the HTTP library itself: no connection, a timeout, a broken answer.

    hf_xet raises Python's own ConnectionError and TimeoutError instead.
    """
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def is_theirs(error: BaseException) -> bool:
    """True for what huggingface_hub meets when an answer is not of the form that it takes."""
    if type(error).__module__.split(".")[0] == "huggingface_hub":
        return True
    kinds = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, kinds) and where.split(".")[0] in THEIRS


def from_store(error: BaseException) -> bool:
    """True when the answer is not the hub's but that of a store to which the hub pointed."""
    from huggingface_hub import constants

    request = getattr(getattr(error, "response", None), "request", None)
    return request is not None and origin(str(request.url)) != origin(constants.ENDPOINT)


def origin(url: str) -> tuple[str, str | None, int]:
    """Scheme, host and port."""
    split = urlsplit(url)
    return split.scheme, split.hostname, split.port or {"http": 80, "https": 443}[split.scheme]


def is_passing(error: BaseException) -> bool:
    """True for what may be over in a minute: lost connections, timeouts, 408, 409, 429, 5xx.

    And for a store that does not take the hub's link: it has run out, and the next one is new.
    """
    code = status(error)
    if isinstance(error, Short | Slow) or code in (408, 409, 429) or code >= 500:
        return True
    if code in OLD_LINK and from_store(error):
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    lasting = ("LocalProtocolError", "UnsupportedProtocol", "ProxyError", "InvalidURL")
    return is_transport(error) and not code and type(error).__name__ not in lasting


def is_limited(error: BaseException) -> bool:
    """True when the hub did nothing yet because of too many requests."""
    return status(error) == 429


def asked_wait(error: BaseException) -> float:
    """The seconds that the server asks to wait, or 0: Retry-After, or RateLimit's (RFC drafts)."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    limited = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,9})", headers.get("RateLimit", ""))
    legacy = re.fullmatch("[0-9]{1,9}", headers.get("RateLimit-Reset", "").strip())
    asked = [seconds_of(headers.get("Retry-After", ""), headers.get("Date", ""))]
    if status(error) == 429:
        asked += [float(limited[1]) if limited else 0, float(legacy[0]) if legacy else 0]
    return max(asked)


def seconds_of(value: str, date: str) -> float:
    """Retry-After's value, in seconds: a number of them, or an HTTP date; 0 for anything else."""
    if re.fullmatch("[0-9]{1,9}", value.strip()):
        return float(value)
    then = moment(value)
    return max(0.0, (then - (moment(date) or datetime.now(UTC))).total_seconds()) if then else 0.0


def moment(date: str) -> datetime | None:
    """An HTTP date."""
    try:
        found = email.utils.parsedate_to_datetime(date)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
