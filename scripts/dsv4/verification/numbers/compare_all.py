"""Level 2: compare every number of a bundle and hash its files (SHA-256).

Each shard is hashed, and then its tensors are compared, so that most bytes are read from the page
cache the second time. Tensors are read in blocks of rows, which limits the memory.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsv4.errors import with_path
from dsv4.hub.provenance import is_published
from dsv4.model import mtp
from dsv4.model.bundle_tensors import weights_of
from dsv4.model.names import ROUTER, most_zeros, parse_expert
from dsv4.quantization.imatrix import EVEN, Importance
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.holes import HoleDetector
from dsv4.storage.limits import DOCUMENT
from dsv4.storage.safetensors_file import Tensor
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers.compare import Comparer
from dsv4.verification.numbers.pruned import Kept, kept_experts, select_rows
from dsv4.verification.numbers.tasks import Task, TensorResult, make_tasks
from dsv4.verification.numbers.unquantized import scan_values
from dsv4.verification.scan import Scan

HASH_BYTES = 4 << 20
JOB_BYTES = 64 << 20  # of the bundle, in one job of a thread


@dataclass
class Numbers:
    """Level 2's result: one for each tensor, and the SHA-256 of each file.

    compared: with a source; recorded: the quantizer that the shards name; recomputable: whether
    this version can reproduce its bytes; left_out: source tensors that were not compared; holes:
    tensors with more zeros than any model has → the byte of their file where these begin.
    """

    results: list[TensorResult]
    hashes: dict[str, str]
    compared: bool
    recorded: str | None = None
    recomputable: bool = False
    left_out: tuple[str, ...] = ()
    holes: dict[Tensor, int] = field(default_factory=dict)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with with_path(path), path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def base_of(name: str) -> str:
    """Return a tensor's name without `.weight`, `.scale` and the like."""
    return name.rpartition(".")[0]


class TensorWorker:
    """Does jobs in any thread; each thread has its own open files."""

    def __init__(
        self, bundle: Scan, importance: Importance, progress: Callable[[int], object]
    ) -> None:
        self.comparer = Comparer(bundle, importance)
        self._progress = progress
        self._local = threading.local()
        self._readers: list[tuple[TensorReader, HoleDetector]] = []

    @property
    def holes(self) -> dict[Tensor, int]:
        """Tensors of source and bundle with too many zeros → the byte where they begin.

        Without those of a source file with the hub's hash, and what was made of them.
        """
        found = {tensor: at for _, hole in self._readers for tensor, at in hole.holes.items()}
        published = {base_of(t.name) for t in found if is_published(t.path)}
        return {tensor: at for tensor, at in found.items() if base_of(tensor.name) not in published}

    def do(self, job: Path | list[Task | Tensor]) -> str | list[TensorResult]:
        """Hash a file, or compare some tensors (without a source: scan their values)."""
        if isinstance(job, Path):
            return sha256(job)
        results = []
        for item in job:
            compare = self.comparer.compare if isinstance(item, Task) else scan_values
            results.append(compare(item, self._reader()))
            self._progress(item.nbytes)
        return results

    def _reader(self) -> TensorReader:
        if not hasattr(self._local, "reader"):
            detector = HoleDetector(most_zeros)
            self._local.reader = TensorReader(detector)
            self._readers.append((self._local.reader, detector))
        return self._local.reader

    def close(self) -> None:
        """Close all files."""
        for reader, _ in self._readers:
            reader.close()


def read_numbers(
    bundle: Scan,
    source: Checkpoint | None,
    jobs: int,
    progress: Callable[[int], object],
    importance: Importance = EVEN,
) -> Numbers:
    """Compare (without a source: scan) every tensor and hash the files, with `jobs` threads.

    Calls `progress` with the number of bundle bytes of each tensor done. importance: of the imatrix
    that the bundle was made with. Raises UserError for a read that fails.
    """
    worker = TensorWorker(bundle, importance, progress)
    kept = kept_experts(bundle, source) if source else {}
    work = list(make_jobs(bundle, source and without_experts(source, kept), kept))
    results: list[TensorResult] = []
    hashes: dict[str, str] = {}
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    with contextlib.closing(worker), pool:
        for job, answer in zip(work, pool.map(worker.do, work), strict=True):
            if isinstance(job, Path):
                hashes[job.relative_to(bundle.checkpoint.folder).as_posix()] = answer
            else:
                results += answer
    comparer = worker.comparer
    return Numbers(
        results,
        hashes,
        compared=source is not None,
        recorded=comparer.recorded,
        recomputable=comparer.quantizer is not None,
        left_out=not_compared(bundle, source, results, kept) if source else (),
        holes=worker.holes,
    )


def without_experts(source: Checkpoint, kept: Kept) -> Checkpoint:
    """Return the source with only the kept experts' rows in the routers of pruned layers."""
    fewer = Checkpoint(source.folder, source.config, source.weight_map, source.shards)
    tensors = dict(source.tensors)
    for block, numbers in kept.items():
        for name in (f"{block}{router}" for router in ROUTER):
            if numbers and name in tensors:
                tensors[name] = select_rows(tensors[name], numbers)
    fewer.__dict__["tensors"] = tensors
    return fewer


def not_compared(
    bundle: Scan, source: Checkpoint, results: list[TensorResult], kept: Kept
) -> tuple[str, ...]:
    """Return the source tensors without a result, except experts and MTP that were left out."""
    compared, bases = {result.name for result in results}, set(bundle.bases)

    def is_expected(name: str) -> bool:
        expert = parse_expert(name)
        if expert is None:
            return bundle.has_mtp or not mtp.is_mtp(name)
        block = f"{expert[0]}.{expert[1]}"
        return kept[block] is None if block in kept else name.removesuffix(".weight") in bases

    return tuple(n for n in weights_of(source.tensors) if n not in compared and is_expected(n))


def visible_files(files: Iterable[str]) -> list[str]:
    """Return the files of a bundle, without hidden ones and Python's caches, sorted."""
    return sorted(
        file
        for file in files
        if not any(part.startswith(".") or part == "__pycache__" for part in file.split("/"))
    )


def files_to_hash(bundle: Scan) -> list[str]:
    """Return the files to hash: visible shards of the index, and files up to DOCUMENT bytes."""
    shards = bundle.checkpoint.shards
    return [f for f in visible_files(bundle.files) if f in shards or bundle.files[f] <= DOCUMENT]


def all_tensors(bundle: Scan) -> list[Tensor]:
    """Return every tensor, with each expert of a stack, and those of unknown names."""
    disk = bundle.checkpoint.tensors
    foreign = {*bundle.view.recognized.unknown, *bundle.view.odd}
    foreign |= {name for names in bundle.view.recognized.others.values() for name in names}
    foreign -= set(bundle.tensors)
    return [*bundle.tensors.values(), *(disk[name] for name in sorted(foreign) if name in disk)]


def make_jobs(
    bundle: Scan, source: Checkpoint | None, kept: Kept
) -> Iterator[Path | list[Task | Tensor]]:
    """Yield the jobs in order: each file to hash, then the tensors whose weights it holds.

    Tensors of at least JOB_BYTES come first, so that none of them is the last job of its file.
    """
    work: dict[str, list[tuple[int, Task | Tensor]]] = {}
    for item in make_tasks(bundle, source, kept) if source else all_tensors(bundle):
        tensor = item.main if isinstance(item, Task) else item
        work.setdefault(tensor.path.name, []).append((tensor.offset, item))
    for file in files_to_hash(bundle):
        yield bundle.checkpoint.folder / file
        job, size = [], 0
        items = work.get(file, [])
        for _, item in sorted(items, key=lambda pair: (pair[1].nbytes < JOB_BYTES, pair[0])):
            job.append(item)
            size += item.nbytes
            if size >= JOB_BYTES:
                yield job
                job, size = [], 0
        if job:
            yield job
