"""Time commands, and describe the machine, for the benches."""

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

from dsv4.errors import UserError
from dsv4.settings import environment_without_settings
from dsv4.storage.atomic import format_bytes


@dataclass
class Times:
    """Measurements of one method, by run: wall, user and system seconds; peak bytes."""

    tensors: int
    wall: list[float] = field(default_factory=list)
    user: list[float] = field(default_factory=list)
    system: list[float] = field(default_factory=list)
    peak: int = 0

    @property
    def cpu(self) -> list[float]:
        """Return user plus system seconds of each run."""
        return [sum(pair) for pair in zip(self.user, self.system, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def each(self) -> float:
        """Return the median seconds for one tensor."""
        return self.median / self.tensors


@contextlib.contextmanager
def turn(times: Times) -> Iterator[Callable[..., None]]:
    """Time the body, with a function that runs a command and raises UserError if that fails."""
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
    """Flush dirty pages, and drop the folders' shards from the page cache except on macOS."""
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
