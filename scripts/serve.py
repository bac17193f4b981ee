"""Serve the bundle with vMLX's own server, on this machine only.

Runs `vmlx_engine.cli serve` of the toolchain's Python under the name deepseek-v4-flash-mlx-q4q8.
The name matters: vMLX 1.3.97 recognises the model family by it. Stays in the foreground; Ctrl-C
stops it.

    .venv/bin/python scripts/serve.py --bundle DIR [--port 8010] [--python PYTHON]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dsv4.model.opening import read_config
from dsv4.runtime.server import check_free, command
from dsv4.runtime.toolchain import default, environment
from dsv4.settings import parse_port
from dsv4.stop import Stop, run


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--port", type=parse_port, default=8010)
    parser.add_argument("--python", type=Path, default=default(), help="toolchain")
    args = parser.parse_args()
    read_config(args.bundle)
    check_free(args.port)
    try:
        os.execvpe(args.python, command(args.python, args.bundle, args.port), environment())
    except OSError as error:
        raise Stop(
            f"{args.python}", error.strerror or str(error), "a Python", "set TOOLCHAIN_PYTHON"
        ) from error


if __name__ == "__main__":
    raise SystemExit(run(main))
