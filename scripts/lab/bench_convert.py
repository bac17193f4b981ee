"""Measure the native converter against the disk, and against upstream's converter with the plan.

Makes sources that are one layer of Flash with fewer experts and its share of embedding and head;
each FP4 code is as frequent as the others. Then, in alternating turns:

- the large source: reading it and writing as many bytes as the bundle has, in pieces, with an fsync
  for each shard, by one thread without any arithmetic; and convert.py with all cores;
- the small one: convert.py, and upstream's converter followed by the plan's method on its bundle.

With --quantizers, those alone: convert.py, and verify's level 2 of the bundle, in CPU seconds for a
GB of source and bundle.

Before each turn the inputs are dropped from the page cache; times are of whole processes.

    .venv/bin/python scripts/lab/bench_convert.py [--folder DIR] [--experts 144] [--small 64]
        [--runs 3] [--quantizers lossless,mlx,affine4g32]

Takes about 7 minutes and 8 GB under --folder on two cores; prints a Markdown table.
Exit status: 0 done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from locations import SCRIPTS
from source_tensors import FLASH
from timing import Times, machine, settle, turn

from dsv4.errors import UserError, run
from dsv4.model.load import open_bundle
from dsv4.storage import filesystem
from dsv4.storage.atomic import format_bytes
from dsv4.storage.safetensors_file import read_array
from dsv4.toolchain.upstream_converter import CONVERTER

BENCH = SCRIPTS / "lab" / "bench.py"
FLASH_SOURCE = 160e9  # bytes
PIECE = 4 << 20


def nbytes(*folders: Path) -> int:
    """Return the bytes of the folders' shards."""
    return sum(p.stat().st_size for folder in folders for p in folder.glob("*.safetensors"))


def make_source(folder: Path, experts: int) -> None:
    """Write one layer of Flash with `experts` of its 256 experts, in shards of about 400 MB."""
    share = experts / FLASH.n_routed_experts / FLASH.num_hidden_layers
    sizes = vars(FLASH) | {
        "num_hidden_layers": 1, "num_hash_layers": 0, "num_nextn_predict_layers": 0,
        "compress_ratios": [4], "n_routed_experts": experts,
        "vocab_size": round(FLASH.vocab_size * share),
    }  # fmt: skip
    shards = str(max(2, experts // 32))
    with turn(Times(1)) as call:  # a child's peak memory begins at its parent's
        call(sys.executable, SCRIPTS / "lab" / "make_source.py", "--source", folder,
             "--sizes", json.dumps(sizes), "--shards", shards)  # fmt: skip


# --- The methods ----------------------------------------------------------------------------------


def read_and_write(source: Path, written: int, target: Path) -> None:
    """Read the source, and for each piece write its share of `written` bytes; fsync each file."""
    paths = sorted(source.glob("*.safetensors"))
    ratio = written / nbytes(source)
    buffer = np.random.default_rng(0).integers(0, 256, 2 * PIECE, dtype=np.uint8)
    target.mkdir()
    for path in paths:
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", 0) as writer:
            while n := reader.readinto(buffer[:PIECE]):
                writer.write(buffer[: round(n * ratio)])
            filesystem.flush(writer.fileno(), target / path.name)


def disk(times: Times, source: Path, written: int, target: Path) -> None:
    settle(source)
    with turn(times) as call:
        call(sys.executable, __file__, "--read-and-write", source, str(written), target)
    shutil.rmtree(target)


def native(times: Times, source: Path, bundle: Path, quantizer: str = "mlx") -> None:
    shutil.rmtree(bundle, ignore_errors=True)
    settle(source)
    with turn(times) as call:
        call(sys.executable, SCRIPTS / "convert.py", "--source", source, "--bundle", bundle,
             "--quantizer", quantizer)  # fmt: skip


def level_two(times: Times, source: Path, bundle: Path) -> None:
    settle(source, bundle)
    with turn(times) as call:
        call(sys.executable, BENCH, "--level-two", source, bundle)


def upstream(convert: Times, plan: Times, source: Path, bundle: Path) -> None:
    """Run upstream's converter, and then the plan's requantize on the bundle."""
    shutil.rmtree(bundle, ignore_errors=True)
    settle(source)
    with turn(convert) as call:
        call(sys.executable, "-m", CONVERTER, "--src", source, "--dst", bundle, "--profile", "4",
             "--format", "jang")  # fmt: skip
    settle(source, bundle)
    with turn(plan) as call:
        shards = str(len(list(bundle.glob("*.safetensors"))))
        call(sys.executable, BENCH, "--plans-method", source, bundle, shards)


def same_matrices(ours: Path, theirs: Path) -> bool:
    """Return True when the 8-bit matrices are the same, bit for bit, apart from the head."""
    mine, other = open_bundle(ours).tensors, open_bundle(theirs).tensors
    bases = [name.removesuffix(".scales") for name in mine if name.endswith(".scales")]
    bases = [base for base in bases if ".experts." not in base and base != "head"]
    names = [f"{base}.{part}" for base in bases for part in ("weight", "scales", "biases")]
    return all(read_array(mine[n]).tobytes() == read_array(other[n]).tobytes() for n in names)


# --- The report -----------------------------------------------------------------------------------


def row(name: str, experts: int, times: Times) -> str:
    return (
        f"| {name} | {3 * experts} | {times.median:.2f} "
        f"| {min(times.wall):.2f}–{max(times.wall):.2f} "
        f"| {statistics.median(times.user):.2f} + {statistics.median(times.system):.2f} "
        f"| {times.peak / 2**20:,.0f} MiB |"
    )


HEAD = [
    "| | experts' matrices | median s | least–most s | CPU s, user + system | peak memory |",
    "|---|---|---|---|---|---|",
]


def against_disk(folder: Path, experts: int, runs: int) -> str:
    """Measure reading and writing, and convert; return the report."""
    source, bundle = folder / "large", folder / "bundle"
    ours, copying = Times(1), Times(1)
    make_source(source, experts)
    native(Times(1), source, bundle)  # also compiles the kernel
    read, made = nbytes(source), nbytes(bundle)
    for i in range(runs):
        shutil.rmtree(bundle)
        disk(copying, source, made, folder / "copy")
        native(ours, source, bundle)
        print(f"run {i + 1} of {runs}", file=sys.stderr)
    shutil.rmtree(bundle)
    times = FLASH_SOURCE / read
    return "\n".join([
        f"{format_bytes(read)} read, {format_bytes(made)} written:", "", *HEAD,
        row("reading and writing as much, fsync", experts, copying),
        row("convert, native", experts, ours), "",
        f"- against reading and writing: {ours.median / copying.median:.2f} ×",
        f"- Flash, {format_bytes(int(FLASH_SOURCE))}, at the same disk speed: "
        f"{ours.median * times / 60:.1f} minutes = {ours.median:.1f} s × {times:.0f}",
    ])  # fmt: skip


def against_upstream(folder: Path, experts: int, runs: int) -> str:
    """Measure convert, and upstream's converter with the plan's method; return the report."""
    source, bundle, stock = folder / "little", folder / "bundle", folder / "stock"
    ours, convert, plan = Times(1), Times(1), Times(1)
    make_source(source, experts)
    for i in range(runs):
        native(ours, source, bundle)
        upstream(convert, plan, source, stock)
        if not same_matrices(bundle, stock):
            raise UserError("upstream's converter", "other bytes than ours", "the same", "debug")
        print(f"against upstream, run {i + 1}", file=sys.stderr)
    return "\n".join([
        *HEAD,
        row("convert, native", experts, ours),
        row("upstream's convert", experts, convert),
        row("the plan's requantize after it", experts, plan),
    ])  # fmt: skip


def by_quantizer(folder: Path, experts: int, quantizers: list[str], runs: int) -> str:
    """Measure convert and level 2 by each quantizer, in turns; return a table."""
    source, bundle = folder / "large", folder / "bundle"
    make_source(source, experts)
    sizes = {}
    times = {q: (Times(1), Times(1)) for q in quantizers}
    for number in range(-1, runs):  # the first turn compiles kernels, and does not count
        for q in quantizers:
            convert, verify = (Times(1), Times(1)) if number < 0 else times[q]
            native(convert, source, bundle, q)
            level_two(verify, source, bundle)
            sizes[q] = nbytes(source, bundle) / 1e9
            shutil.rmtree(bundle)
            print(f"{q}, turn {number + 1} of {runs}", file=sys.stderr)
    rows = ["| | GB of source and bundle | convert, CPU-s for a GB | level 2, CPU-s for a GB | "
            f"× {quantizers[0]} | level 2, wall s | peak memory |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    each = {q: [statistics.median(t.cpu) / sizes[q] for t in times[q]] for q in quantizers}
    for q, (convert, verify) in each.items():
        rows.append(f"| {q} | {sizes[q]:.1f} | {convert:.2f} | {verify:.2f} | "
                    f"{verify / each[quantizers[0]][1]:.1f} | {times[q][1].median:.1f} | "
                    f"{times[q][1].peak / 2**20:,.0f} MiB |")  # fmt: skip
    return "\n".join(rows)


def main() -> int:
    """Measure and print the report, or do one step of it in this process. Returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where to work")
    parser.add_argument("--experts", type=int, default=144, help="of the large source")
    parser.add_argument("--small", type=int, default=64, help="of the small one; 0 for none")
    parser.add_argument("--runs", type=int, default=3, help="turns of each")
    parser.add_argument("--quantizers", help="verify level 2 of each, with commas between them")
    parser.add_argument("--read-and-write", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read_and_write:
        source, written, target = args.read_and_write
        read_and_write(Path(source), int(written), Path(target))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as name:
        if args.quantizers:
            names = args.quantizers.split(",")
            print("", by_quantizer(Path(name), args.experts, names, args.runs), sep="\n")
            return 0
        print("", against_disk(Path(name), args.experts, args.runs), sep="\n")
        if args.small:
            runs = max(1, args.runs // 2)
            print("", against_upstream(Path(name), args.small, runs), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
