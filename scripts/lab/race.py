"""Synthetic experts, timing of commands and the machine's description, for the benches."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import locations  # noqa: F401
import numpy as np

from dsv4.errors import UserError
from dsv4.model.names import GROUP
from dsv4.quantization.fp4 import E2M1
from dsv4.settings import environment_without_settings
from dsv4.storage.atomic import format_bytes
from dsv4.storage.safetensors_file import PendingTensor

WIDE, TALL = (2048, 4096), (4096, 2048)  # Flash's w1 and w3, and w2: (out, in)
SHARD_TENSORS = 24  # routed experts in a shard of the sources that are made
GROUPS = WIDE[0] * WIDE[1] // GROUP


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
    """One expert's weight and scale, as the source or as the stock bundle has them."""
    out, columns = TALL if base.endswith("w2") else WIDE
    packed, exponents = matrix
    first = ("U32", columns // 8, "weight") if bundle else ("I8", columns // 2, "weight")
    second = (
        ("U8", columns // GROUP, "scales") if bundle else ("F8_E8M0", columns // GROUP, "scale")
    )
    return [
        PendingTensor(f"{base}.{part}", dtype, (out, width), lambda d=data, s=step: [np.roll(d, s)])
        for (dtype, width, part), data, step in (
            (first, packed, 16 * shift),
            (second, exponents, shift),
        )
    ]


@dataclass
class Times:
    """Measurements of one contestant, by run: wall, user and system seconds; peak bytes."""

    tensors: int
    wall: list[float] = field(default_factory=list)
    user: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def cpu(self) -> list[float]:
        """User plus system seconds of each run."""
        return [sum(pair) for pair in zip(self.user, self.system, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def each(self) -> float:
        """Median seconds for one tensor."""
        return self.median / self.tensors


@contextlib.contextmanager
def turn(times: Times) -> Iterator[Callable[..., None]]:
    """Time the body. It gets a function that runs a command and raises UserError if that fails."""
    user = system = 0.0

    def call(*command: str | Path) -> None:
        nonlocal user, system
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL,
                                   env=environment_without_settings())  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise UserError(f"{command[0]}", f"status {process.returncode}", "0", "see its message")
        user += usage.ru_utime
        system += usage.ru_stime
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, KiB here
        times.peak = max(times.peak, usage.ru_maxrss * unit)

    start = time.perf_counter()
    yield call
    times.wall.append(time.perf_counter() - start)
    times.user.append(user)
    times.system.append(system)


def settle(*folders: Path) -> None:
    """Flush dirty pages and drop the folders' shards from the page cache (not on macOS)."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in (path for folder in folders for path in folder.glob("*.safetensors")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> str:
    """Return one line: date, processor, cores, memory, system, versions, load."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "numba"))
    return (
        f"{datetime.date.today()}: {processor}, {os.cpu_count()} cores, "
        f"{format_bytes(memory)} memory, "
        f"{platform.system()} {platform.release()}, {versions}, load {os.getloadavg()[0]:.1f}"
    )
