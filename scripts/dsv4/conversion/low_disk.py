"""Fetch the source's shards when they are needed, and delete them when they have been used.

A conversion with LOW_DISK=1 never has the whole source on the disk. The download stage fetches the
small files and every shard's header (kept in SOURCE/.headers), from which the whole bundle can be
planned. The conversion then fetches the shards that the next shard of the bundle needs. Their names
are written into SOURCE/.download.json before the first byte arrives. Only such shards are deleted.
A shard that was there before is used and kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dsv4.errors import UserError, renamed_path, with_path
from dsv4.hub import download, remote_headers, repository
from dsv4.hub.download import at_pin, fetch_all
from dsv4.hub.file_transfer import Transfer, file_hash
from dsv4.hub.provenance import HEADERS, Record, read_record
from dsv4.model.source import open_headers, open_source
from dsv4.settings import add_setting, parse_jobs, parse_seconds
from dsv4.storage import limits, locks, safe_paths
from dsv4.storage.atomic import copy_file, write_bytes
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_index
from dsv4.storage.safetensors_file import Tensor, read_shard, sample_ranges
from dsv4.storage.shard_writer import NewShard, Piece, WorkerBuffers, bypass_cache, drop_page_cache

WORKERS = 8
KEPT = limits.HEADER + limits.MIB  # bytes of a header with its samples
AGAIN = "run download again, with LOW_DISK=1"


# --- Headers --------------------------------------------------------------------------------------


def fetch_headers(source: Path, record: Record, patience: float) -> int:
    """Fetch header and three samples of every shard in the index. Return how many were fetched.

    A file in SOURCE/.headers holds a shard's bytes up to its data, then the samples that
    `fingerprint` reads.
    """
    folder = headers_folder(source)
    names = sorted(set(read_index(source).values()))
    missing = [name for name in names if not (folder / name).is_file()]

    def fetch_header(name: str) -> None:
        file = record.files[name]
        head = remote_headers.read_header(record.repo, record.commit, file, patience)
        head = head[: header_length(head)]
        with tempfile.TemporaryDirectory(prefix="header-") as work:
            ranges = sample_ranges(read_shard(write_sparse(Path(work) / name, head, file.size)))
        data = [head]
        for first, nbytes in ranges:
            end = first + nbytes
            data.append(
                remote_headers.read_range(record.repo, record.commit, file, first, end, patience)
            )
        write_bytes(folder / name, b"".join(data), source)

    with at_pin(source, record), ThreadPoolExecutor(WORKERS) as pool:
        for _ in pool.map(fetch_header, missing):
            pass
    return len(missing)


def headers_folder(source: Path) -> Path:
    """Return SOURCE/.headers. Raises UserError when that is a link or not a folder."""
    safe_paths.expect_type(source, HEADERS, safe_paths.DIRECTORY, safe_paths.NOTHING)
    return source / HEADERS


def write_sparse(path: Path, head: bytes, size: int) -> Path:
    """Write a sparse file of `size` bytes that begins with `head`."""
    with with_path(path), path.open("wb") as out:
        out.write(head)
        out.truncate(size)
    return path


@contextlib.contextmanager
def header_checkpoint(source: Path, record: Record) -> Iterator[Checkpoint]:
    """Yield the source as a checkpoint of headers and samples in a temporary folder.

    Raises UserError when a header is missing, or the headers describe an incomplete source.
    """
    with tempfile.TemporaryDirectory(prefix="skeleton-") as work:
        for name in ("config.json", INDEX):
            copy_file(source / name, Path(work) / name)
        for name in sorted(set(read_index(source).values())):
            kept = headers_folder(source) / name
            if name not in record.files or not kept.is_file():
                raise UserError(f"{kept}", "no such header", "one for each shard", AGAIN)
            fill_header_file(
                Path(work) / name, limits.read_bounded(kept, KEPT), record.files[name].size
            )
        with renamed_path(Path(work), f"{source}"):
            headers = open_headers(Path(work))
        yield headers


def fill_header_file(path: Path, kept: bytes, size: int) -> None:
    """Write one sparse shard: its header, and the samples at their offsets."""
    rest = kept[header_length(kept) :]
    write_sparse(path, kept[: header_length(kept)], size)
    with with_path(path), path.open("r+b") as out:
        for first, nbytes in sample_ranges(read_shard(path)):
            out.seek(first)
            out.write(rest[:nbytes])
            rest = rest[nbytes:]


def header_length(head: bytes) -> int:
    """Return the bytes of a shard before its data."""
    return 8 + int.from_bytes(head[:8], "little")


def with_folder(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Return a copy whose tensor paths point into `folder`, where shards will be downloaded."""
    shards = {}
    for name, shard in checkpoint.shards.items():
        path = folder / name
        tensors = {n: replace(tensor, path=path) for n, tensor in shard.tensors.items()}
        shards[name] = replace(shard, path=path, tensors=tensors)
    return Checkpoint(folder, checkpoint.config, checkpoint.weight_map, shards)


# --- Shards ---------------------------------------------------------------------------------------


@dataclass
class ShardFetcher:
    """Fetch shards into the source folder, and delete those that were fetched."""

    folder: Path
    record: Record
    patience: float
    workers: int

    def has(self, name: str) -> bool:
        """Return True when the shard is there, verified and unchanged."""
        return self.record.is_verified(self.folder, name)

    def read(self, tensor: Tensor, first: int, nbytes: int) -> np.ndarray:
        """Read some bytes of a tensor from the hub, before any shard is fetched."""
        file, begin = self.record.files[tensor.path.name], tensor.offset + first
        data = remote_headers.read_range(
            self.record.repo, self.record.commit, file, begin, begin + nbytes, self.patience
        )
        return np.frombuffer(data, np.uint8)

    def size(self, names: set[str]) -> int:
        """Return the bytes of these shards."""
        return sum(self.record.files[name].size for name in names)

    @contextlib.contextmanager
    def fetching(self, names: set[str]) -> Iterator[None]:
        """Fetch shards while the body runs, and wait for them at its end.

        Raises the errors of fetching. When the body raises, the transfer stops and keeps its data.
        """
        commit, failed = self.record.commit, []
        transfer = Transfer(self.record.repo, commit, self.folder, self.patience, lambda n: None)

        def work() -> None:
            try:
                self._fetch(names, transfer)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        except BaseException:
            transfer.stopped.set()
            raise
        finally:
            thread.join()
        if failed:
            raise failed[0]

    def _fetch(self, names: set[str], transfer: Transfer) -> None:
        missing = sorted(name for name in names if not self.has(name) and not self._adopt(name))
        if missing:
            self.record.low_disk.update(dict.fromkeys(missing, "fetched"))
            self.record.write(self.folder)
            files = [self.record.files[name] for name in missing]
            fetch_all(transfer, self.record, files, self.workers)
        for name in missing:
            self._check_header(name)

    def _adopt(self, name: str) -> bool:
        """Verify a shard that is there already, and return True if it is right.

        A wrong one is renamed to NAME.bad.
        """
        path, file = self.folder / name, self.record.files[name]
        if not path.is_file():
            return False
        if path.stat().st_size == file.size and file_hash(path, file) == file.digest:
            self.record.set_verified(self.folder, name)
            self.record.write(self.folder)
            return True
        safe_paths.move(self.folder, name, name + ".bad")
        return False

    def _check_header(self, name: str) -> None:
        """Raise UserError unless the shard has the header that the plan was made from."""
        kept = limits.read_bounded(self.folder / HEADERS / name, KEPT)
        head = kept[: header_length(kept)]
        with with_path(self.folder / name), (self.folder / name).open("rb") as file:
            if file.read(len(head)) != head:
                raise UserError(
                    f"{self.folder / name}", "another header than the one that was planned with",
                    "the same", f"delete {self.folder / HEADERS}, then {AGAIN}",
                )  # fmt: skip

    def keep_only(self, needed: set[str]) -> None:
        """Delete the shards that LOW_DISK fetched, unless they are in `needed`.

        A shard that was changed since it was fetched is kept.
        """
        changed = False
        for name, state in self.record.low_disk.items():
            ours = self.has(name) or not (self.folder / name).exists()
            if state == "fetched" and ours and name not in needed:
                safe_paths.remove(self.folder, name)
                self.record.low_disk[name] = "freed"
                self.record.verified.pop(name, None)
                changed = True
        if changed:
            self.record.write(self.folder)


# --- Options, and comparison with the disk --------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for a source whose shards are fetched as they are needed."""
    add_setting(parser, "LOW_DISK", help="fetch and free the source's shards as it goes")
    add_setting(parser, "REPO", default="", help="--low-disk: where they come from")
    parser.add_argument("--patience", type=parse_seconds, default=download.PATIENCE,
                        metavar="SECONDS",
                        help="--low-disk: how long to try again while nothing comes")  # fmt: skip
    parser.add_argument("--workers", type=parse_jobs, default=download.WORKERS,
                        help="--low-disk: files fetched at once")  # fmt: skip


@contextlib.contextmanager
def open_checkpoints(
    folder: Path, low_disk: bool, repo: str, patience: float, workers: int
) -> Iterator[tuple[Checkpoint, Checkpoint, ShardFetcher | None]]:
    """Yield the source, a checkpoint of its headers, and with low_disk a ShardFetcher, else None.

    Raises UserError when low_disk is set and no download from `repo` was prepared.
    """
    if not low_disk:
        source = open_source(folder)
        yield source, source, None
        return
    record = read_record(folder)
    if not repo or record is None or record.repo != repo:
        found = f"{record.repo}" if record else "no download prepared"
        raise UserError(f"{folder}", found, f"{repo or 'a repository'}", AGAIN)
    repository.quiet()
    fetcher = ShardFetcher(folder, record, patience, workers)
    with locks.locked(folder), header_checkpoint(folder, record) as headers:
        yield with_folder(headers, folder), headers, fetcher


def compare_shard(shard: NewShard, jobs: int) -> None:
    """Compute every byte of a finished shard again from the source, and compare it with the disk.

    Raises UserError at the first difference.
    """
    with shard.path.open("rb", buffering=0) as file:
        bypass_cache(file.fileno())  # so that the disk answers, not the page cache
        drop_page_cache(file.fileno(), 0, 0)

        def compare(pieces: list[Piece]) -> None:
            with contextlib.closing(WorkerBuffers()) as buffers:
                for piece in pieces:
                    for offset, data in piece.blocks(buffers):
                        compare_bytes(file.fileno(), shard.path, offset, memoryview(data).cast("B"))

        compare_bytes(file.fileno(), shard.path, 0, memoryview(shard.header))
        pieces = shard.pieces()
        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(compare, [pieces[i::jobs] for i in range(jobs)]):
                pass


def compare_bytes(fd: int, path: Path, offset: int, expected: memoryview) -> None:
    """Raise UserError unless the file holds the expected bytes at `offset`."""
    with with_path(path):
        found = os.pread(fd, len(expected), offset)
    if found != expected:
        raise UserError(
            f"{path}", f"other bytes on the disk than were written at {offset:,}",
            "the same", "check the disk and memory, delete this shard, then run it again",
        )  # fmt: skip
