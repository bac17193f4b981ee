"""Convert the FP4/FP8 source into a bundle: read it once, write the finished bundle once.

--converter native does all of it here. Routed experts go through requantize's engine; every other
matrix is decoded and goes through `mx.quantize` (8 bits, group 32, on the CPU); norms, router and
tables become F16 or stay integers, controls stay F32. Which tensor gets which treatment stands in
one table, dsv4/names.py; a name that it does not have stops the run. For all but experts and
controls the bytes are those of upstream's converter; requantize finds nothing left to do.

--converter jang runs upstream's (dsv4/upstream.py): hours, and experts that requantize must mend.

Both work in a hidden sibling of the bundle, locked, that takes the bundle's name when it is whole.
The native one writes each shard under a temporary name, makes it durable and renames it, so it can
be killed at any moment: the same command goes on, with the same bytes in the end. An existing
bundle is never written over: one that holds all of this source counts as done.

With --low-disk the source's shards are fetched from --repo when they are needed, and deleted when
all that needs them is durable and compared (dsv4/low_disk.py).

    .venv/bin/python scripts/convert.py --source DIR --bundle DIR [--dry-run] [--jobs N]

Costs about the time of copying the source. Exit status: 0 done, or already done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

import download
import requantize
from dsv4 import configs, hub, low_disk, matrices, upstream
from dsv4.checkpoint import INDEX, Checkpoint, check_index, open_bundle, open_source
from dsv4.durable import fsync_folder, human, write_json
from dsv4.low_disk import Supply
from dsv4.names import HEAD, kind, treatment
from dsv4.origin import read_record
from dsv4.quantizer import QUANTIZERS, Quantizer
from dsv4.rewrite import NewShard, Piece, copy_pieces, rewrite
from dsv4.shard import NUMPY_DTYPE, Slot, Tensor, header_bytes
from dsv4.space import workplace_of
from dsv4.stop import Stop, run
from dsv4.toolchain import default
from requantize import Ledger

SHARD_BYTES = 5_000_000_000
ENTRY_BYTES = 110  # what a tensor takes in a header at most, beside its name
NAMES = "scripts/dsv4/names.py"


# --- The plan: which bytes go where -------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A weight of the source with its scale, and the tensors that it becomes, in one shard."""

    treatment: str
    weight: Tensor
    scale: Tensor | None
    slots: tuple[Slot, ...]

    @property
    def room(self) -> int:
        """The bytes that it takes in a shard, at most, with its entries in the header."""
        return sum(slot.nbytes + len(slot.name) + ENTRY_BYTES for slot in self.slots)

    @property
    def tensors(self) -> list[Tensor]:
        """What is read for it."""
        return [self.weight] + ([self.scale] if self.scale else [])


@dataclass(frozen=True)
class ShardPlan:
    """One shard of the bundle, known to the last byte of its header before anything is read."""

    file: str
    units: list[Unit]
    metadata: dict[str, str]

    @cached_property
    def slots(self) -> list[Slot]:
        """Larger dtypes first, as the safetensors library has it, so that all stay aligned."""
        slots = [slot for unit in self.units for slot in unit.slots]
        return sorted(slots, key=lambda slot: -np.dtype(NUMPY_DTYPE[slot.dtype]).itemsize)

    @cached_property
    def header(self) -> bytes:
        return header_bytes(self.slots, self.metadata)

    @cached_property
    def size(self) -> int:
        return len(self.header) + sum(slot.nbytes for slot in self.slots)

    @property
    def sources(self) -> set[str]:
        """The source's shards that it needs."""
        return {tensor.path.name for unit in self.units for tensor in unit.tensors}

    def is_whole(self, folder: Path) -> bool:
        """True when `folder` has this very shard: it takes its name only when it is complete."""
        path = folder / self.file
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with path.open("rb") as file:
            return file.read(len(self.header)) == self.header


@dataclass(frozen=True)
class Plan:
    """All shards of the bundle in order, and what makes them.

    `headers` is the source as far as headers tell: with --low-disk a skeleton of it.
    """

    source: Checkpoint
    headers: Checkpoint
    quantizer: Quantizer
    shards: list[ShardPlan]

    @property
    def nbytes(self) -> int:
        return sum(shard.size for shard in self.shards)


def make_plan(
    source: Checkpoint, headers: Checkpoint, quantizer: Quantizer, shard_bytes: int
) -> Plan:
    """Units in the order in which the source has them, cut into shards of at most `shard_bytes`.

    Raises Stop for a tensor whose name, dtype or shape is not one that we know.
    """
    names = sorted(source.tensors.values(), key=lambda t: (t.path.name, t.offset, t.name))
    units = [unit_of(tensor, source, quantizer) for tensor in names if not is_scale(tensor, source)]
    groups: list[list[Unit]] = []
    room = 0
    metadata = mark_of(headers, quantizer)
    for unit in units:
        if not groups or room + unit.room > shard_bytes:
            groups.append([])
            room = len(str(metadata)) + ENTRY_BYTES
        groups[-1].append(unit)
        room += unit.room
    shards = [
        ShardPlan(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for i, group in enumerate(groups, 1)
    ]
    return Plan(source, headers, quantizer, shards)


def mark_of(source: Checkpoint, quantizer: Quantizer) -> dict[str, str]:
    """The metadata that says who made a shard, of what; requantize's own part included."""
    mine = {"convert_layout": "1", "convert_matrices": matrices.digest()}
    return {"format": "mlx"} | requantize.made_by(source, quantizer) | mine


def is_scale(tensor: Tensor, source: Checkpoint) -> bool:
    """True for a `.scale` that its weight takes along. Raises Stop for an unknown name."""
    what = treatment(tensor.name)
    if what is None:
        raise Stop(
            f"{tensor.path}: {tensor.name}", "a name that this recipe does not know",
            "the names of DeepSeek-V4",
            f"teach it to the table in {NAMES}, or use CONVERTER=jang",
        )  # fmt: skip
    return what == "scale"


def unit_of(weight: Tensor, source: Checkpoint, quantizer: Quantizer) -> Unit:
    """What becomes of one tensor. Raises Stop for a dtype or shape that has no treatment."""
    what = kind(weight.name)
    base = weight.name.removesuffix(".weight")
    scale = source.tensors.get(f"{base}.scale")
    if what == "expert":
        out, half = weight.shape
        parts = quantizer.parts(out, 2 * half)
        return Unit(what, weight, scale, tuple(Slot(f"{base}.{p}", *parts[p]) for p in parts))
    if weight.name == HEAD:
        return Unit("head", weight, None, (Slot(HEAD, weight.dtype, weight.shape),))
    if what == "affine8":
        matrices.check_matrix(weight, scale)
        return Unit(what, weight, scale, matrices.matrix_slots(weight, base))
    return Unit(what, weight, None, (Slot(weight.name, plain_dtype(weight, what), weight.shape),))


def plain_dtype(tensor: Tensor, what: str) -> str:
    """The dtype of a tensor that is not quantized. Raises Stop for an 8-bit float, say."""
    if tensor.dtype in matrices.FLOATS:
        return "F32" if what == "control" and tensor.dtype == "F32" else "F16"
    if tensor.dtype[0] in "IU" and what == "passthrough":
        return tensor.dtype
    raise Stop(
        f"{tensor.path}: {tensor.name}", tensor.dtype, f"one of {', '.join(matrices.FLOATS)}",
        "fetch the source again",
    )  # fmt: skip


def new_shard(shard: ShardPlan, folder: Path, plan: Plan, ledger: Ledger) -> NewShard:
    """How a shard will be written."""
    pieces = functools.partial(shard_pieces, shard, plan, ledger)
    return NewShard(folder / shard.file, shard.header, shard.size, pieces)


def shard_pieces(shard: ShardPlan, plan: Plan, ledger: Ledger) -> list[Piece]:
    """Where every byte of a shard comes from, in the order of the source."""
    places, place = {}, len(shard.header)
    for slot in shard.slots:
        places[slot.name] = place
        place += slot.nbytes
    return [piece for unit in shard.units for piece in pieces_of(unit, places, plan, ledger)]


def pieces_of(unit: Unit, places: dict[str, int], plan: Plan, ledger: Ledger) -> list[Piece]:
    """The pieces of one unit's tensors; `places` are by name."""
    weight, first = unit.weight, places[unit.slots[0].name]
    if unit.treatment in ("expert", "affine8"):
        base = weight.name.removesuffix(".weight")
        parts = {slot.name.rpartition(".")[2]: places[slot.name] for slot in unit.slots}
        if unit.treatment == "affine8":
            return list(matrices.matrix_pieces(weight, unit.scale, parts))
        return requantize.expert_pieces(plan.source, base, parts, plan.quantizer, ledger)
    if unit.slots[0].dtype == weight.dtype:
        return list(copy_pieces(weight.path, weight.offset, first, weight.nbytes))
    return list(matrices.half_pieces(weight, first))


# --- Where it is made ---------------------------------------------------------------------------


def is_done(folder: Path, source: Checkpoint) -> bool:
    """True when `folder` holds this source converted; False when it is absent or empty.

    Raises Stop when it holds anything else, because nothing is written over.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / INDEX).is_file():
        raise Stop(
            f"{folder}",
            "a folder with other files",
            "no folder, or a bundle of this source",
            "choose another BUNDLE, or move it away",
        )
    bundle = open_bundle(folder)
    wanted = {name for name in source.tensors if kind(name) != "scale"}
    if not wanted <= set(bundle.tensors):
        check_complete(bundle, source)
    return True


def check_complete(bundle: Checkpoint, source: Checkpoint) -> None:
    """Raise Stop unless the bundle has a tensor for every tensor of the source."""
    check_index(bundle, "convert")
    wanted = [name for name in source.tensors if kind(name) != "scale"]
    missing = [name for name in wanted if name not in bundle.tensors]
    if missing:
        raise Stop(
            f"{bundle.folder}",
            f"no {missing[0]} ({len(missing):,} of {len(wanted):,} tensors missing)",
            "a tensor for every tensor of the source",
            "delete this folder and convert again",
        )


@contextlib.contextmanager
def workplace(bundle: Path) -> Iterator[Path]:
    """The bundle's workplace, made and locked. Raises Stop when another run has it."""
    bundle.parent.mkdir(parents=True, exist_ok=True)
    folder = workplace_of(bundle)
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Stop(
                f"{folder}", "another convert at work", "none", "wait for it, or stop it"
            ) from error
        if not folder.exists() or folder.stat().st_ino != os.fstat(handle).st_ino:
            raise Stop(f"{folder}", "another convert that just ended", "one run", "start it again")
        yield folder
    finally:
        with contextlib.suppress(OSError):  # it is gone, or has work to go on with
            folder.rmdir()
        os.close(handle)


def publish(folder: Path, bundle: Path) -> None:
    """Give the finished workplace the bundle's name."""
    fsync_folder(folder)
    folder.replace(bundle)
    fsync_folder(bundle.parent)


def clear_strangers(folder: Path, plan: Plan) -> list[ShardPlan]:
    """Remove what no shard of the plan is, and return the shards that are still to be made.

    Raises Stop when the workplace holds finished shards of another plan: from another source, or
    made with other settings. They may have cost hours.
    """
    todo = [shard for shard in plan.shards if not shard.is_whole(folder)]
    whole = {shard.file for shard in plan.shards} - {shard.file for shard in todo}
    others = [path for path in folder.iterdir() if path.name not in whole]
    for path in others:
        if path.suffix == ".safetensors" and upstream.is_native(path):
            raise Stop(
                f"{path}", "a shard of another source or other settings",
                "shards of this run's plan",
                f"go on with those settings, or delete {folder}",
            )  # fmt: skip
    for path in others:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return todo


# --- Carrying it out ----------------------------------------------------------------------------


def convert(plan: Plan, bundle: Path, jobs: int, supply: Supply | None) -> str:
    """Make the bundle, which appears whole or not at all; return what to say."""
    start = time.perf_counter()
    with workplace(bundle) as folder:
        todo = clear_strangers(folder, plan)
        check_space(folder, sum(shard.size for shard in todo))
        if supply:
            check_space(supply.folder, most_at_once(plan, todo, supply))
            ledger = write_in_turn(plan, todo, folder, jobs, supply)
        else:
            ledger = write_shards(plan, todo, folder, jobs)
        complete(plan, folder, jobs)
        publish(folder, bundle)
    return summarize(plan, todo, ledger, time.perf_counter() - start)


def write_shards(plan: Plan, todo: list[ShardPlan], folder: Path, jobs: int) -> Ledger:
    """Write the shards; those that a killed run left whole are not touched."""
    ledger = Ledger()
    shards = [new_shard(shard, folder, plan, ledger) for shard in todo]
    total = sum(shard.size - len(shard.header) for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        rewrite(shards, jobs, bar.update)
    return ledger


def write_in_turn(
    plan: Plan, todo: list[ShardPlan], folder: Path, jobs: int, supply: Supply
) -> Ledger:
    """Write shard after shard, each from source shards that have just come; free what is used.

    A source shard goes when every shard that needs it is durable and was compared with the source.
    """
    ledger = Ledger()
    free_used(plan, todo, folder, jobs, supply)
    total = sum(shard.size - len(shard.header) for shard in todo)
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None) as bar:
        with supply.coming(sources_of(todo[:1])):
            pass
        for i, shard in enumerate(todo, 1):
            with supply.coming(sources_of(todo[i : i + 1])):
                rewrite([new_shard(shard, folder, plan, ledger)], jobs, bar.update)
                low_disk.compare(new_shard(shard, folder, plan, Ledger()), jobs)
            supply.keep_only(sources_of(todo[i:]))
    return ledger


def free_used(plan: Plan, todo: list[ShardPlan], folder: Path, jobs: int, supply: Supply) -> None:
    """Free what a killed run had used; what it may not have compared any more is compared."""
    for shard in plan.shards:
        if shard not in todo and all(supply.has(name) for name in shard.sources):
            low_disk.compare(new_shard(shard, folder, plan, Ledger()), jobs)
    supply.keep_only(sources_of(todo))


def sources_of(shards: list[ShardPlan]) -> set[str]:
    """The source's shards that some of the bundle's need."""
    return {name for shard in shards for name in shard.sources}


def most_at_once(plan: Plan, todo: list[ShardPlan], supply: Supply) -> int:
    """The most bytes of the source that --low-disk will add to the disk at one time."""
    came, most = set(), 0
    for i in range(len(todo)):
        came |= {name for name in sources_of(todo[i : i + 2]) if not supply.has(name)}
        most = max(most, supply.size(came))
        came &= sources_of(todo[i + 1 :])
    return most


def complete(plan: Plan, folder: Path, jobs: int) -> None:
    """Write index and configs; requantize adds the labels, and must find nothing to do.

    Raises Stop when it does: then the shards are not what the plan says.
    """
    weight_map = {slot.name: shard.file for shard in plan.shards for slot in shard.slots}
    write_json(folder / INDEX, {"weight_map": weight_map})
    label = plan.quantizer.label
    write_json(folder / "config.json", configs.bundle_config(plan.source, label))
    write_json(folder / "jang_config.json", configs.jang_config(plan.source, label))
    made = open_bundle(folder)
    check_complete(made, plan.source)
    after = requantize.make_plan(plan.headers, made, plan.quantizer, requantize.Part(), jobs)
    if after.todo:
        raise Stop(f"{folder / after.todo[0]}", "a shard that requantize would change",
                   "none", "report this as a bug")  # fmt: skip
    requantize.complete(after)


def check_space(folder: Path, need: int) -> None:
    """Raise Stop when the volume lacks room for what is still to be written."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise Stop(f"{folder}", f"{human(free)} free", f"{human(need)}",
                   "free space on that volume, or choose another BUNDLE")  # fmt: skip


# --- Saying what will be done and what was ------------------------------------------------------


def describe(plan: Plan, bundle: Path, jobs: int, supply: Supply | None) -> str:
    """The plan for a reader: tensors by treatment, shards, bytes, an estimate of the time."""
    folder = workplace_of(bundle)
    todo = [shard for shard in plan.shards if not shard.is_whole(folder)]
    units = [unit for shard in plan.shards for unit in shard.units]
    counts = Counter(unit.treatment for unit in units)
    written = sum(shard.size for shard in todo)
    read = sum(t.nbytes for shard in todo for unit in shard.units for t in unit.tensors)
    first = [new_shard(shard, folder, plan, Ledger()) for shard in todo[:1]]
    label = plan.quantizer.label
    lines = [
        f"tensors: {counts['expert']:,} routed experts to {label['mode']} {label['bits']} bits, "
        f"{counts['affine8']:,} matrices to affine 8 bits, {counts['passthrough']:,} to F16 or as "
        f"integers, {counts['control']:,} controls in F32, {counts['head']:,} head as it is",
        f"shards: {len(todo):,} to write, {len(plan.shards):,} in the bundle",
        f"read: {human(read)}; written: {human(written)}",
        f"disk: {human(plan.nbytes)} for the bundle, "
        + (f"{human(most_at_once(plan, todo, supply))} for shards of the source at one time"
           if supply else "nothing beside it"),
        requantize.estimate(first, written, jobs) if not supply else "time: as the network has it",
    ]  # fmt: skip
    return "\n".join(lines)


def summarize(plan: Plan, todo: list[ShardPlan], ledger: Ledger, seconds: float) -> str:
    """One line: tensors, bytes, seconds, rate, and the experts' errors."""
    written = sum(shard.size for shard in todo)
    tensors = sum(len(shard.units) for shard in todo)
    line = (
        f"{tensors:,} tensors, {len(todo):,} of {len(plan.shards):,} shards, {human(written)} in "
        f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    )
    return line + requantize.errors_in_words(ledger)


def parse_bytes(text: str) -> int:
    """Read a number of bytes: 5000000000 or 5e9. Raises argparse.ArgumentTypeError else."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= 1:
            return int(value)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="the FP4/FP8 checkpoint")
    parser.add_argument("--bundle", type=Path, required=True, help="the folder to make")
    parser.add_argument("--converter", choices=("native", "jang"), default="native")
    parser.add_argument("--python", type=Path, default=default(),
                        help="jang: the toolchain")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--jobs", type=requantize.parse_jobs, default=requantize.cores(),
                        help="threads (all cores)")  # fmt: skip
    parser.add_argument("--shard-bytes", type=parse_bytes, default=SHARD_BYTES,
                        help="the largest shard (5e9)")  # fmt: skip
    parser.add_argument("--quantizer", choices=sorted(QUANTIZERS), default="mlx")
    parser.add_argument("--imatrix", type=Path, help="importance of columns, for optimal (.dat)")
    parser.add_argument("--low-disk", action="store_true",
                        help="fetch and free the source's shards as it goes")  # fmt: skip
    parser.add_argument("--repo", default="", help="--low-disk: where they come from")
    parser.add_argument("--patience", type=float, default=download.PATIENCE, metavar="SECONDS",
                        help="--low-disk: how long to try again while nothing comes")  # fmt: skip
    parser.add_argument("--workers", type=int, default=download.WORKERS,
                        help="--low-disk: files fetched at once")  # fmt: skip
    args = parser.parse_args()
    if args.imatrix and args.quantizer != "optimal":
        parser.error("--imatrix needs --quantizer optimal: no other quantizer weighs errors")
    return args


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[Checkpoint, Checkpoint, Supply | None]]:
    """The source, the source as far as headers tell, and with --low-disk what supplies shards."""
    if not args.low_disk:
        source = open_source(args.source)
        yield source, source, None
        return
    record = read_record(args.source)
    if not args.repo or record is None or record.repo != args.repo:
        found = f"{record.repo}" if record else "no download prepared"
        raise Stop(f"{args.source}", found, f"{args.repo or 'a repository'}", low_disk.AGAIN)
    hub.quiet()
    supply = Supply(args.source, record, args.patience, args.workers, download.fetch_all)
    with download.locked(args.source), low_disk.skeleton(args.source, record) as headers:
        yield low_disk.at_home(headers, args.source), headers, supply


def run_upstream(args: argparse.Namespace, source: Checkpoint) -> str:
    """Upstream's converter; return what to say."""
    if args.dry_run or args.low_disk:
        raise Stop("--converter jang", "--dry-run or --low-disk", "neither", "use native for them")
    with workplace(args.bundle) as folder:
        check_complete(upstream.fill(folder, source, args.python), source)
        publish(folder, args.bundle)
    return f"converted, {len(source.tensors):,} source tensors"


def run_native(args: argparse.Namespace, source: Checkpoint, headers: Checkpoint,
               supply: Supply | None) -> str:  # fmt: skip
    """The native converter, or its plan; return what to say."""
    plan = make_plan(source, headers, requantize.make_quantizer(args, headers), args.shard_bytes)
    if args.dry_run:
        return "would be made\n" + describe(plan, args.bundle, args.jobs, supply)
    return convert(plan, args.bundle, args.jobs, supply)


def main() -> int:
    """Convert, or say what would be done. Returns 0."""
    args = parse_arguments()
    with opened(args) as (source, headers, supply):
        if is_done(args.bundle, source):
            said = f"holds every tensor of {args.source} already; delete it to convert afresh"
            if supply and not args.dry_run:
                supply.keep_only(set())
        elif args.converter == "jang":
            said = run_upstream(args, source)
        else:
            said = run_native(args, source, headers, supply)
    print(f"{args.bundle}: {said}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
