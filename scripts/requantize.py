"""Requantize the routed experts of a bundle from the FP4 source: the stage the project is about.

Upstream's converter copies each routed expert's FP4 bytes into the bundle and labels them affine.
This stage gives every routed expert, main layers and MTP, the bytes that `mx.quantize` gives for
the decoded source; restores the F32 control tensors that the converter rounded to F16; and rebuilds
the index and the labels in config.json. Everything else is copied byte for byte.

Reads the source's routed experts and controls and the bundle's other tensors; writes one new shard
at a time for each worker, which takes the old one's name only when it is whole and on the disk. So
a run can be killed at any moment: the same command goes on where it stopped. What is done is read
from the shards themselves, whose metadata says which source and which quantizer made them.

    .venv/bin/python scripts/requantize.py --source DIR --bundle DIR [--dry-run] [--jobs N]
        [--part K/N]

Costs about the time of copying the bundle. --part K/N takes the K-th of N disjoint sets of shards,
for a job array; a last run without --part then completes index and config.
Exit status: 0 done, or already done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dsv4 import labels
from dsv4.affine import BadGroup, Tally
from dsv4.checkpoint import (
    INDEX,
    Checkpoint,
    check_strangers,
    expert_bases,
    open_bundle,
    open_source,
    read_config,
    read_index,
    read_json,
)
from dsv4.durable import TEMPORARY_SUFFIX, human, temporary_for, write_json
from dsv4.fp4 import GROUP
from dsv4.imatrix import coverage, importances, open_imatrix, usable
from dsv4.names import HEAD, is_control, parse_expert
from dsv4.quantizer import QUANTIZERS, Optimal, Quantizer
from dsv4.rewrite import Desk, NewShard, Piece, Target, copy_pieces, rewrite
from dsv4.shard import (
    NUMPY_DTYPE,
    SAMPLE_BYTES,
    Shard,
    Slot,
    Tensor,
    header_bytes,
    sample_places,
)
from dsv4.stop import Stop, run

LOCK = ".requantize.lock"
PIECE_BYTES = 2 << 20  # of packed source codes: few system calls, still near a core's own cache
# Which parts of a routed expert a bundle may hold, and in which dtypes; each has shape (out, …).
KNOWN_PARTS = {
    "weight": ("U32",),
    "scales": ("U8", "F8_E8M0", "F16", "BF16", "F32"),
    "biases": ("F16", "BF16", "F32"),
}
CONVERT = "convert the source again (--profile 4 --format jang)"


# --- What a run will do: the plan ---------------------------------------------------------------


@dataclass(frozen=True)
class QuantizePiece:
    """Rows `first` to `last` - 1 of one expert: FP4 in, the parts that a shard holds out."""

    weight: Tensor
    scale: Tensor
    first: int
    last: int
    places: dict[str, int]  # part → where its row 0 lies in the new shard
    quantizer: Quantizer
    ledger: Ledger
    importance: np.ndarray | None = None  # of each column, as an imatrix has it

    def _row_bytes(self) -> dict[str, int]:
        out, half = self.weight.shape
        parts = self.quantizer.parts(out, 2 * half)
        return {part: Slot("", *of).nbytes // out for part, of in parts.items()}

    @property
    def nbytes(self) -> int:
        """The bytes that it writes."""
        row_bytes = self._row_bytes()
        return (self.last - self.first) * sum(row_bytes[part] for part in self.places)

    def encode(self, desk: Desk) -> tuple[dict[str, np.ndarray], Tally]:
        """Read and quantize the rows. Raises Stop for a group without such a form."""
        rows, half = self.last - self.first, self.weight.shape[1]
        groups = self.scale.shape[1]
        packed = desk.buffer("packed", rows * half)
        exponents = desk.buffer("exponents", rows * groups)
        desk.read(self.weight.path, self.weight.offset + self.first * half, packed)
        desk.read(self.scale.path, self.scale.offset + self.first * groups, exponents)
        parts = {part: desk.buffer(part, rows * n) for part, n in self._row_bytes().items()}
        weights = self.importance
        if weights is not None:
            weights = usable(weights, self.weight.name)
        try:
            return parts, self.quantizer.encode(packed, exponents, parts, weights)
        except BadGroup as bad:
            row, group = divmod(bad.group, groups)
            raise Stop(
                f"{self.weight.path}: {self.weight.name}",
                f"{bad.found} in row {self.first + row}, group {group}",
                bad.expected,
                "fetch the source again",
            ) from bad

    def write(self, target: Target, desk: Desk) -> None:
        """Quantize the rows and write each part that this shard holds."""
        parts, tally = self.encode(desk)
        rows = self.last - self.first
        for part, place in self.places.items():
            target.write(place + self.first * (len(parts[part]) // rows), parts[part])
        if "weight" in self.places:
            self.ledger.add(self.weight.name, tally)


class Ledger:
    """The errors of the tensors quantized so far, by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tallies: dict[str, Tally] = {}

    def add(self, name: str, tally: Tally) -> None:
        with self._lock:
            self.tallies.setdefault(name, Tally()).add(tally)


@dataclass(frozen=True)
class Fate:
    """What becomes of one shard of the bundle: its new layout, and whether it has it already."""

    shard: Shard
    slots: list[Slot]
    kinds: dict[str, str]  # tensor → "expert", "control", "head" or "copy"
    metadata: dict[str, str]
    done: bool

    @cached_property
    def header(self) -> bytes:
        """The new shard's header with its length prefix."""
        return header_bytes(self.slots, self.metadata)

    @cached_property
    def size(self) -> int:
        """The new shard's size in bytes."""
        return len(self.header) + sum(slot.nbytes for slot in self.slots)


@dataclass(frozen=True)
class Plan:
    """Every shard's fate, and which of them this run rewrites."""

    source: Checkpoint
    bundle: Checkpoint
    quantizer: Quantizer
    fates: dict[str, Fate]
    todo: list[str]
    jobs: int

    @property
    def work(self) -> list[Fate]:
        """The fates of the shards that this run rewrites, in order."""
        return [self.fates[file] for file in self.todo]

    @property
    def extra_disk(self) -> tuple[int, int]:
        """Bytes by which the bundle grows for good, and bytes of the shards open at one time."""
        sizes = sorted((fate.size for fate in self.work), reverse=True)
        growth = sum(fate.size - fate.shard.size for fate in self.work)
        return max(growth, 0), sum(sizes[: self.jobs])


def make_plan(
    source: Checkpoint,
    bundle: Checkpoint,
    quantizer: Quantizer,
    part: Part,
    jobs: int,
    only: frozenset[str] | None = None,
    mark: dict[str, str] | None = None,
) -> Plan:
    """Decide every shard's fate. Raises Stop when bundle and source do not belong together.

    only: storage names of the expert matrices that are made; the others are copied as they lie
    (None: all are made). mark: metadata of the shards that are written (None: who made them).
    """
    check_bundle(source, bundle)
    mark = made_by(source, quantizer) if mark is None else mark
    have_biases = {n.rpartition(".")[0] for n in bundle.tensors if n.endswith(".biases")}
    fates = {}
    for file, shard in bundle.shards.items():
        fates[file] = fate_of(shard, source, quantizer, have_biases, mark, only)
    mine = part.of(list(fates))
    todo = [file for file in mine if not fates[file].done]
    for file in todo:
        check_samples(source, fates[file].shard)
    return Plan(source, bundle, quantizer, fates, todo, jobs)


def fate_of(
    shard: Shard,
    source: Checkpoint,
    quantizer: Quantizer,
    have_biases: set[str],
    mark: dict[str, str],
    only: frozenset[str] | None = None,
) -> Fate:
    """The new layout of one shard. New `.biases` come right after the `.scales` they belong to.

    Larger dtypes come first, as the safetensors library has it, so that each tensor stays aligned
    when a rounded control becomes F32 again.
    """
    slots, kinds = [], {}
    for tensor in shard.tensors.values():
        kind, new = _slots_of(tensor, source, quantizer, have_biases, only)
        slots += new
        kinds.update({slot.name: kind for slot in new})
    slots.sort(key=lambda slot: -np.dtype(NUMPY_DTYPE[slot.dtype]).itemsize)
    metadata = shard.metadata | {"format": "mlx"} | mark
    layout = [(slot.name, slot.dtype, slot.shape) for slot in slots]
    found = [(t.name, t.dtype, t.shape) for t in shard.tensors.values()]
    ours = was_made_by(shard, mark) and layout == found
    untouched = sorted(layout) == sorted(found) and (
        "expert" not in kinds.values() or is_copy(shard, source, quantizer)
    )
    return Fate(shard, slots, kinds, metadata, ours or untouched)


def _slots_of(
    tensor: Tensor,
    source: Checkpoint,
    quantizer: Quantizer,
    have_biases: set[str],
    only: frozenset[str] | None,
) -> tuple[str, list[Slot]]:
    """What one tensor of the bundle becomes: its kind, and no, one or two new tensors."""
    base, _, part = tensor.name.rpartition(".")
    if parse_expert(tensor.name) and (only is None or base in only):
        out, half = source.tensors[f"{base}.weight"].shape
        parts = quantizer.parts(out, 2 * half)
        names = [part] if part in parts else []
        if part == "scales" and "biases" in parts and base not in have_biases:
            names.append("biases")
        return "expert", [Slot(f"{base}.{name}", *parts[name]) for name in names]
    origin = source.tensors.get(tensor.name)
    if origin is not None and is_control(tensor.name) and origin.dtype == "F32":
        return "control", [Slot(tensor.name, "F32", tensor.shape)]
    if base == HEAD.rpartition(".")[0] and HEAD in source.tensors:
        head = source.tensors[HEAD]
        return "head", [Slot(HEAD, head.dtype, head.shape)] if tensor.name == HEAD else []
    return "copy", [Slot(tensor.name, tensor.dtype, tensor.shape)]


def new_shard(fate: Fate, source: Checkpoint, quantizer: Quantizer, ledger: Ledger) -> NewShard:
    """How a shard will be written."""
    pieces = functools.partial(pieces_of, fate, source, quantizer, ledger)
    return NewShard(fate.shard.path, fate.header, fate.size, pieces)


def pieces_of(fate: Fate, source: Checkpoint, quantizer: Quantizer, ledger: Ledger) -> list[Piece]:
    """Where every byte of a new shard comes from: copies in file order, then the experts."""
    place = len(fate.header)
    pieces: list[Piece] = []
    experts: dict[str, dict[str, int]] = {}
    for slot in fate.slots:
        kind = fate.kinds[slot.name]
        if kind == "expert":
            base, _, part = slot.name.rpartition(".")
            experts.setdefault(base, {})[part] = place
        else:
            tensor = (source if kind in ("control", "head") else fate.shard).tensors[slot.name]
            pieces += copy_pieces(tensor.path, tensor.offset, place, slot.nbytes)
        place += slot.nbytes
    for base, places in experts.items():
        pieces += expert_pieces(source, base, places, quantizer, ledger)
    return pieces


def expert_pieces(
    source: Checkpoint, base: str, places: dict[str, int], quantizer: Quantizer, ledger: Ledger
) -> list[Piece]:
    """The pieces that fill the parts of one expert that a shard holds, each at its place."""
    weight, scale = source.tensors[f"{base}.weight"], source.tensors[f"{base}.scale"]
    out, half = weight.shape
    rows = max(1, PIECE_BYTES // half)
    cuts = [(row, min(row + rows, out)) for row in range(0, out, rows)]
    importance = quantizer.importance.get(base)
    return [
        QuantizePiece(weight, scale, first, last, places, quantizer, ledger, importance)
        for first, last in cuts
    ]


# --- Who made a shard ---------------------------------------------------------------------------


def fingerprint(source: Checkpoint) -> str:
    """64 hex digits for this source: all headers, sizes, and a sample of each shard's data.

    Reads three times 4 KB a shard, so that two checkpoints of one shape are told apart.
    """
    digest = hashlib.sha256()
    for file, shard in sorted(source.shards.items()):
        digest.update(f"{file} {shard.size}\n".encode())
        for name, tensor in sorted(shard.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with shard.path.open("rb") as reader:
            for offset, nbytes in sample_places(shard):
                reader.seek(offset)
                digest.update(reader.read(nbytes))
    return digest.hexdigest()


def made_by(source: Checkpoint, quantizer: Quantizer) -> dict[str, str]:
    """The metadata that says who made a shard, of what, and in which version of the layout."""
    return {
        "requantize_layout": "1",
        "requantize_source": fingerprint(source),
        "requantize_quantizer": quantizer.name,
        "requantize_table": quantizer.digest,
    }


def was_made_by(shard: Shard, mark: dict[str, str]) -> bool:
    """True when `mark` made the shard, False when no requantize did or one with other settings.

    What another quantizer made is made again, from the source. Raises Stop for another source's.
    """
    if not any(key in shard.metadata for key in mark):
        return False
    found, expected = (of.get("requantize_source") for of in (shard.metadata, mark))
    if found != expected:
        raise Stop(
            f"{shard.path}",
            f"a shard made from source {found}",
            f"{expected}",
            f"go on with the source that it was made from, or {CONVERT}",
        )
    return all(shard.metadata.get(key) == value for key, value in mark.items())


def is_copy(shard: Shard, source: Checkpoint, quantizer: Quantizer) -> bool:
    """True when the quantizer wants the source's bytes and a stock shard has them already.

    Looks at the middle SAMPLE_BYTES of every expert's part. Raises Stop when they are not the
    source's. A shard that requantize made says in its metadata what it holds.
    """
    if quantizer.name != "mxfp4" or any(key.startswith("requantize_") for key in shard.metadata):
        return False
    for name, tensor in shard.tensors.items():
        if parse_expert(name):
            _expect_same(tensor, _middle(tensor), _middle(source.tensors[name.removesuffix("s")]))
    return True


def _middle(tensor: Tensor) -> np.ndarray:
    """SAMPLE_BYTES bytes from the middle of a tensor, or all of it when it is smaller."""
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + max(0, tensor.nbytes - SAMPLE_BYTES) // 2)
        return np.frombuffer(file.read(min(SAMPLE_BYTES, tensor.nbytes)), np.uint8)


# --- Do source and bundle belong together? ------------------------------------------------------


def check_bundle(source: Checkpoint, bundle: Checkpoint) -> None:
    """Raise Stop unless the bundle holds all of the source's tensors, in forms that we know."""
    for key in ("num_hidden_layers", "n_routed_experts"):
        if bundle.config.get(key) != source.config[key]:
            raise Stop(
                f"{bundle.folder / 'config.json'}: {key}",
                repr(bundle.config.get(key)),
                f"{source.config[key]} as in the source",
                "check SOURCE and BUNDLE",
            )
    _check_entries(bundle)
    check_strangers(bundle, "move it away: MLX loads every shard that it finds")
    _check_complete(source, bundle)
    for name, tensor in bundle.tensors.items():
        if parse_expert(name):
            _check_part(source, tensor)
        elif name.endswith(".scales"):
            _check_eight_bits(source, bundle, tensor)
        elif is_control(name) and name in source.tensors:
            _expect_shape(tensor, source.tensors[name].shape)


def _check_entries(bundle: Checkpoint) -> None:
    """Index and shards must agree, but for `.biases` that a killed run has added or dropped."""
    index = bundle.folder / INDEX
    for name, file in bundle.weight_map.items():
        shard = bundle.shards[file]
        dropped = name.endswith(".biases") and parse_expert(name) and _was_requantized(shard)
        if name not in shard.tensors and not dropped:
            raise Stop(f"{index}: {name}", f"no such tensor in {file}", "it there", CONVERT)
    for file, shard in bundle.shards.items():
        for name, tensor in shard.tensors.items():
            new = name.endswith(".biases") and parse_expert(name) and name not in bundle.weight_map
            if (bundle.weight_map.get(name) != file and not new) or bundle.tensors[name] != tensor:
                raise Stop(
                    f"{shard.path}: {name}", "no entry for it in the index", f"one in {INDEX}",
                    CONVERT,
                )  # fmt: skip


def _was_requantized(shard: Shard) -> bool:
    return "requantize_quantizer" in shard.metadata


def _check_complete(source: Checkpoint, bundle: Checkpoint) -> None:
    bases = expert_bases(source)
    known = set(bases)
    wanted = [name for name in source.tensors if not name.endswith(".scale")]
    wanted += [f"{base}.scales" for base in bases]
    missing = [name for name in wanted if name not in bundle.tensors]
    if missing:
        raise Stop(
            f"{bundle.folder}",
            f"no {missing[0]} ({len(missing):,} tensors missing)",
            "a counterpart for every tensor of the source",
            CONVERT,
        )
    for name in bundle.tensors:
        if parse_expert(name) and name.rpartition(".")[0] not in known:
            raise Stop(
                f"{bundle.folder}: {name}",
                "an expert that the source does not have",
                f"{len(bases):,} matrices",
                "check SOURCE and BUNDLE",
            )


def _check_part(source: Checkpoint, tensor: Tensor) -> None:
    base, _, part = tensor.name.rpartition(".")
    dtypes = KNOWN_PARTS.get(part, ())
    if tensor.dtype not in dtypes:
        raise Stop(
            f"{tensor.path}: {tensor.name}",
            f"dtype {tensor.dtype}",
            " or ".join(dtypes) or "only .weight, .scales and .biases",
            CONVERT,
        )
    out, half = source.tensors[f"{base}.weight"].shape
    groups = 2 * half // GROUP
    if part != "weight":
        _expect_shape(tensor, (out, groups))
    elif tensor.shape != (out, 5 * groups):  # 5 bits; else 4
        _expect_shape(tensor, (out, 4 * groups))


def _check_eight_bits(source: Checkpoint, bundle: Checkpoint, scales: Tensor) -> None:
    """The label that config.json gets says 8 bits, group 32 for everything but the experts."""
    weight = bundle.tensors.get(scales.name.removesuffix("scales") + "weight")
    origin = source.tensors.get(scales.name.removesuffix("scales") + "weight")
    if weight is None or origin is None or weight.dtype != "U32" or len(origin.shape) != 2:
        raise Stop(f"{scales.path}: {scales.name}", "scales without a weight", "both", CONVERT)
    out, columns = origin.shape
    _expect_shape(weight, (out, columns // 4))
    _expect_shape(scales, (out, columns // GROUP))


def _expect_shape(tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise Stop(
            f"{tensor.path}: {tensor.name}", f"shape {list(tensor.shape)}", f"{list(shape)}",
            f"check SOURCE and BUNDLE, or {CONVERT}",
        )  # fmt: skip


def check_samples(source: Checkpoint, shard: Shard) -> None:
    """Compare a little of what a shard kept of the source. Raises Stop when it is another's.

    Looked at: 4 KB of the first and the last expert that still holds the source's own bytes, and
    of every control, which is the source's F32 or that rounded to F16.
    """
    stock = [
        t for name, t in shard.tensors.items()
        if parse_expert(name) and name.endswith(".scales") and t.dtype in ("U8", "F8_E8M0")
    ]  # fmt: skip
    for tensor in stock[:1] + stock[-1:]:
        origin = source.tensors[tensor.name.removesuffix("s")]
        _expect_same(tensor, _head(tensor), _head(origin))
    for name, tensor in shard.tensors.items():
        origin = source.tensors.get(name)
        if not is_control(name) or origin is None or origin.dtype != "F32":
            continue
        values = _head(origin)
        if tensor.dtype == "F16":
            with np.errstate(over="ignore"):
                _expect_same(tensor, _head(tensor)[: len(values)], values.astype(np.float16))
        elif tensor.dtype == "F32":
            _expect_same(tensor, _head(tensor), values)


def _head(tensor: Tensor) -> np.ndarray:
    """The first SAMPLE_BYTES of a tensor, flat."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(min(SAMPLE_BYTES, tensor.nbytes))
    return np.frombuffer(data, NUMPY_DTYPE[tensor.dtype])


def _expect_same(tensor: Tensor, found: np.ndarray, expected: np.ndarray) -> None:
    if found.tobytes() != expected.tobytes():
        raise Stop(
            f"{tensor.path}: {tensor.name}",
            "other values than the source's",
            "a bundle that was converted from this source",
            "check SOURCE and BUNDLE",
        )


# --- One run at a time --------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The `k`-th of `n` disjoint sets of shards, k from 1; 1/1 is all of them."""

    k: int = 1
    n: int = 1
    whole: bool = True

    def of(self, files: list[str]) -> list[str]:
        """Which of the shards, sorted by name, belong to this part."""
        return sorted(files)[self.k - 1 :: self.n]


@contextlib.contextmanager
def locked(bundle: Path, files: list[str], part: Part) -> Iterator[None]:
    """Hold the bundle, or a part's shards; raises Stop when another run holds any of them.

    One byte of the lock file stands for one shard, so that parts exclude each other exactly where
    they overlap, whatever their N; a whole run locks them all. The system drops the locks of a
    process that dies. A run that ends leaves no lock file unless other parts may be using it.
    """
    path = bundle / LOCK
    with path.open("a+b") as file:
        try:
            if part.whole:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for i in range(part.k - 1, len(files), part.n):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, i)
        except (BlockingIOError, PermissionError) as error:
            raise Stop(
                f"{bundle}",
                "another run at work on it",
                "one run on each part",
                "wait until it ends",
            ) from error
        if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise Stop(f"{bundle}", "another run that just ended", "one run", "start it again")
        try:
            yield
        finally:
            if part.whole:
                path.unlink()


def remove_leftovers(bundle: Path, files: list[str], part: Part) -> None:
    """Remove what killed runs left: the temporaries of this part's shards, or all of them."""
    if part.whole:
        leftovers = list(bundle.glob(f".*{TEMPORARY_SUFFIX}"))
    else:
        leftovers = [temporary_for(bundle / file) for file in part.of(files)]
    for path in leftovers:
        path.unlink(missing_ok=True)


# --- Carrying it out ----------------------------------------------------------------------------


def carry_out(plan: Plan) -> Ledger:
    """Rewrite the plan's shards. Raises Stop when they do not fit on the disk."""
    check_space(plan)
    ledger = Ledger()
    shards = [new_shard(fate, plan.source, plan.quantizer, ledger) for fate in plan.work]
    total = sum(shard.size - len(shard.header) for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="requantize", disable=None) as bar:
        rewrite(shards, plan.jobs, bar.update)
    return ledger


def check_space(plan: Plan) -> None:
    """Raise Stop when the volume lacks room for the growth and the shards that are open at once."""
    need = sum(plan.extra_disk)
    free = shutil.disk_usage(plan.bundle.folder).free
    if need > free:
        raise Stop(
            f"{plan.bundle.folder}",
            f"{human(free)} free",
            f"{human(need)}",
            "free space on that volume, or use fewer --jobs",
        )


def complete(plan: Plan) -> bool:
    """Rebuild the index, then the labels in config.json; True when either changed."""
    folder = plan.bundle.folder
    changed = write_index(folder, {file: fate.slots for file, fate in plan.fates.items()})
    config = dict(plan.bundle.config)
    config.pop("quantization_config", None)
    config["quantization"] = labels.quantization(expert_bases(plan.source), plan.quantizer.label)
    config[labels.RECORD] = record_of(plan.quantizer)
    if config != plan.bundle.config:
        changed |= write_json(folder / "config.json", config)
    return changed


def write_index(folder: Path, shards: Mapping[str, Iterable[Slot | Tensor]]) -> bool:
    """Write the index of these shards' tensors; what else stands in it stays. True if it changed.

    Raises Stop when an index is there that is no JSON object.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).exists() else {}
    tensors = {tensor.name: (file, tensor.nbytes) for file, of in shards.items() for tensor in of}
    metadata = index.get("metadata")
    total = sum(nbytes for _, nbytes in tensors.values())
    index["metadata"] = (metadata if isinstance(metadata, dict) else {}) | {"total_size": total}
    index["weight_map"] = {name: file for name, (file, _) in sorted(tensors.items())}
    return write_json(folder / INDEX, index)


def record_of(quantizer: Quantizer) -> dict[str, str]:
    """What config.json says of the quantizer that made the routed experts."""
    return {"quantizer": quantizer.name, "table": quantizer.digest}


# --- Saying what will be done and what was ------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan for a reader: shards, tensors by kind, bytes, disk, an estimate of the time."""
    kinds = {"expert": 0, "control": 0, "head": 0, "copy": 0}
    for fate in plan.work:
        for kind in fate.kinds.values():
            kinds[kind] += 1
    growth, at_once = plan.extra_disk
    shards = [new_shard(fate, plan.source, plan.quantizer, Ledger()) for fate in plan.work]
    written = sum(shard.size for shard in shards)
    read = sum(_bytes_read(piece) for shard in shards for piece in shard.pieces())
    lines = [
        f"shards: {len(plan.todo):,} to write, {len(plan.fates):,} in the bundle",
        f"tensors: {kinds['expert']:,} parts of routed experts from FP4, "
        f"{kinds['control']:,} controls to F32, {kinds['head']:,} head as in the source, "
        f"{kinds['copy']:,} copied",
        f"read: {human(read)}; written: {human(written)}",
        f"extra disk: {human(growth)} for good, {human(at_once)} while it runs",
        estimate(shards, written, plan.jobs),
    ]
    return "\n".join(lines)


def _bytes_read(piece: Piece) -> int:
    if isinstance(piece, QuantizePiece):
        return (piece.last - piece.first) * (piece.weight.shape[1] + piece.scale.shape[1])
    return piece.nbytes


def estimate(shards: list[NewShard], written: int, jobs: int) -> str:
    """Time from a measurement: the first pieces are read and quantized, and nothing is written."""
    desk, seconds, done = Desk(), 0.0, 0
    pieces = [p for shard in shards[:4] for p in shard.pieces() if isinstance(p, QuantizePiece)]
    with contextlib.closing(desk):
        for i, piece in enumerate(pieces[:17]):
            start = time.perf_counter()
            piece.encode(desk)
            if i:  # the first one loads the kernel
                seconds += time.perf_counter() - start
                done += piece.nbytes
    if not done:
        return "time: seconds"
    rate = done / seconds * jobs
    return (
        f"time: about {written / rate / 60:.1f} minutes with {jobs} jobs, at the "
        f"{rate / 1e6:,.0f} MB/s of reading and quantizing here; a slower disk takes longer"
    )


def summarize(plan: Plan, ledger: Ledger, seconds: float) -> str:
    """One line: tensors, bytes, seconds, rate, and the errors as the table knows them."""
    written = sum(fate.size for fate in plan.work)
    line = (
        f"{len(ledger.tallies):,} tensors, {len(plan.todo):,} shards, {human(written)} in "
        f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    )
    return line + errors_in_words(ledger)


def errors_in_words(ledger: Ledger) -> str:
    """What the quantizer's own tallies say of the error, to be appended to a line."""
    line = ""
    if ledger.tallies:
        errors = {name: tally.relative for name, tally in ledger.tallies.items()}
        worst = max(errors, key=lambda name: errors[name])
        # About 8.5% for weights of a normal distribution: that is what mx.quantize makes of FP4.
        line += (
            f"; relative RMS error mean {sum(errors.values()) / len(errors):.2%}, "
            f"worst {errors[worst]:.2%} ({worst})"
        )
    lost = sum(tally.underflows for tally in ledger.tallies.values())
    if lost:
        line += f"; {lost:,} groups with a scale or bias that is 0 in F16"
    return line


def parse_part(text: str) -> Part:
    """Read K/N. Raises argparse.ArgumentTypeError unless 1 ≤ K ≤ N."""
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with 1 ≤ K ≤ N")
    return Part(int(k), int(n), whole=False)


def parse_jobs(text: str) -> int:
    """Read a number of threads. Raises argparse.ArgumentTypeError unless it is at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads")
    return int(text)


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="the FP4/FP8 checkpoint")
    parser.add_argument("--bundle", type=Path, required=True, help="the converted bundle")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--jobs", type=parse_jobs, default=cores(), help="threads (all cores)")
    parser.add_argument("--part", type=parse_part, default=Part(), help="K/N: a share of the work")
    parser.add_argument("--quantizer", choices=sorted(QUANTIZERS), default="mlx")
    parser.add_argument("--imatrix", type=Path, help="importance of columns, for optimal (.dat)")
    arguments = parser.parse_args()
    if arguments.imatrix and arguments.quantizer != "optimal":
        parser.error("--imatrix needs --quantizer optimal: no other quantizer weighs errors")
    return arguments


def make_quantizer(arguments: argparse.Namespace, source: Checkpoint) -> Quantizer:
    """The quantizer that was asked for. Raises Stop for an imatrix that does not fit the source."""
    if arguments.imatrix is None:
        return QUANTIZERS[arguments.quantizer]()
    imatrix = open_imatrix(arguments.imatrix)
    found = importances(imatrix, source)
    print(coverage(found, imatrix, source))
    return Optimal(found, imatrix.digest)


def main() -> int:
    """Plan, and unless it is a dry run, write. Returns 0."""
    arguments = parse_arguments()
    start = time.perf_counter()
    source = open_source(arguments.source)
    quantizer = make_quantizer(arguments, source)
    read_config(arguments.bundle)
    files = sorted(set(read_index(arguments.bundle).values()))
    lock = contextlib.nullcontext() if arguments.dry_run else locked(
        arguments.bundle, files, arguments.part
    )  # fmt: skip
    with lock:
        if not arguments.dry_run:
            remove_leftovers(arguments.bundle, files, arguments.part)
        bundle = open_bundle(arguments.bundle)
        plan = make_plan(source, bundle, quantizer, arguments.part, arguments.jobs)
        if arguments.dry_run:
            print(describe(plan))
            return 0
        ledger = carry_out(plan) if plan.todo else Ledger()
        changed = complete(plan) if arguments.part.whole else False
    if plan.todo:
        print(summarize(plan, ledger, time.perf_counter() - start))
    elif changed:
        print("every shard was requantized already; index and config completed")
    else:
        print(f"already requantized: {len(plan.fates):,} shards, nothing to do")
    if not arguments.part.whole:
        print("when all parts are done, run once without --part: it completes index and config")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
