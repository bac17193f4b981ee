"""Measure requantize against copying and against the plan's method, and verify against `cat`.

Makes synthetic routed experts of Flash's shapes (2048 × 4096 and 4096 × 2048) and a stock bundle of
them, then lets the contestants take turns: `cp` and fsync of the finished shards (the bytes that
requantize writes) and of the stock ones, requantize with all cores and with one, requantize with
nothing left to do (that is its start-up), and the plan's method on a share of the tensors: read,
decode through a lookup table, mx.quantize, save the shard with MLX. Then the finished bundle and
its source are read by `cat`, and by verify's level 2, which compares every number and hashes every
shard. Before each turn the inputs are put out of the page cache and everything is synced, for all
alike; times are of whole processes. At the end, or alone with --kernels: what each quantizer takes
for one tensor in memory, and what decoding and mx.quantize take for it, by turns, in CPU time.

    .venv/bin/python scripts/lab/bench.py [--folder DIR] [--tensors 384] [--runs 5] [--kernels]

Takes about 6 minutes and 10 GB under --folder on two cores; prints a Markdown table.
Exit status: 0 done; 1 failed; 2 usage.
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
from in_memory import kernel_table
from race import (
    SHARD_TENSORS,
    Times,
    gaussian_fp4,
    machine,
    planned_expert,
    settle,
    turn,
)

from dsv4.errors import UserError, run
from dsv4.model.load import open_bundle
from dsv4.model.names import GROUP, expert_base, parse_expert
from dsv4.model.source import open_source
from dsv4.model.source_format import MODEL_TYPE
from dsv4.quantization.fp4 import E2M1, UE8M0
from dsv4.storage import filesystem
from dsv4.storage.atomic import fsync_folder
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import read_array, write_shard
from dsv4.verification.numbers import aggregate, compare_all
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

REQUANTIZE = locations.SCRIPTS / "requantize.py"
FLASH_TENSORS = 33_792  # 43 layers × 256 experts × 3, and 1 × 256 × 3 under mtp


# --- Synthetic experts --------------------------------------------------------------------------


def make_checkpoint(folder: Path, tensors: int, bundle: bool) -> None:
    """Write a source, or the stock bundle of it; two matrices, shifted, serve for all tensors."""
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


# --- The contestants ----------------------------------------------------------------------------


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


def plans_method(source: Path, bundle: Path, tensors: int) -> None:
    """The plan's refix step on the first `tensors` experts of a bundle, shard by shard."""
    import mlx.core as mx

    origin = open_source(source).tensors
    table = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)
    for path in sorted(bundle.glob("*.safetensors"))[: tensors // SHARD_TENSORS]:
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
    """verify's level 2 of a bundle that has no more than experts. Raises UserError for any
    fault."""
    opened, findings = scan(bundle, Findings()), Findings()
    done = compare_all.read_numbers(
        opened, open_source(source), os.cpu_count() or 1, lambda n: None
    )
    aggregate.aggregate(done, findings)
    if findings.errors or not done.compared:
        raise UserError(f"{bundle}", f"{findings.names}", "a bundle that is right", "debug")


def compete(folder: Path, tensors: int, runs: int) -> dict[str, Times]:
    """Let all contestants take `runs` turns. Raises UserError when the plan's bytes differ from
    ours."""
    source, stock, work = folder / "source", folder / "stock", folder / "work"
    done, share = folder / "done", min(tensors, 4 * SHARD_TENSORS)
    times = {name: Times(share if name == PLAN else tensors) for name in CONTESTANTS}

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
            call(sys.executable, __file__, "--plans-method", source, work, share)
        if sys.platform == "linux" and not same_tensors(work, done, share // SHARD_TENSORS):
            raise UserError(
                "the plan's method", "other bytes than requantize's", "the same", "debug"
            )
        requantize(times[ONE], source, fresh(work), "--jobs", "1")
        requantize(times[IDLE], source, work)
        settle(source, stock, done)
        copy(times[COPY_STOCK], stock, folder / "copy")
        settle(source, done)
        with turn(times[CAT]) as call:
            call("cat", *sorted([*source.glob("*.safetensors"), *done.glob("*.safetensors")]))
        settle(source, done)
        with turn(times[PROOF]) as call:
            call(sys.executable, __file__, "--level-two", source, done)
        print(f"run {len(times[OURS].wall)} of {runs}", file=sys.stderr)
    return times


COPY = "cp + fsync of the finished shards"
COPY_STOCK = "cp + fsync of the stock shards"
OURS = "requantize, all cores"
ONE = "requantize, --jobs 1"
IDLE = "requantize, nothing to do"
PLAN = "the plan's method"
CAT = "cat of bundle and source"
PROOF = "verify's level 2 of them"
CONTESTANTS = (COPY, COPY_STOCK, OURS, ONE, IDLE, PLAN, CAT, PROOF)


# --- The report ---------------------------------------------------------------------------------


def table(times: dict[str, Times]) -> str:
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


def conclusions(times: dict[str, Times], nbytes: int) -> str:
    """The three targets, and Flash's time with the basis of the extrapolation.

    nbytes: of bundle and source together, which CAT and PROOF read.
    """
    ours, start = times[OURS], times[IDLE].median
    each = (ours.median - start) / ours.tensors
    flash = start + FLASH_TENSORS * each
    return "\n".join([
        f"- against copying: {ours.median / times[COPY].median:.2f} × with start-up, "
        f"{(ours.median - start) / times[COPY].median:.2f} × without (target 1.25)",
        f"- against the plan's method, a tensor: {times[PLAN].each / ours.each:.1f} × as fast "
        "(target 8)",
        f"- peak memory: {ours.peak / 2**20:,.0f} MiB (target 1,024)",
        f"- Flash, {FLASH_TENSORS:,} tensors: {flash / 60:.1f} minutes = {start:.1f} s to start "
        f"+ {FLASH_TENSORS:,} × {each * 1e3:.2f} ms, this machine and disk going on as measured; "
        f"the plan's method: {FLASH_TENSORS * times[PLAN].each / 60:.0f} minutes; "
        f"copying: {FLASH_TENSORS * times[COPY].each / 60:.1f} minutes",
        f"- verify's level 2: {nbytes / times[PROOF].median / 1e9:.2f} GB/s of bundle and source; "
        f"cat: {nbytes / times[CAT].median / 1e9:.2f}; "
        f"{times[PROOF].median / times[CAT].median:.1f} × the time of cat",
    ])  # fmt: skip


def same_tensors(one: Path, other: Path, shards: int) -> bool:
    """True when the first shards of two bundles hold the same tensors, bit for bit."""
    first, second = open_bundle(one), open_bundle(other)
    for file in sorted(first.shards)[:shards]:
        for name, tensor in first.shards[file].tensors.items():
            again = second.tensors.get(name)
            if again is None or read_array(tensor).tobytes() != read_array(again).tobytes():
                return False
    return True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where to work")
    parser.add_argument("--tensors", type=int, default=384, help="a multiple of 24, at least 96")
    parser.add_argument("--runs", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--kernels", action="store_true", help="only the quantizers in memory")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plans-method", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--level-two", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the comparison. Returns 0 whatever it shows."""
    arguments = parse_arguments()
    if arguments.plans_method:
        source, bundle, tensors = arguments.plans_method
        plans_method(Path(source), Path(bundle), int(tensors))
        return 0
    if arguments.level_two:
        level_two(*arguments.level_two)
        return 0
    if arguments.make:
        target, tensors = arguments.make
        make_checkpoint(Path(target), int(tensors), bundle=Path(target).name == "stock")
        return 0
    if arguments.kernels:
        print(machine(), kernel_table(), sep="\n\n")
        return 0
    if arguments.tensors < 96 or arguments.tensors % SHARD_TENSORS or arguments.runs < 1:
        raise UserError(
            "--tensors", f"{arguments.tensors}", "a multiple of 24, at least 96", "change it"
        )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as name:
        folder = Path(name)
        for kind in ("source", "stock"):  # in a process of its own: a child's peak begins at ours
            with turn(Times(1)) as call:
                call(sys.executable, __file__, "--make", folder / kind, arguments.tensors)
        times = compete(folder, arguments.tensors, arguments.runs)
        nbytes = open_source(folder / "source").nbytes + open_bundle(folder / "done").nbytes
    print(machine(), table(times), conclusions(times, nbytes), kernel_table(), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
