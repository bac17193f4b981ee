"""What the hub says of a repository, through huggingface_hub, in clear words.

The login is the user's own (`hf auth login` or HF_TOKEN); huggingface_hub puts it into the headers.
It is never printed, stored or passed on here, and `scrubbed` keeps it out of other people's words.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from tqdm import tqdm

from dsv4.stop import Stop
from dsv4.storage.shard import Tensor

T = TypeVar("T")

# Everything that the build reads; weights in other formats and pictures stay where they are.
WANTED = ("*.safetensors", "*.json", "encoding/*", "LICENSE*", "README.md", "*.jinja")

AGAIN = "run the same command again: it resumes"
LOGIN = "`hf auth login`, with an account that has access"
LONGEST_WAIT = 60  # seconds between two attempts
WORTH_SAYING = 8  # a wait of so many seconds is told


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its size in bytes and the hash that the hub knows it by.

    That is the SHA-256 of a large file, and git's blob hash (SHA-1 of "blob SIZE\\0" and the bytes)
    of a small one.
    """

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None = None

    @property
    def digest(self) -> str:
        """Whichever of the two hashes there is."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Listing:
    """The files of one revision, and the commit hash that the revision stands for."""

    commit: str
    files: tuple[HubFile, ...]


class Short(Exception):
    """The server ended an answer before all of its bytes had come."""


# ------------------------------------------------------------------------------ errors, in words


@contextlib.contextmanager
def clear_words(repo: str) -> Iterator[None]:
    """Turn huggingface_hub's and its transport's exceptions into a Stop of one line each."""
    try:
        yield
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        found, expected, todo = explained
        raise Stop(f"hub: {repo}", found, expected, todo) from None


def explain(error: Exception) -> tuple[str, str, str] | None:
    """(found, expected, what to do) for an error of the hub or the network, else None."""
    from huggingface_hub import errors

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)  # how huggingface_hub wraps a failed upload
    if isinstance(error, errors.GatedRepoError):
        todo = f"accept its conditions on its page, then {LOGIN}"
        return f"a gated repository{no_login()}", "access to it", todo
    if isinstance(error, errors.RepositoryNotFoundError):
        found = f"no such repository, or a private one{no_login()}"
        return found, "a readable repository", f"check its name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision", "a commit hash, tag or branch of it", "check REVISION"
    if isinstance(error, errors.HFValidationError):
        return "no repository's name", "user/name", "check its name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE set", "leave to use the network", f"unset it, then {AGAIN}"
    if isinstance(error, errors.HfHubHTTPError):
        return explain_status(error)
    if isinstance(error, Short):
        return f"{error}", "the whole file", AGAIN
    if isinstance(error, json.JSONDecodeError):
        todo = "check HF_ENDPOINT, and whether a proxy answers instead"
        return "an answer that is no JSON", "the hub's API", todo
    if is_transport(error) or isinstance(error, ConnectionError | TimeoutError):
        words = scrubbed(" ".join(str(error).split())[:160]) or type(error).__name__
        return f"no connection ({words})", "the hub", f"check the network, then {AGAIN}"
    if isinstance(error, RuntimeError):  # hf_xet's own words, or huggingface_hub's
        words = scrubbed(" ".join(str(error).split())[:160])
        return f"a failed transfer ({words})", "an answer", AGAIN
    return None


def explain_status(error: Any) -> tuple[str, str, str]:
    """The same for an answer with an HTTP status that says no."""
    code = status(error)
    if code == 401:
        return f"HTTP 401{no_login() or ': the login is rejected'}", "a valid login", LOGIN
    if code == 403:
        return "HTTP 403: this login may not do that", "access to it", LOGIN
    if code == 404:
        return "HTTP 404: no such file there", "the file", "check the repository's page"
    if code == 429:
        return "HTTP 429: too many requests", "an answer", f"wait some minutes, then {AGAIN}"
    if code >= 500:
        return f"HTTP {code}: the hub has a fault", "an answer", f"wait, then {AGAIN}"
    return f"HTTP {code}", "an answer", AGAIN


def status(error: Exception) -> int:
    """The HTTP status that an error carries, or 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def is_transport(error: Exception) -> bool:
    """True for an error of the HTTP library itself: no connection, a timeout, a broken answer.

    hf_xet raises Python's own ConnectionError and TimeoutError instead.
    """
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def no_login() -> str:
    """Words to add when the user is not logged in."""
    from huggingface_hub import get_token

    return "" if get_token() else ", and no login"


def scrubbed(text: str) -> str:
    """`text` without anything that looks like a token, the user's own first."""
    from huggingface_hub import get_token

    for secret in filter(None, (get_token(),)):
        text = text.replace(secret, "[token]")
    return re.sub(r"(hf_|Bearer )\w+", "[token]", text)


# ---------------------------------------------------------------------------------- with patience


def is_passing(error: Exception) -> bool:
    """True for what may be over in a minute: lost connections, timeouts, 408, 429, 5xx."""
    code = status(error)
    if isinstance(error, Short) or code in (408, 429) or code >= 500:
        return True
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    lasting = ("LocalProtocolError", "UnsupportedProtocol", "ProxyError", "InvalidURL")
    return is_transport(error) and not code and type(error).__name__ not in lasting


def retry_after(error: Exception) -> float:
    """The seconds that the server asks to wait, or 0."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.isdigit() else 0.0


def say(error: Exception, seconds: float) -> None:
    """Tell, without breaking a progress bar, what is waited for."""
    found = (explain(error) or (type(error).__name__,))[0]
    tqdm.write(f"note: {found}; trying again in {seconds:.0f} s")


def patiently(
    attempt: Callable[[], T],
    patience: float,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], Any] = time.sleep,
) -> T:
    """Call `attempt` until it succeeds; between failures that pass, wait 1, 2, 4 … 60 seconds.

    Gives up, with the last error, when `progress` has stood still for `patience` seconds.
    """
    wait, waited, before = 1.0, 0.0, progress()
    while True:
        try:
            return attempt()
        except Exception as error:
            if progress() != before:
                wait, waited, before = 1.0, 0.0, progress()
            now = max(wait, retry_after(error))
            if not is_passing(error) or waited + now > patience:
                raise
            if now >= WORTH_SAYING:
                say(error, now)
        pause(now)
        wait, waited = min(wait * 2, LONGEST_WAIT), waited + now


# -------------------------------------------------------------------------------------- questions


def quiet(bars: bool = False) -> None:
    """Stop huggingface_hub's own warnings, and its bars: what they say is said here, in one line.

    With `bars` its progress bars stay, where stderr is a terminal.
    """
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not (bars and sys.stderr.isatty()):
        disable_progress_bars()


def model_info(repo: str, revision: str, files: bool, patience: float = 0) -> Any:
    """huggingface_hub's ModelInfo. Raises Stop when the hub does not give it."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, files_metadata=files, timeout=30)

    with clear_words(repo):
        return patiently(ask, patience)


def commit_of(repo: str, revision: str, patience: float = 0) -> str:
    """The commit hash that `revision` stands for now."""
    return model_info(repo, revision, False, patience).sha or ""


def listing(
    repo: str, revision: str, patience: float = 0, wanted: tuple[str, ...] = WANTED
) -> Listing:
    """The wanted files of `repo` at `revision`. Raises Stop when the hub does not give them."""
    info = model_info(repo, revision, True, patience)
    files = []
    for sibling in info.siblings or []:
        name = sibling.rfilename
        if any(fnmatch(name, pattern) for pattern in wanted):
            check_name(repo, name)
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            files.append(HubFile(name, sibling.size or 0, sha256, sibling.blob_id))
    if not files or not info.sha:
        raise Stop(f"hub: {repo}", "no file that the build reads", "a checkpoint", "check its name")
    return Listing(info.sha, tuple(files))


def check_name(repo: str, name: str) -> None:
    """Raise Stop for a file name that would lead out of the folder it is meant for."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in name:
        raise Stop(f"hub: {repo}", f"the file {name!r}", "a path inside a folder", "do not use it")


def tensors(repo: str, revision: str) -> dict[str, Tensor]:
    """Every tensor by name, read from the shards' headers by ranged requests.

    Paths are the shards' names; offsets count from the end of a shard's header.
    """
    from huggingface_hub import HfApi

    with clear_words(repo):
        metadata = HfApi().get_safetensors_metadata(repo, revision=revision)
    found = {}
    for file, of in metadata.files_metadata.items():
        for name, tensor in of.tensors.items():
            begin, end = tensor.data_offsets
            found[name] = Tensor(name, tensor.dtype, tuple(tensor.shape), Path(file), begin,
                                 end - begin)  # fmt: skip
    return found
