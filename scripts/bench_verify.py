"""Measure verify's level 2 beside `cat` of the same files.

Level 2 reads the whole bundle and the whole source, so `cat` of both to /dev/null is the least that
any such comparison can cost. The two take turns; before each the files are put out of the page
cache (Linux; macOS has no call for that, so there a bundle larger than memory is needed). Level 2's
kernels are compiled before the first turn.

    .venv/bin/python scripts/bench_verify.py --source DIR --bundle DIR [--runs 3] [--jobs N]

Prints a Markdown table, medians of the wall times. Exit status: 0 done; 1 failed; 2 usage.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from dsv4 import numbers
from dsv4.checkpoint import Checkpoint, open_bundle, open_source
from dsv4.durable import human
from dsv4.findings import Findings
from dsv4.stop import Stop, run
from dsv4.survey import Survey, survey


def files_of(*checkpoints: Checkpoint) -> list[Path]:
    """The shards of these checkpoints."""
    return [shard.path for one in checkpoints for shard in one.shards.values()]


def forget(files: list[Path]) -> bool:
    """Put files out of the page cache; False where the system has no call for it."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def turns(runs: int, files: list[Path], contestants: dict[str, Callable[[], object]]) -> dict:
    """Contestant → (wall seconds, CPU seconds) of each turn; they alternate."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, work in contestants.items():
            forget(files)
            start, before = time.perf_counter(), os.times()
            work()
            wall, after = time.perf_counter() - start, os.times()
            cpu = sum(after[:4]) - sum(before[:4])
            times[name].append((wall, cpu))
    return times


def table(times: dict, nbytes: int) -> str:
    """Medians as Markdown; GB/s count the bytes of bundle and source."""
    lines = ["| | wall s | CPU s | GB/s |", "|---|---|---|---|"]
    for name, taken in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {nbytes / wall / 1e9:.2f} |")
    return "\n".join(lines)


def prepared(folder: Path) -> Survey:
    """The bundle. Raises Stop when verify's level 1 could not even open it."""
    bundle = survey(folder, Findings())
    if bundle is None:
        raise Stop(f"{folder}", "no config.json or index", "a bundle", "run verify")
    return bundle


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    source, bundle = open_source(args.source), prepared(args.bundle)
    files = files_of(source, open_bundle(args.bundle))
    nbytes = sum(path.stat().st_size for path in files)
    numbers.warm_up(bundle, source)

    def cat() -> None:
        for path in files:
            subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)

    def level_two() -> None:
        numbers.read_numbers(bundle, source, args.jobs, lambda done: None)

    times = turns(args.runs, files, {"cat": cat, f"level 2, {args.jobs} jobs": level_two})
    cold = "cold" if forget([]) else "whatever the page cache held"
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
          f"{human(nbytes)} of bundle and source, {cold}; median of {args.runs}\n")  # fmt: skip
    print(table(times, nbytes))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
