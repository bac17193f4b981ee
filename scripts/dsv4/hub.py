"""What the hub says of the source repository, through huggingface_hub, in clear words.

The login is the user's own (`hf auth login` or HF_TOKEN); it is never read, printed or passed on
here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from dsv4.stop import Stop

# Everything that the build reads; weights in other formats and pictures stay where they are.
WANTED = ("*.safetensors", "*.json", "encoding/*", "LICENSE*", "README.md", "*.jinja")


@dataclass(frozen=True)
class HubFile:
    """A file of the repository: size in bytes, SHA-256 where the hub knows it (LFS), else None."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The wanted files of one revision, and the commit hash that the revision stands for."""

    commit: str
    files: tuple[HubFile, ...]


AGAIN = "run the same command again: it resumes"
LOGIN = "`hf auth login`, with an account that has access"


@contextlib.contextmanager
def clear_words(repo: str) -> Iterator[None]:
    """Turn huggingface_hub's and its transport's exceptions into a Stop of one line each."""
    try:
        yield
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        found, todo = explained
        raise Stop(f"hub: {repo}", found, "a readable repository", todo) from error


def explain(error: Exception) -> tuple[str, str] | None:
    """(what was found, what to do) for an error of the hub or the network, None for any other."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "a gated repository", f"accept its conditions on its page, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or one that needs a login", f"check REPO, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision", "check REVISION"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no login", LOGIN
    response = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        code = response.status_code
        return f"HTTP {code}", LOGIN if code in (401, 403) else AGAIN
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "no connection", f"check the network, then {AGAIN}"
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
        text = " ".join(str(error).split())[:160] or type(error).__name__
        return f"no connection ({text})", f"check the network, then {AGAIN}"
    return None


def listing(repo: str, revision: str) -> Listing:
    """The wanted files of `repo` at `revision`. Raises Stop when the hub does not give them."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi

    with clear_words(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = []
    for sibling in info.siblings or []:
        if any(fnmatch(sibling.rfilename, pattern) for pattern in WANTED):
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            files.append(HubFile(sibling.rfilename, sibling.size or 0, sha256))
    return Listing(info.sha or revision, tuple(files))


def tensor_shapes(repo: str, revision: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor, read from the shards' headers by ranged requests."""
    from huggingface_hub import HfApi

    with clear_words(repo):
        metadata = HfApi().get_safetensors_metadata(repo, revision=revision)
    return [
        (name, tensor.dtype, tuple(tensor.shape))
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    ]
