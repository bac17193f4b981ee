"""Run passes in the toolchain's Python, show their progress, and reuse finished ones.

Each pass has its own folder in the command's work folder, named by a hash of everything that its
result depends on: the same command continues a killed one, and a changed input starts a new pass.
The user names the work folder, so only folders with our mark are removed
(dsv4/storage/own_folders.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv4.conversion.shard_metadata import fingerprint
from dsv4.errors import UserError
from dsv4.evaluation.activations import LOGITS
from dsv4.storage import disk_space, own_folders
from dsv4.storage.checkpoint import Checkpoint, parse_json
from dsv4.storage.json_types import validate
from dsv4.storage.locks import locked
from dsv4.text import escape_line, print_escaped
from dsv4.toolchain.child_process import last_log_line
from dsv4.toolchain.python_env import LONG_PROMPTS, ROOT, environment_with_dsv4, run_python

ENGINE = "dsv4.evaluation.worker"
PREFIX, LOGS = "pass-", "engine-logs"
PYTHON = ROOT / ".toolchain" / "new" / "bin" / "python"  # the old stack's model is not faithful
ASK = """
import importlib.metadata as m, importlib.util as u, json, sys, mlx.core as mx
assert u.find_spec(sys.argv[1]), "no " + sys.argv[1]
known = {d.metadata["Name"]: d.version for d in m.distributions()}
print(json.dumps({
    "devices": [d for d in ("cpu", "gpu") if mx.is_available(getattr(mx, d))],
    "versions": {name: known[name] for name in sys.argv[2:] if name in known}}))
"""
CODE = {"jang": ("jang_tools", "jang", "mlx", "mlx-lm"), "vlm": ("mlx_vlm", "mlx", "mlx-vlm")}
PACKAGES = Path(__file__).resolve().parents[1]
CODE_PACKAGES = ("evaluation", "quantization", "model", "storage")  # what the worker imports
MESSAGE = {
    "total?": int, "read?": int, "layer?": int, "error?": (float, None), "done?": bool,
    "peak?": int, "stop?": [str],
}  # fmt: skip


@dataclass(frozen=True)
class PassSettings:
    """Settings of all passes of a command.

    python: of the toolchain, with its devices and the versions of its packages. runtime: whose
    model code. work: folder for intermediate results.
    """

    python: Path
    runtime: str
    work: Path
    devices: tuple[str, ...]
    versions: Mapping[str, str]


def settings_for(python: Path, runtime: str, work: Path) -> PassSettings:
    """Query a toolchain's Python. Raises UserError when it does not run or has no model code."""
    command = [str(python), "-c", ASK, *CODE[runtime]]
    expected = f"mlx and {CODE[runtime][0]}"
    output = run_python(f"{python}", command, expected, "set TOOLCHAIN_PYTHON or RUNTIME")
    known = parse_json(output, f"{python}", {"devices": [str], "versions": {str: str}})
    return PassSettings(python, runtime, work, tuple(known["devices"]), known["versions"])


def devices_from_args(device: str | None, settings: PassSettings) -> list[str]:
    """Return the devices for cpu, gpu, both, or None (the best). Raises UserError without one."""
    available = settings.devices
    wanted = {"both": ["cpu", "gpu"], None: [available[-1]]}.get(device, [device])
    if missing := [name for name in wanted if name not in available]:
        found = f"no {missing[0].upper()} that MLX in {settings.python} can use"
        todo = f"use DEVICE={available[-1]}"
        raise UserError(f"DEVICE={device}", found, " and ".join(wanted), todo)
    return wanted


class WorkerProcess:
    """The toolchain's Python on one device, which runs one pass after another."""

    def __init__(self, settings: PassSettings, device: str) -> None:
        self.settings, self.device = settings, device
        self._log = own_folders.make_own(settings.work / LOGS) / f"{device}.log"
        inherited = environment_with_dsv4()
        env = {k: v for k, v in inherited.items() if not k.startswith(("DSV4_", "VMLX_"))}
        env |= LONG_PROMPTS
        command = [str(settings.python), "-m", ENGINE, "--runtime", settings.runtime]
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*command, "--device", device], env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.wait()
        for stream in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def messages(self, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the worker's messages for a job. Raises UserError when it stops or dies."""
        what = f"{ENGINE} over {job['folder']}"
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job), file=self._child.stdin, flush=True)
        for line in self._child.stdout:
            message = validate(what, json.loads(line), MESSAGE, "look at its log")
            if "stop" in message:
                raise UserError(*message["stop"])
            yield message
            if message.get("done"):
                return
        raise UserError(what, last_log_line(self._log), "a pass to its end",
                   f"read {self._log}; the same command goes on")  # fmt: skip

    def run(self, job: Mapping[str, Any], name: str) -> int:
        """Run a job with a progress bar. Returns the peak memory of MLX in bytes."""
        with tqdm(unit="B", unit_scale=True, desc=escape_line(name, 40), disable=None) as bar:
            for message in self.messages(job):
                bar.total = message.get("total", bar.total)
                bar.update(message.get("read", 0))
                if "layer" in message:
                    error = message.get("error")
                    after = "" if error is None else f", error {error:.2g}"
                    bar.set_postfix_str(f"layer {message['layer']}{after}")
        return message["peak"]


# --- Folders of passes --------------------------------------------------------------------------


def key_of(
    checkpoint: Checkpoint, settings: PassSettings, device: str, job: Mapping[str, Any]
) -> str:
    """Return 16 hex digits of a hash of everything that a pass's result depends on.

    Headers, samples, sizes and times of the shards; config.json; the tokens; model code and device;
    our own code that computes or reads the numbers (CODE_PACKAGES).
    """
    shards = [
        [file, status.st_size, status.st_mtime_ns]
        for file in sorted(checkpoint.shards)
        for status in [(checkpoint.folder / file).stat()]
    ]
    code = [
        path.read_text(encoding="utf-8")
        for package in CODE_PACKAGES
        for path in sorted((PACKAGES / package).glob("*.py"))
    ]
    asked = {k: v for k, v in job.items() if k != "work"}
    stack = [settings.runtime, f"{settings.python.absolute()}", dict(settings.versions), device]
    parts = [fingerprint(checkpoint), shards, checkpoint.config, stack, asked, code]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(checkpoint: Checkpoint, settings: PassSettings, device: str, job: dict) -> Path:
    """Create and return the pass's folder. Raises UserError for a folder without our mark."""
    return own_folders.make_own(
        settings.work / f"{PREFIX}{key_of(checkpoint, settings, device, job)}"
    )


def folders(work: Path) -> list[Path]:
    """Return the folders of passes with our mark."""
    named = (p for p in sorted(work.iterdir()) if re.fullmatch(f"{PREFIX}[0-9a-f]{{16}}", p.name))
    return [path for path in named if own_folders.is_own(path)]


def prepare(work: Path) -> None:
    """Create the work folder with our mark. An existing folder is not marked and will be kept."""
    if not work.exists():
        own_folders.make_own(work)


def remove_other_passes(work: Path, wanted: list[Path]) -> None:
    """Remove the passes of runs with other inputs, which take gigabytes."""
    for path in folders(work):
        if path not in wanted:
            print_escaped(f"{escape_line(path)}: begun with other inputs or settings; removed")
            own_folders.remove_own(path)


def remove_intermediates(work: Path) -> None:
    """Remove hidden states, sums and logits after the result is written."""
    with locked(work):
        for path in [*folders(work), work / LOGS]:
            own_folders.remove_own(path)
    if [path.name for path in work.iterdir()] == [own_folders.MARK]:
        own_folders.remove_own(work)


def check_space(work: Path, config: Mapping[str, Any], tokens: int, kept: int, heads: int) -> None:
    """Raise UserError without space for hidden states of `kept` layers and `heads` logits."""
    state = 4 * tokens * config["hc_mult"] * config["hidden_size"]
    need = (kept + 2) * state + heads * 4 * tokens * config["vocab_size"]
    here = disk_space.folder_bytes(work)
    disk_space.check_free_space(work, need - here, "", "free some, or ask for fewer TOKENS")


def is_complete(folder: Path) -> bool:
    """Return True when a pass has written its logits."""
    return (folder / LOGITS).is_file()
