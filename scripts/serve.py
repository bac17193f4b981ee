"""Serve the bundle with the toolchain's own server, on this machine only.

The server is vMLX's where the toolchain has vmlx, else mlx-vlm's, else mlx_lm's with jang's model.
vMLX serves under the name deepseek-v4-flash-mlx-q4q8, by which 1.3.97 recognises the model family.
Prints the model's name for requests and a line of curl. Runs in the foreground; Ctrl-C stops it.

    .venv/bin/python scripts/serve.py --bundle DIR [--port 8010] [--python PYTHON]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import Any

from dsv4.errors import UserError, run
from dsv4.model.labels import recorded_quantizer
from dsv4.model.load import read_config
from dsv4.settings import add_setting
from dsv4.text import escape_line
from dsv4.toolchain.python_env import default_python, probe
from dsv4.toolchain.server import (
    HOST,
    check_free,
    model_name,
    server_command,
    server_environment,
    server_kind,
)
from dsv4.verification.checks.runtimes import Versions, refusal_reason

EXAMPLE = 10_000  # characters, more than the longest path


def check_loads(versions: Versions, config: dict[str, Any]) -> None:
    """Raise UserError for a runtime that is known to crash on bundles of this quantizer."""
    quantizer = recorded_quantizer(config) or ""
    if because := refusal_reason(versions, quantizer):
        found = f"vmlx {versions['vmlx'] or 'not installed'} and QUANTIZER={quantizer}"
        raise UserError("serve", found, "a runtime that loads it", because)


def example_request(kind: str, bundle: Path, port: int) -> str:
    """Return an example request: the model's name for clients, and a line of curl."""
    name = model_name(kind, bundle)
    body = {"model": name, "messages": [{"role": "user", "content": "What is 17+28?"}]}
    url = f"http://{HOST}:{port}/v1/chat/completions"
    header = shlex.quote("Content-Type: application/json")
    return f"model: {name}\ncurl {url} -H {header} -d {shlex.quote(json.dumps(body))}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "PORT", default=8010)
    add_setting(
        parser, "TOOLCHAIN_PYTHON", option="--python", default=default_python(), help="toolchain"
    )
    args = parser.parse_args()
    config = read_config(args.bundle)
    versions = probe(args.python)["packages"]
    check_loads(versions, config)
    check_free(args.port)
    kind = server_kind(versions)
    command = server_command(args.python, args.bundle, args.port, kind)
    for line in example_request(kind, args.bundle, args.port).splitlines():
        print(escape_line(line, EXAMPLE), flush=True)  # before exec drops what is buffered
    try:
        os.execvpe(args.python, command, server_environment(kind))
    except OSError as error:
        raise UserError(
            f"{args.python}", error.strerror or str(error), "a Python", "set TOOLCHAIN_PYTHON"
        ) from error


if __name__ == "__main__":
    raise SystemExit(run(main))
