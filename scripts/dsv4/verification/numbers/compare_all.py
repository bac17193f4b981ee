"""Level 2: compare every number of a bundle and hash its files (SHA-256).

The work goes shard by shard: each is hashed, and then the tensors whose weight lies in it are
compared, so that most bytes come from the page cache the second time. Memory stays flat: tensors
are read in blocks of rows.
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
from dsv4.model.bundle_tensors import weights_of
from dsv4.model.names import most_zeros, parse_expert
from dsv4.quantization.imatrix import EVEN, Importance
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.holes import HoleDetector
from dsv4.storage.limits import DOCUMENT
from dsv4.storage.safetensors_file import Tensor
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers.compare import Comparer
from dsv4.verification.numbers.pruned import Kept, kept_experts, select_rows
from dsv4.verification.numbers.tasks import Task, TensorResult, make_tasks
from dsv4.verification.numbers.without_source import scan_values
from dsv4.verification.scan import Scan

HASH_BYTES = 4 << 20
JOB_BYTES = 64 << 20  # of the bundle, compared by one thread before it takes the next job


@dataclass
class Numbers:
    """Level 2's result: an outcome for each tensor, and the SHA-256 of each file.

    compared: with a source; recorded: the quantizer that the shards name; recomputable: whether it
    is one whose bytes can be made again here; left_out: source tensors that were not compared;
    holes: tensors with zeros where no model has any, and the byte of their file from which on.
    """

    outcomes: list[TensorResult]
    hashes: dict[str, str]
    compared: bool
    recorded: str | None = None
    recomputable: bool = False
    left_out: tuple[str, ...] = ()
    holes: dict[Tensor, int] = field(default_factory=dict)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with with_path(path), path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


class TensorWorker:
    """Does jobs in any thread; each thread has files of its own open."""

    def __init__(
        self, bundle: Scan, importance: Importance, progress: Callable[[int], object]
    ) -> None:
        self.comparer = Comparer(bundle, importance)
        self._progress = progress
        self._local = threading.local()
        self._readers: list[TensorReader] = []
        self._watches: list[HoleDetector] = []

    @property
    def holes(self) -> dict[Tensor, int]:
        """Tensors of source and bundle with zeros where no model has any → from which byte on."""
        return {tensor: at for watch in self._watches for tensor, at in watch.holes.items()}

    def do(self, job: Path | list[Task | Tensor]) -> str | list[TensorResult]:
        """Hash a file, or compare (without a source: look at) some tensors."""
        if isinstance(job, Path):
            return sha256(job)
        outcomes = []
        for one in job:
            if isinstance(one, Task):
                outcomes.append(self.comparer.compare(one, self._reader()))
            else:
                outcomes.append(scan_values(one, self._reader()))
            self._progress(one.nbytes)
        return outcomes

    def _reader(self) -> TensorReader:
        if not hasattr(self._local, "reader"):
            watch = HoleDetector(most_zeros)  # local, so that no two threads share one
            self._local.reader = TensorReader(watch)
            self._watches.append(watch)
            self._readers.append(self._local.reader)
        return self._local.reader

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()


def read_numbers(
    bundle: Scan,
    source: Checkpoint | None,
    jobs: int,
    progress: Callable[[int], object],
    importance: Importance = EVEN,
) -> Numbers:
    """Compare or look at every tensor and hash the files, shard by shard, with `jobs` threads.

    `progress` is told the bytes of the bundle that were done. importance: of the imatrix that
    the bundle was made with. Raises UserError for a read that fails.
    """
    worker = TensorWorker(bundle, importance, progress)
    kept = kept_experts(bundle, source) if source else {}
    work = list(make_jobs(bundle, source and without_experts(source, kept), kept))
    outcomes: list[TensorResult] = []
    hashes: dict[str, str] = {}
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    with contextlib.closing(worker), pool:
        for job, answer in zip(work, pool.map(worker.do, work), strict=True):
            if isinstance(job, Path):
                hashes[job.relative_to(bundle.checkpoint.folder).as_posix()] = answer
            else:
                outcomes += answer
    comparer = worker.comparer
    left_out = not_compared(bundle, source, outcomes, kept) if source else ()
    known = comparer.quantizer is not None
    return Numbers(
        outcomes, hashes, source is not None, comparer.recorded, known, left_out, worker.holes
    )


def without_experts(source: Checkpoint, kept: Kept) -> Checkpoint:
    """The source as a bundle that left experts out has it: its routers with those rows alone."""
    fewer = Checkpoint(source.folder, source.config, source.weight_map, source.shards)
    tensors = dict(source.tensors)
    for block, numbers in kept.items():
        for name in (f"{block}.ffn.gate.weight", f"{block}.ffn.gate.bias"):
            if numbers and name in tensors:
                tensors[name] = select_rows(tensors[name], numbers)
    fewer.__dict__["tensors"] = tensors
    return fewer


def not_compared(
    bundle: Scan, source: Checkpoint, outcomes: list[TensorResult], kept: Kept
) -> tuple[str, ...]:
    """Source tensors that no outcome is about, but for experts and MTP that were left out."""
    compared, called_for = {outcome.name for outcome in outcomes}, set(bundle.bases)

    def is_called_for(name: str) -> bool:
        expert = parse_expert(name)
        if expert is None:
            return bundle.has_mtp or not name.startswith("mtp.")
        block = f"{expert[0]}.{expert[1]}"
        return kept[block] is None if block in kept else name.removesuffix(".weight") in called_for

    return tuple(n for n in weights_of(source.tensors) if n not in compared and is_called_for(n))


def visible_files(files: Iterable[str]) -> list[str]:
    """The files that a bundle consists of: nothing hidden, nothing that Python left."""
    return sorted(
        file
        for file in files
        if not any(part.startswith(".") or part == "__pycache__" for part in file.split("/"))
    )


def files_to_hash(bundle: Scan) -> list[str]:
    """The visible files that are hashed: shards of the index, and what is as small as documents."""
    shards = bundle.checkpoint.shards
    return [f for f in visible_files(bundle.files) if f in shards or bundle.files[f] <= DOCUMENT]


def all_tensors(bundle: Scan) -> list[Tensor]:
    """Every tensor, experts of a stack one by one; those without a place in the layout too."""
    disk = bundle.checkpoint.tensors
    foreign = {*bundle.view.recognized.unknown, *bundle.view.odd}
    foreign |= {name for names in bundle.view.recognized.others.values() for name in names}
    foreign -= set(bundle.tensors)
    return [*bundle.tensors.values(), *(disk[name] for name in sorted(foreign) if name in disk)]


def make_jobs(
    bundle: Scan, source: Checkpoint | None, kept: Kept
) -> Iterator[Path | list[Task | Tensor]]:
    """The work in order: a file to hash, then the tensors whose weight lies in it, and so on.

    Those that are a job by themselves go first, so that no thread is left with one at the end.
    """
    work: dict[str, list[tuple[int, Task | Tensor]]] = {}
    every = make_tasks(bundle, source, kept) if source else all_tensors(bundle)
    for one in every:
        tensor = one.main if isinstance(one, Task) else one
        work.setdefault(tensor.path.name, []).append((tensor.offset, one))
    for file in files_to_hash(bundle):
        yield bundle.checkpoint.folder / file
        some, size = [], 0
        here = work.get(file, [])
        for _, one in sorted(here, key=lambda item: (item[1].nbytes < JOB_BYTES, item[0])):
            some.append(one)
            size += one.nbytes
            if size >= JOB_BYTES:
                yield some
                some, size = [], 0
        if some:
            yield some
