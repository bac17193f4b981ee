"""Measure the native converter against the disk, and against upstream's converter with the plan.

Makes synthetic sources in Flash's proportions: routed experts of its shapes and, for each 256 of
them, the matrices of one layer with its share of embedding and head. Then, turn by turn:

- the large source: reading it and writing as many bytes as the bundle has, in pieces, with an fsync
  for each shard, by one thread without any arithmetic; convert.py with all cores; cp of the
  source's shards, each flushed; and convert.py --quantizer lossless, which copies them;
- the small one: convert.py, and upstream's converter followed by the plan's method on its bundle.

Before each turn the inputs are put out of the page cache; times are of whole processes.

With --quantizers, those alone: convert.py, and verify's level 2 of what it made, in CPU seconds for
a GB of source and bundle, beside the first one's. --uniform: FP4 codes of which each is as frequent
as the others, so that nearly every group has both 6 and -6 and every second byte of the scales in
F16 is zero; else they are of normal weights.

    .venv/bin/python scripts/lab/bench_convert.py [--folder DIR] [--experts 144] [--small 64]
        [--runs 3] [--quantizers lossless,mlx,affine4g32] [--uniform]

Takes about 7 minutes and 8 GB under --folder on two cores; prints a Markdown table.
Exit status: 0 done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import locations
import numpy as np
from layer_source import make_source
from race import SHARD_TENSORS, Times, machine, settle, turn

from dsv4.errors import UserError, run
from dsv4.model.load import open_bundle
from dsv4.storage import filesystem
from dsv4.storage.atomic import format_bytes
from dsv4.storage.safetensors_file import read_array
from dsv4.toolchain.upstream_converter import CONVERTER

BENCH = locations.SCRIPTS / "lab" / "bench.py"
FLASH_SOURCE = 160e9  # bytes
PIECE = 4 << 20


# --- The contestants ------------------------------------------------------------------------------


def read_and_write(source: Path, written: int, target: Path) -> None:
    """Read the source, and for each piece write its share of `written` bytes; fsync each file."""
    paths = sorted(source.glob("*.safetensors"))
    ratio = written / sum(path.stat().st_size for path in paths)
    buffer = np.random.default_rng(0).integers(0, 256, 2 * PIECE, dtype=np.uint8)
    target.mkdir()
    for path in paths:
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", 0) as writer:
            while n := reader.readinto(buffer[:PIECE]):
                writer.write(buffer[: round(n * ratio)])
            filesystem.flush(writer.fileno(), target / path.name)


def native(times: Times, source: Path, bundle: Path, quantizer: str = "mlx") -> None:
    shutil.rmtree(bundle, ignore_errors=True)
    settle(source)
    with turn(times) as call:
        convert = locations.SCRIPTS / "convert.py"
        call(sys.executable, convert, "--source", source, "--bundle", bundle,
             "--quantizer", quantizer)  # fmt: skip


def level_two(times: Times, source: Path, bundle: Path) -> None:
    settle(source, bundle)
    with turn(times) as call:
        call(sys.executable, BENCH, "--level-two", source, bundle)


def copy(times: Times, source: Path, target: Path) -> None:
    """cp of the source's shards, each flushed; on macOS sync takes no file and flushes all."""
    settle(source)
    target.mkdir()
    flush = "sync" if sys.platform == "darwin" else "sync $2/$(basename $f)"
    shards = f"for f in $1/*.safetensors; do cp $f $2/ && {flush} || exit 1; done"
    with turn(times) as call:
        call("sh", "-c", shards, "sh", source, target)
    shutil.rmtree(target)


def disk(times: Times, source: Path, written: int, target: Path) -> None:
    settle(source)
    with turn(times) as call:
        call(sys.executable, __file__, "--read-and-write", source, str(written), target)
    shutil.rmtree(target)


def upstream(convert: Times, plan: Times, source: Path, bundle: Path) -> None:
    """Upstream's converter, and then the plan's requantize on what it made."""
    shutil.rmtree(bundle, ignore_errors=True)
    settle(source)
    with turn(convert) as call:
        call(sys.executable, "-m", CONVERTER, "--src", source, "--dst", bundle, "--profile", "4",
             "--format", "jang")  # fmt: skip
    settle(source, bundle)
    with turn(plan) as call:
        every = str(SHARD_TENSORS * len(list(bundle.glob("*.safetensors"))))
        call(
            sys.executable,
            BENCH,
            "--plans-method",
            source,
            bundle,
            every,
        )


def same_matrices(ours: Path, theirs: Path) -> bool:
    """True when the 8-bit tensors are the same, bit for bit: neither experts nor the head."""
    mine, other = open_bundle(ours).tensors, open_bundle(theirs).tensors
    names = [name for name in mine if ".experts." not in name and name != "head.weight"]
    return all(read_array(mine[n]).tobytes() == read_array(other[n]).tobytes() for n in names)


# --- The report -----------------------------------------------------------------------------------


def row(name: str, tensors: int, times: Times) -> str:
    return (
        f"| {name} | {tensors} | {times.median:.2f} | {min(times.wall):.2f}–{max(times.wall):.2f} "
        f"| {statistics.median(times.user):.2f} + {statistics.median(times.system):.2f} "
        f"| {times.peak / 2**20:,.0f} MiB |"
    )


def compete(folder: Path, experts: int, small: int, runs: int) -> str:
    """Take turns on both sources; returns the report."""
    large, little = folder / "large", folder / "little"
    ours, copying, ours_little, convert, plan, cp, lossless = (Times(1) for _ in range(7))
    native(Times(1), large, folder / "bundle")  # also compiles the kernel
    made = sum(path.stat().st_size for path in (folder / "bundle").glob("*.safetensors"))
    read = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    shutil.rmtree(folder / "bundle")
    for i in range(runs):
        disk(copying, large, made, folder / "copy")
        native(ours, large, folder / "bundle")
        copy(cp, large, folder / "copy")
        native(lossless, large, folder / "bundle", "lossless")
        print(f"run {i + 1} of {runs}", file=sys.stderr)
    shutil.rmtree(folder / "bundle")
    for i in range(max(1, runs // 2) if small else 0):
        native(ours_little, little, folder / "bundle")
        upstream(convert, plan, little, folder / "stock")
        if not same_matrices(folder / "bundle", folder / "stock"):
            raise UserError("upstream's converter", "other bytes than ours", "the same", "debug")
        print(f"against upstream, run {i + 1}", file=sys.stderr)
    rows = [
        f"{format_bytes(read)} read, {format_bytes(made)} written in the large source:", "",
        "| | experts' matrices | median s | least–most s | CPU s, user + system | peak memory |",
        "|---|---|---|---|---|---|",
        row("reading and writing as much, fsync", 3 * experts, copying),
        row("convert, native", 3 * experts, ours),
        row("cp of the source, fsync", 3 * experts, cp),
        row("convert, lossless", 3 * experts, lossless),
    ]  # fmt: skip
    ends = [
        f"- against reading and writing: {ours.median / copying.median:.2f} × (target 1.5)",
        f"- lossless against cp: {lossless.median / cp.median:.2f} × (target 1.1)",
        f"- Flash, {format_bytes(int(FLASH_SOURCE))}: "
        f"{ours.median * FLASH_SOURCE / read / 60:.1f} minutes = {ours.median:.1f} s × "
        f"{FLASH_SOURCE / read:.0f}, this machine and disk going on as measured",
    ]
    if small:
        rows += [
            row("convert, native", 3 * small, ours_little),
            row("upstream's convert", 3 * small, convert),
            row("the plan's requantize after it", 3 * small, plan),
        ]
        theirs = convert.median + plan.median
        ends.append(f"- against upstream and the plan: {theirs / ours_little.median:.0f} × as fast "
                    "with all start-ups (expected 20)")  # fmt: skip
    return "\n".join([*rows, "", *ends])


def by_quantizer(folder: Path, quantizers: list[str], runs: int) -> str:
    """Convert the large source by each, and verify level 2 of it, by turns; returns a table."""
    source, bundle = folder / "large", folder / "bundle"
    sizes = {}
    times = {q: (Times(1), Times(1)) for q in quantizers}
    for number in range(-1, runs):  # the first turn compiles kernels, and does not count
        for q in quantizers:
            convert, verify = (Times(1), Times(1)) if number < 0 else times[q]
            native(convert, source, bundle, q)
            level_two(verify, source, bundle)
            files = [*source.glob("*.safetensors"), *bundle.glob("*.safetensors")]
            sizes[q] = sum(path.stat().st_size for path in files) / 1e9
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where to work")
    parser.add_argument("--experts", type=int, default=144, help="of the large source")
    parser.add_argument("--small", type=int, default=64, help="of the small one; 0 for none")
    parser.add_argument("--runs", type=int, default=3, help="turns of each")
    parser.add_argument("--quantizers", help="verify level 2 of each, with commas between them")
    parser.add_argument("--uniform", action="store_true", help="every FP4 code as often as another")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--read-and-write", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the comparison. Returns 0 whatever it shows."""
    args = parse_arguments()
    if args.make:
        make_source(Path(args.make[0]), int(args.make[1]), args.uniform)
        return 0
    if args.read_and_write:
        source, written, target = args.read_and_write
        read_and_write(Path(source), int(written), Path(target))
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    small, kind_of = 0 if args.quantizers else args.small, ["--uniform"] * args.uniform
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as name:
        folder = Path(name)
        for kind, experts in (("large", args.experts), ("little", small)):
            if experts:  # in a process of its own: a child's peak begins at its parent's
                with turn(Times(1)) as call:
                    call(sys.executable, __file__, "--make", folder / kind, str(experts), *kind_of)
        if args.quantizers:
            report = by_quantizer(folder, args.quantizers.split(","), args.runs)
        else:
            report = compete(folder, args.experts, small, args.runs)
    print(machine(), report, sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
