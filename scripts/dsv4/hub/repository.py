"""A repository of the hub: its commit, and its files with sizes and hashes.

Names, sizes and hashes of a listing are validated before anything is done with them.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from dsv4.errors import UserError
from dsv4.hub import http
from dsv4.hub.hub_errors import OTHER, one_line, translated
from dsv4.hub.retry import with_retries
from dsv4.storage import safe_paths
from dsv4.storage.atomic import TEMPORARY_SUFFIX
from dsv4.text import short_repr

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

ROOT_FILES = ("*.safetensors", "*.json", "LICENSE*", "README.md", "*.jinja")
TIMEOUT = 30  # seconds for a listing


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


def is_source_file(name: str) -> bool:
    """True for what the build reads: files of the root, and encoding/.

    Which of the shards are wanted, the index says (`download.select_shards`).
    """
    of_root = "/" not in name and any(fnmatch(name, pattern) for pattern in ROOT_FILES)
    return of_root or name.startswith("encoding/")


def is_any_file(name: str) -> bool:
    """True for every name: to list a whole repository."""
    return True


def quiet(bars: bool = False) -> None:
    """Stop huggingface_hub's warnings and progress bars: both are printed here, in one line.

    With `bars` its progress bars stay, where stderr is a terminal.
    Raises UserError for settings in the environment with which it cannot work.
    """
    http.install()
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not (bars and sys.stderr.isatty()):
        with warnings.catch_warnings(action="ignore"):  # of HF_HUB_DISABLE_PROGRESS_BARS=0
            disable_progress_bars()


def model_info(repo: str, revision: str, files: bool, patience: float) -> ModelInfo:
    """Ask the hub about a revision. Raises UserError when it does not answer, or with no commit."""
    http.check_login()
    from huggingface_hub import HfApi

    def ask() -> ModelInfo:
        return HfApi().model_info(repo, revision=revision, files_metadata=files, timeout=TIMEOUT)

    with translated(repo):
        info = with_retries(ask, patience)
    if not is_hash(info.sha, 40):
        raise malformed(repo, f"the commit {short_repr(info.sha)}", "40 hexadecimal digits")
    return info


def commit_of(repo: str, revision: str, patience: float = 0) -> str:
    """Return the commit hash that `revision` stands for now. Raises UserError as `model_info`
    does."""
    return model_info(repo, revision, False, patience).sha


def listing(
    repo: str,
    revision: str,
    patience: float = 0,
    wanted: Callable[[str], bool] = is_source_file,
) -> Listing:
    """List the wanted files of `repo` at `revision`, but for hidden ones.

    Raises UserError when the hub does not give them, and for invalid names, sizes and hashes.
    """
    info = model_info(repo, revision, True, patience)
    siblings = [s for s in info.siblings or [] if wanted(s.rfilename)]
    files = [file_of(repo, s) for s in siblings if not is_hidden(s.rfilename)]
    if not files and wanted is is_source_file:
        raise UserError(
            f"hub: {repo}", "no file that the build reads", "a checkpoint", "check its name"
        )
    return Listing(info.sha, tuple(files))


def is_hidden(name: str) -> bool:
    """True for a name of which a part begins with a dot, or that ends as a temporary's does.

    Records, backups, locks and temporaries of the stages have such names: a hub's must not pass
    for them.
    """
    parts = name.split("/")
    return name.endswith(TEMPORARY_SUFFIX) or any(p.startswith(".") and p != ".." for p in parts)


def file_of(repo: str, sibling: RepoSibling) -> HubFile:
    """Return one file of a listing. Raises UserError for an invalid name, size or hash."""
    name, size, lfs, git = sibling.rfilename, sibling.size, sibling.lfs, sibling.blob_id
    safe_paths.check_name(f"hub: {repo}", name)
    if type(size) is not int or size < 0:
        raise malformed(repo, f"{one_line(name)} with the size {short_repr(size)}", "bytes")
    found, digits = (lfs.sha256, 64) if lfs else (git, 40)
    if not is_hash(found, digits):
        raise malformed(repo, f"{one_line(name)} with the hash {short_repr(found)}",
                        f"{digits} hexadecimal digits")  # fmt: skip
    return HubFile(name, size, lfs.sha256 if lfs else None, git)


def is_hash(value: Any, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def malformed(repo: str, found: str, expected: str) -> UserError:
    """Return the error for a listing that no hub gives."""
    return UserError(f"hub: {repo}", found, expected, OTHER)
