"""Run passes in the toolchain's Python: `python -m dsv4.evaluation.worker --runtime R --device D`.

Jobs come as lines of JSON on stdin (forward.py says what a job is); what happens goes out as lines
of JSON on stdout: how many bytes there are and were read, after which layer, with which error; at a
job's end {"done": true}, or {"stop": the four parts of a UserError}. When stdin closes, whoever
asked has ended, and this ends too, in the middle of a layer if need be.
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
    """Hand on every line of stdin; end with it."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def redirect_stdout() -> Any:
    """Where answers go; what others print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def check_device(name: str) -> mx.Device:
    """MLX's device of that name. Raises UserError when there is no GPU that this MLX can use."""
    device = mx.Device(getattr(mx, name))
    if not mx.is_available(device):
        raise UserError(f"DEVICE={name}", "no GPU that this MLX can use", "one", "use DEVICE=cpu")
    return device


def run_job(line: str, runtime: str, tell: Any) -> None:
    """Do one job."""
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

    def tell(said: dict[str, Any]) -> None:
        print(json.dumps(said), file=out, flush=True)

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
