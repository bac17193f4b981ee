"""What the hub says of a repository, taken for no more than it is.

The JSON is read here and not by huggingface_hub, which believes in its form: each name, size and
hash that is taken from it is checked first.
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any
from urllib.parse import quote

from dsv4.hub import wire
from dsv4.hub.names import REFUSED, check_apart, check_name, is_hidden
from dsv4.hub.patience import patiently
from dsv4.hub.refusals import OTHER, clear_words, words
from dsv4.stop import Stop
from dsv4.storage import bounds
from dsv4.words import shown

# Everything that the build reads; weights in other formats and pictures stay where they are.
WANTED = ("*.safetensors", "*.json", "encoding/*", "LICENSE*", "README.md", "*.jinja")
LARGEST_FILE = 10**12  # bytes


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


def quiet(bars: bool = False) -> None:
    """Stop huggingface_hub's own warnings, and its bars: what they say is said here, in one line.

    With `bars` its progress bars stay, where stderr is a terminal.
    Raises Stop for settings in the environment with which it cannot work.
    """
    wire.install()
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not (bars and sys.stderr.isatty()):
        with warnings.catch_warnings(action="ignore"):  # of HF_HUB_DISABLE_PROGRESS_BARS=0
            disable_progress_bars()


def model_info(repo: str, revision: str, files: bool, patience: float = 0) -> dict[str, Any]:
    """The hub's JSON object on a revision, unchecked. Raises Stop when the hub does not give it."""

    def ask() -> dict[str, Any]:
        wire.session()
        from huggingface_hub import constants
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo)
        url = f"{constants.ENDPOINT}/api/models/{repo}/revision/{quote(revision, safe='')}"
        return wire.ask(url, {"blobs": True} if files else {})

    with clear_words(repo):
        return patiently(ask, patience)


def commit_of(repo: str, revision: str, patience: float = 0) -> str:
    """The commit hash that `revision` stands for now. Raises Stop when the hub does not say it."""
    return checked_commit(repo, model_info(repo, revision, False, patience))


def checked_commit(repo: str, info: dict[str, Any]) -> str:
    commit = info.get("sha")
    if not is_hash(commit, 40):
        raise odd(repo, f"the commit {shown(commit)}", "40 hexadecimal digits")
    return commit


def listing(
    repo: str, revision: str, patience: float = 0, wanted: tuple[str, ...] = WANTED
) -> Listing:
    """The wanted files of `repo` at `revision`, but for hidden ones, which are told and left.

    Raises Stop when the hub does not give them, and for names, sizes or hashes that are none.
    """
    info = model_info(repo, revision, True, patience)
    commit, hidden, files = checked_commit(repo, info), [], []
    for entry in entries(repo, info):
        name = entry["rfilename"]
        if not any(fnmatch(name, pattern) for pattern in wanted):
            continue
        if is_hidden(name):
            hidden.append(name)
            continue
        check_name(repo, name)
        files.append(file_of(repo, entry))
    check_apart(repo, (file.name for file in files))
    report_hidden(repo, hidden)
    if not files and "*" not in wanted:
        raise Stop(f"hub: {repo}", "no file that the build reads", "a checkpoint", "check its name")
    return Listing(commit, tuple(files))


def report_hidden(repo: str, names: list[str]) -> None:
    """Say which files stay on the hub because their names are our own records' kind."""
    told = [name for name in names if name != ".gitattributes"]
    if told:
        more = f" and {len(told) - 1:,} more" if len(told) > 1 else ""
        print(f"note: {repo}: hidden files are left alone: {words(told[0], 80)}{more}")


def entries(repo: str, info: dict[str, Any]) -> list[dict[str, Any]]:
    """The listing's entries, each with a name. Raises Stop for another form, or too many."""
    siblings = info.get("siblings")
    if not isinstance(siblings, list):
        raise odd(repo, f"a {type(siblings).__name__} as its files", "a list")
    if len(siblings) > bounds.FILES:
        raise Stop(f"hub: {repo}", f"{len(siblings):,} files", f"at most {bounds.FILES:,}", REFUSED)
    for entry in siblings:
        if not isinstance(entry, dict) or not isinstance(entry.get("rfilename"), str):
            raise odd(repo, f"the file {shown(entry)}", "a name, a size and a hash")
    return siblings


def file_of(repo: str, entry: dict[str, Any]) -> HubFile:
    """One file of the listing. Raises Stop for a size or a hash that is none."""
    name, size, lfs, git = (entry.get(key) for key in ("rfilename", "size", "lfs", "blobId"))
    what = words(name)
    if type(size) is not int or not 0 <= size <= LARGEST_FILE:
        raise odd(repo, f"{what} with the size {shown(size)}", f"bytes, at most {LARGEST_FILE:,}")
    if lfs is not None and not (isinstance(lfs, dict) and is_hash(lfs.get("sha256"), 64)):
        raise odd(repo, f"{what} with the hash {shown(lfs)}", "64 hexadecimal digits")
    if (lfs is None or git is not None) and not is_hash(git, 40):
        raise odd(repo, f"{what} with the hash {shown(git)}", "40 hexadecimal digits")
    return HubFile(name, size, lfs["sha256"] if lfs else None, git)


def is_hash(value: Any, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


def odd(repo: str, found: str, expected: str) -> Stop:
    """What to raise for a listing that no hub gives."""
    return Stop(f"hub: {repo}", found, expected, OTHER)
