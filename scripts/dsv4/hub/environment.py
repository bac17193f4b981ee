"""What huggingface_hub and its HTTP library read from the environment, checked before they trip.

They would end in a traceback, or far from the cause. Each fault is one line that names the
variable, its value and what is expected.
"""

from __future__ import annotations

import importlib.util
import os
import re
import ssl
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from dsv4.stop import Stop

TIMEOUTS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
LONGEST = 86_400  # seconds
SOCKS = ("socks5", "socks5h")
PROXY = "http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT"
UNSET = "set it right, or unset it"


def check_settings() -> None:
    """Raise Stop for a setting with which huggingface_hub cannot even be imported, or used."""
    for name in TIMEOUTS:
        value = os.environ.get(name, "1")
        if not re.fullmatch("[0-9]{1,5}", value) or not 1 <= int(value) <= LONGEST:
            raise Stop(name, shown(value), f"whole seconds, 1 to {LONGEST:,}", UNSET)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not is_address(endpoint, ("http", "https")):
        raise Stop("HF_ENDPOINT", shown(endpoint), "a hub's address, https://HOST", UNSET)


def check_ways() -> None:
    """Raise Stop for a proxy or certificates with which no connection can be made."""
    proxies = getproxies()
    for scheme in ("http", "https", "all"):
        value = proxies.get(scheme)
        if value:
            check_proxy(variable(scheme), value if "://" in value else f"http://{value}")
    check_certificates()


def check_login() -> None:
    """Raise Stop for a token that cannot be read, or that no request can carry."""
    from huggingface_hub import errors, get_token

    todo = "`hf auth login` writes a new one; HF_TOKEN goes before it"
    try:
        token = get_token() or ""
    except OSError as error:
        found = f"{error.filename}: {error.strerror}"
        raise Stop("the hub's login", found, "a token file that can be read, or none",
                   "HF_HOME, HF_TOKEN_PATH or HOME says where it lies") from None  # fmt: skip
    except (ValueError, errors.OIDCError) as error:
        found = " ".join(str(error).split())[:100] if isinstance(error, errors.OIDCError) else ""
        raise Stop("the hub's login", found or "a token file that is no text", "a token",
                   todo) from None  # fmt: skip
    if not (token.isascii() and token.isprintable()):
        raise Stop("the hub's login", "a token with characters that none has", "a token", todo)


def check_proxy(name: str, value: str) -> None:
    """Raise Stop for a proxy that the HTTP library does not take."""
    if not is_address(value, ("http", "https", *SOCKS)):
        raise Stop(name, shown(value), PROXY, UNSET)
    if urlsplit(value).scheme in SOCKS and importlib.util.find_spec("socksio") is None:
        raise Stop(name, f"{shown(value)} and no package socksio", "it, which SOCKS needs",
                   "make venv installs it")  # fmt: skip


def check_certificates() -> None:
    """Raise Stop for certificates that cannot be read; an empty variable is none."""
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.create_default_context(cafile=file)
        except (OSError, ValueError):
            raise Stop("SSL_CERT_FILE", shown(file), "a file of certificates (PEM)",
                       UNSET) from None  # fmt: skip
    if folder and not any(Path(part).is_dir() for part in folder.split(os.pathsep)):
        raise Stop("SSL_CERT_DIR", shown(folder), "a folder of certificates", UNSET)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if (value := os.environ.get(name)) and not Path(value).exists():
            raise Stop(name, shown(value), "a file of certificates (SSL_CERT_FILE is what counts "
                       "here)", UNSET)  # fmt: skip


def is_address(value: str, schemes: tuple[str, ...]) -> bool:
    """True for an URL of one of these schemes, with a host, that holds nothing odd."""
    try:
        split = urlsplit(value)
        port = split.port
    except ValueError:
        return False
    plain = value.isprintable() and value.isascii() and " " not in value
    return plain and split.scheme in schemes and bool(split.hostname) and port != 0


def variable(scheme: str) -> str:
    """Where the proxy for `scheme` comes from: on macOS, it may be the system."""
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    return next((name for name in names if os.environ.get(name)), "the system's proxy settings")


def shown(value: str) -> str:
    """A variable's value for a reader: without a password, short, escaped."""
    return ascii(re.sub(r"^(\w+://)?.*@", r"\1…@", value)[:100])
