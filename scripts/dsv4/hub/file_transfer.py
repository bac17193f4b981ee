"""One file from the hub, resumed where it stopped, whatever stopped it.

hf_hub_download of huggingface_hub 2.4.0 cannot resume inside a file: it writes to a temporary of a
random name and deletes that on any failure, so a lost connection or a reboot costs up to a shard
(3.5 GB). Its http_get can: here it appends to a partial file that is named by the content that it
will have.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dsv4.errors import UserError, with_path
from dsv4.hub import http
from dsv4.hub.hub_errors import translated
from dsv4.hub.repository import HubFile
from dsv4.hub.retry import with_retries
from dsv4.storage import filesystem, safe_paths

CHUNK = 4 << 20
Advance = Callable[[int], Any]  # told how many bytes came (or, negative, were thrown away)


class Interrupted(Exception):
    """Another transfer failed, or the user pressed Ctrl-C: stop, keeping what came."""


def partial_for(path: Path, file: HubFile) -> Path:
    """Return the partial file of `path`: hidden, beside it, named by its content."""
    return path.with_name(f".{path.name}.{file.digest[:12]}.partial")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def file_hash(path: Path, file: HubFile, advance: Advance = lambda n: None) -> str:
    """Return the hash of `path` in the kind that the hub knows `file` by."""
    digest = hashlib.sha256()
    if not file.sha256:
        digest = hashlib.sha1(b"blob %d\0" % size_of(path), usedforsecurity=False)
    with with_path(path), path.open("rb") as reader:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


class Transfer:
    """Fetches files of one repository at one commit into `folder`."""

    def __init__(
        self, repo: str, commit: str, folder: Path, patience: float, advance: Advance
    ) -> None:
        self.repo, self.commit, self.folder = repo, commit, folder
        self.patience, self.advance = patience, advance
        self.stopped = threading.Event()

    def fetch(self, file: HubFile) -> None:
        """Bring `file` to its place, with the hub's size and hash, durably.

        A resumed file with a wrong hash is fetched once more from its beginning: a machine that
        lost power may leave a partial file whose end was never written. Raises UserError when it is
        wrong again.
        """
        path = self.folder / file.name
        safe_paths.expect_type(
            self.folder, file.name, safe_paths.FILE, safe_paths.LINK, safe_paths.NOTHING
        )
        partial = partial_for(path, file)
        safe_paths.expect_type(
            self.folder, self._name(partial), safe_paths.FILE, safe_paths.NOTHING
        )
        resumed = size_of(partial) > 0
        self._fill(file, partial)
        found = file_hash(partial, file)
        if found != file.digest and resumed:
            self._drop(partial)
            self._fill(file, partial)
            found = file_hash(partial, file)
        if found != file.digest:
            self._drop(partial)
            raise UserError(
                f"hub: {self.repo}: {file.name}", f"bytes with the hash {found[:16]}…",
                f"{file.digest[:16]}… by the hub's list", "run the same command again; if this "
                "stays, something on the way changes the bytes",
            )  # fmt: skip
        with self._open(partial) as written:
            filesystem.flush(written.fileno(), partial)
        safe_paths.move(self.folder, self._name(partial), file.name)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _open(self, partial: Path) -> IO[bytes]:
        """Open a partial file for appending. Raises UserError for a link or another's file."""
        flags = os.O_WRONLY | os.O_APPEND
        return os.fdopen(safe_paths.open_regular(self.folder, self._name(partial), flags), "ab")

    def _drop(self, partial: Path) -> None:
        self.advance(-size_of(partial))
        safe_paths.remove(self.folder, self._name(partial))

    def _fill(self, file: HubFile, partial: Path) -> None:
        """Append to `partial` until it has the file's size. Raises UserError when that cannot
        be."""
        if size_of(partial) > file.size:
            self._drop(partial)

        def attempt() -> None:
            with with_path(partial), self._open(partial) as out:
                http.resume(self.repo, file.name, self.commit, out, file.size, self._count)

        with translated(self.repo):
            with_retries(attempt, self.patience, lambda: size_of(partial), self.stopped.wait)

    def _count(self, nbytes: int) -> None:
        """Report progress. Raises Interrupted once the transfer shall stop."""
        if self.stopped.is_set():
            raise Interrupted
        self.advance(nbytes)
