"""Level 2: every number of a bundle, and its files' SHA-256.

The work is cut by shards: a worker hashes a shard and then compares the tensors whose weight lies
in it, so that most bytes come from the page cache the second time. Memory stays flat: tensors are
read in blocks of rows.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dsv4.checkpoint import Checkpoint
from dsv4.compare import Comparer, Outcome, Reader, Task, look_at, make_tasks
from dsv4.shard import Tensor
from dsv4.survey import Survey

HASH_BYTES = 4 << 20


@dataclass
class Numbers:
    """Level 2's result: an outcome for each tensor, SHA-256 for each file, bytes read."""

    outcomes: list[Outcome]
    hashes: dict[str, str]
    nbytes: int
    compared: bool
    recorded: str | None = None
    recomputable: bool = False


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def read_numbers(
    bundle: Survey, source: Checkpoint | None, jobs: int, progress: Callable[[int], object]
) -> Numbers:
    """Compare or look at every tensor and hash every file, shard by shard, with `jobs` threads.

    `progress` is told the bytes of the bundle that were done. Raises Stop for a read that fails.
    """
    comparer = Comparer(bundle)
    work = cut_by_shard(bundle, source)
    local = threading.local()
    readers: list[Reader] = []

    def reader() -> Reader:
        if not hasattr(local, "reader"):
            local.reader = Reader()
            readers.append(local.reader)
        return local.reader

    def do(file: str) -> tuple[str, list[Outcome]]:
        digest = sha256(bundle.checkpoint.folder / file)
        outcomes = []
        for one in work.get(file, []):
            if isinstance(one, Task):
                outcomes.append(comparer.compare(one, reader()))
            else:
                outcomes.append(look_at(bundle, one, reader()))
            progress(one.nbytes)
        return digest, outcomes

    files = sorted(bundle.files)
    outcomes: list[Outcome] = []
    hashes: dict[str, str] = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for file, (digest, found) in zip(files, pool.map(do, files), strict=True):
            hashes[file] = digest
            outcomes += found
    for one in readers:
        one.close()
    return Numbers(
        outcomes,
        hashes,
        bundle.checkpoint.nbytes,
        source is not None,
        comparer.recorded,
        comparer.quantizer is not None,
    )


def cut_by_shard(bundle: Survey, source: Checkpoint | None) -> dict[str, list[Task | Tensor]]:
    """Shard → the tasks whose weight lies in it, in the order of the file."""
    work: dict[str, list[Task | Tensor]] = {}
    items: Iterable[Task | Tensor] = (
        make_tasks(bundle, source) if source else bundle.checkpoint.tensors.values()
    )
    for one in items:
        tensor = one.parts["weight"] if isinstance(one, Task) else one
        work.setdefault(tensor.path.name, []).append(one)
    for tasks in work.values():
        tasks.sort(key=lambda one: (one.parts["weight"] if isinstance(one, Task) else one).offset)
    return work
