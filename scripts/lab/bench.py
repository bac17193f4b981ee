"""Measure requantize against copying and against the plan's method, and verify against `cat`.

Makes synthetic routed experts of Flash's shapes (2048 × 4096 and 4096 × 2048) and a stock bundle of
them. Then it measures, in alternating turns:

- `cp` and fsync of the finished shards, which are the bytes that requantize writes;
- requantize with all cores, with one, and with nothing left to do (its start-up);
- the plan's method on a share of the tensors: read, decode through a lookup table, mx.quantize,
  save the shard with MLX;
- `cat` of the finished bundle and its source, and verify's level 2 of them.

Before each turn the inputs are dropped from the page cache and everything is synced. Times are of
whole processes.

    .venv/bin/python scripts/lab/bench.py [--folder DIR] [--tensors 384] [--runs 5]

Takes about 6 minutes and 10 GB under --folder on two cores; prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import locations
import numpy as np
from timing import Times, machine, settle, turn

from dsv4.errors import UserError, run
from dsv4.model.load import open_bundle
from dsv4.model.names import GROUP, expert_base, parse_expert
from dsv4.model.source import open_source
from dsv4.model.source_format import MODEL_TYPE
from dsv4.quantization.fp4 import E2M1, UE8M0
from dsv4.storage import filesystem
from dsv4.storage.atomic import fsync_folder
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import PendingTensor, read_array, write_shard
from dsv4.verification.numbers import aggregate, compare_all
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

REQUANTIZE = locations.SCRIPTS / "requantize.py"
FLASH_TENSORS = 33_792  # 43 layers × 256 experts × 3, and 1 × 256 × 3 under mtp
WIDE, TALL = (2048, 4096), (4096, 2048)  # Flash's w1 and w3, and w2: (out, in)
SHARD_TENSORS = 24  # routed experts in a shard
GROUPS = WIDE[0] * WIDE[1] // GROUP


# --- Synthetic experts --------------------------------------------------------------------------


def gaussian_fp4(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return one matrix of normal weights in FP4, flat: packed codes uint8, exponents uint8."""
    weights = rng.standard_normal((GROUPS, GROUP), dtype=np.float32)
    greatest = np.abs(weights).max(axis=1, keepdims=True)
    weights *= rng.uniform(3.5, 6.9, (GROUPS, 1)).astype(np.float32) / greatest
    middles = (E2M1[:7] + E2M1[1:8]) / 2
    codes = np.searchsorted(middles, np.abs(weights)).astype(np.uint8)
    codes |= (weights < 0).astype(np.uint8) << 3
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed.reshape(-1), rng.integers(116, 122, GROUPS).astype(np.uint8)


def planned_expert(
    base: str, matrix: tuple[np.ndarray, np.ndarray], shift: int, bundle: bool
) -> list[PendingTensor]:
    """Return one expert's weight and scale, as the source or as the stock bundle has them."""
    out, columns = TALL if base.endswith("w2") else WIDE
    packed, exponents = matrix
    if bundle:
        weight, scale = ("weight", "U32", columns // 8), ("scales", "U8", columns // GROUP)
    else:
        weight, scale = ("weight", "I8", columns // 2), ("scale", "F8_E8M0", columns // GROUP)
    parts = ((weight, packed, 16 * shift), (scale, exponents, shift))
    return [
        PendingTensor(f"{base}.{name}", dtype, (out, width), lambda d=data, s=by: [np.roll(d, s)])
        for (name, dtype, width), data, by in parts
    ]


def make_checkpoint(folder: Path, tensors: int, bundle: bool) -> None:
    """Write a source, or the stock bundle of it; all tensors are two matrices, shifted."""
    rng = np.random.default_rng(0)
    matrices = [gaussian_fp4(rng) for _ in range(2)]
    names = [expert_base("layers", 0, i // 3, f"w{i % 3 + 1}") for i in range(tensors)]
    folder.mkdir(parents=True)
    weight_map = {}
    for first in range(0, tensors, SHARD_TENSORS):
        file = f"model-{first // SHARD_TENSORS + 1:05d}.safetensors"
        planned = []
        for i in range(first, min(first + SHARD_TENSORS, tensors)):
            planned += planned_expert(names[i], matrices[i % 2], 128 * i, bundle)
        planned.sort(key=lambda tensor: tensor.dtype == "U8")
        write_shard(folder / file, planned, {})
        weight_map |= {tensor.name: file for tensor in planned}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": MODEL_TYPE, "num_hidden_layers": 1, "n_routed_experts": tensors // 3}
    (folder / "config.json").write_text(json.dumps(config))


# --- The methods --------------------------------------------------------------------------------


def copy(times: Times, folder: Path, target: Path) -> None:
    """`cp` each shard of `folder` and fsync the copy."""
    target.mkdir()
    with turn(times) as call:
        for path in sorted(folder.glob("*.safetensors")):
            call("cp", path, target / path.name)
            with (target / path.name).open("rb") as file:
                filesystem.flush(file.fileno(), target / path.name)
        fsync_folder(target)
    shutil.rmtree(target)


def requantize(times: Times, source: Path, bundle: Path, *options: str) -> None:
    with turn(times) as call:
        call(sys.executable, REQUANTIZE, "--source", source, "--bundle", bundle, *options)


def plans_method(source: Path, bundle: Path, shards: int) -> None:
    """Do the plan's refix step on the experts of a bundle's first `shards` shards."""
    import mlx.core as mx

    origin = open_source(source).tensors
    table = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)
    for path in sorted(bundle.glob("*.safetensors"))[:shards]:
        arrays = mx.load(str(path))
        for name in [name for name in arrays if name.endswith(".weight") and parse_expert(name)]:
            base = name.removesuffix(".weight")
            packed = read_array(origin[name]).view(np.uint8)
            scales = UE8M0[read_array(origin[f"{base}.scale"])]
            decoded = table[packed].reshape(len(packed), -1, GROUP) * scales[..., None]
            weight, steps, offsets = mx.quantize(
                mx.array(decoded.reshape(len(packed), -1)), group_size=GROUP, bits=4, mode="affine"
            )
            arrays[name] = weight
            arrays[f"{base}.scales"] = steps.astype(mx.float16)
            arrays[f"{base}.biases"] = offsets.astype(mx.float16)
            mx.eval(arrays[name], arrays[f"{base}.scales"], arrays[f"{base}.biases"])
        temporary = path.with_name("new.safetensors")
        mx.save_safetensors(str(temporary), arrays, metadata={"format": "mlx"})
        temporary.replace(path)


def level_two(source: Path, bundle: Path) -> None:
    """Run verify's level 2 on a bundle that may hold experts only. Raises UserError for a fault."""
    opened, findings = scan(bundle, Findings()), Findings()
    done = compare_all.read_numbers(
        opened, open_source(source), os.cpu_count() or 1, lambda n: None
    )
    aggregate.aggregate(done, findings)
    if findings.errors or not done.compared:
        raise UserError(f"{bundle}", f"{findings.names}", "a bundle that is right", "debug")


COPY = "cp + fsync of the finished shards"
OURS = "requantize, all cores"
ONE = "requantize, --jobs 1"
IDLE = "requantize, nothing to do"
PLAN = "the plan's method"
CAT = "cat of bundle and source"
LEVEL_2 = "verify's level 2 of them"
METHODS = (COPY, OURS, ONE, IDLE, PLAN, CAT, LEVEL_2)


def measure(folder: Path, tensors: int, runs: int) -> dict[str, Times]:
    """Run every method `runs` times. Raises UserError when the plan's bytes differ from ours."""
    source, stock, work = folder / "source", folder / "stock", folder / "work"
    done, shards = folder / "done", min(tensors // SHARD_TENSORS, 4)
    times = {name: Times(tensors) for name in METHODS}
    times[PLAN] = Times(shards * SHARD_TENSORS)

    def fresh(target: Path) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(stock, target)
        settle(source, stock, done, target)
        return target

    requantize(Times(tensors), source, fresh(done))  # also compiles the kernel
    for _ in range(runs):
        settle(source, stock, done)
        copy(times[COPY], done, folder / "copy")
        requantize(times[OURS], source, fresh(work))
        fresh(work)
        with turn(times[PLAN]) as call:
            call(sys.executable, __file__, "--plans-method", source, work, str(shards))
        if sys.platform == "linux" and not same_tensors(work, done, shards):
            raise UserError(PLAN, "other bytes than requantize's", "the same", "debug")
        requantize(times[ONE], source, fresh(work), "--jobs", "1")
        requantize(times[IDLE], source, work)
        settle(source, done)
        with turn(times[CAT]) as call:
            call("cat", *sorted([*source.glob("*.safetensors"), *done.glob("*.safetensors")]))
        settle(source, done)
        with turn(times[LEVEL_2]) as call:
            call(sys.executable, __file__, "--level-two", source, done)
        print(f"run {len(times[OURS].wall)} of {runs}", file=sys.stderr)
    return times


def same_tensors(one: Path, other: Path, shards: int) -> bool:
    """Return True when the first shards of two bundles hold the same tensors, bit for bit."""
    first, second = open_bundle(one), open_bundle(other)
    for file in sorted(first.shards)[:shards]:
        for name, tensor in first.shards[file].tensors.items():
            again = second.tensors.get(name)
            if again is None or read_array(tensor).tobytes() != read_array(again).tobytes():
                return False
    return True


# --- The report ---------------------------------------------------------------------------------


def table(times: dict[str, Times]) -> str:
    """Return a Markdown table, one row a method."""
    rows = [
        "| | tensors | median s | least–most s | ms a tensor | CPU s | peak memory ≤ | × copying |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, t in times.items():
        rows.append(
            f"| {name} | {t.tensors} | {t.median:.2f} | {min(t.wall):.2f}–{max(t.wall):.2f} | "
            f"{t.each * 1e3:.1f} | {statistics.median(t.cpu):.2f} | {t.peak / 2**20:,.0f} MiB | "
            f"{t.each / times[COPY].each:.2f} |"
        )
    return "\n".join(rows)


def summary(times: dict[str, Times], nbytes: int) -> str:
    """Return the ratios, and Flash's time by extrapolation.

    nbytes: of bundle and source together, which CAT and LEVEL_2 read.
    """
    start, ours = times[IDLE].median, times[OURS]
    each = (ours.median - start) / ours.tensors
    flash = start + FLASH_TENSORS * each
    level_2, cat = times[LEVEL_2].median, times[CAT].median
    return "\n".join([
        f"- requantize: {ours.median / times[COPY].median:.2f} × the time of copying; a tensor "
        f"takes 1/{times[PLAN].each / ours.each:.1f} of the plan's time",
        f"- Flash, {FLASH_TENSORS:,} tensors, at the same disk speed: {flash / 60:.1f} minutes = "
        f"{start:.1f} s to start + {FLASH_TENSORS:,} × {each * 1e3:.2f} ms",
        f"- verify's level 2: {nbytes / level_2 / 1e9:.2f} GB/s of bundle and source; "
        f"cat: {nbytes / cat / 1e9:.2f}; {level_2 / cat:.1f} × the time of cat",
    ])  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where to work")
    parser.add_argument("--tensors", type=int, default=384, help="a multiple of 24, at least 96")
    parser.add_argument("--runs", type=int, default=5, help="turns of each method")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plans-method", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--level-two", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Measure and print the report, or do one step of it in this process. Returns 0."""
    arguments = parse_arguments()
    if arguments.plans_method:
        source, bundle, shards = arguments.plans_method
        plans_method(Path(source), Path(bundle), int(shards))
        return 0
    if arguments.level_two:
        level_two(*arguments.level_two)
        return 0
    if arguments.make:
        target, tensors = arguments.make
        make_checkpoint(Path(target), int(tensors), bundle=Path(target).name == "stock")
        return 0
    tensors, runs = arguments.tensors, arguments.runs
    if tensors < 96 or tensors % SHARD_TENSORS:
        raise UserError("--tensors", f"{tensors}", "a multiple of 24, at least 96", "change it")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as name:
        folder = Path(name)
        for kind in ("source", "stock"):  # a child's peak memory begins at its parent's
            with turn(Times(1)) as call:
                call(sys.executable, __file__, "--make", folder / kind, str(tensors))
        times = measure(folder, tensors, runs)
        nbytes = open_source(folder / "source").nbytes + open_bundle(folder / "done").nbytes
    print(machine(), table(times), summary(times, nbytes), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
