"""Run passes in the toolchain's Python: `python -m dsv4.evaluation.worker --runtime R --device D`.

Reads jobs (PassSpec of forward.py) as lines of JSON from stdin. Writes lines of JSON to stdout:
total and read bytes, the finished layer and its error, and at the end of a job {"done": true}, or
{"stop": the four parts of a UserError}. Exits at once when stdin closes: the parent has ended then.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from typing import Any

import mlx.core as mx

from dsv4.errors import UserError

CACHE = 512 << 20  # bytes that MLX may keep for later, beside what it uses


def read_stdin(jobs: queue.SimpleQueue[str]) -> None:
    """Queue every line of stdin; exit at its end."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def redirect_stdout() -> Any:
    """Return a file on stdout; everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def check_device(name: str) -> mx.Device:
    """Return MLX's device by name. Raises UserError without a GPU that this MLX can use."""
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise UserError(f"DEVICE={name}", "no GPU that this MLX can use", "one", "use DEVICE=cpu")
    return device


def run_job(line: str, runtime: str, tell: Any) -> None:
    """Run one job."""
    from dsv4.evaluation.forward import (  # after the device is chosen: model code looks
        PassRunner,
        PassSpec,
    )
    from dsv4.evaluation.model_code import RUNTIMES

    try:
        PassRunner(PassSpec(**json.loads(line)), RUNTIMES[runtime], tell).run()
        tell({"done": True, "peak": mx.get_peak_memory()})
    except UserError as stop:
        tell({"stop": stop.parts})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runtime", choices=("jang", "vlm"), required=True)
    parser.add_argument("--device", choices=("cpu", "gpu"), required=True)
    args = parser.parse_args()
    out = redirect_stdout()

    def tell(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        mx.set_default_device(check_device(args.device))
        mx.set_cache_limit(CACHE)
    except UserError as stop:
        tell({"stop": stop.parts})
        return 1
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read_stdin, args=(jobs,), daemon=True).start()
    while True:
        run_job(jobs.get(), args.runtime, tell)


if __name__ == "__main__":
    raise SystemExit(main())
