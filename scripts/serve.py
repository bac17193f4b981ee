"""Serve the bundle with the toolchain's own server, on this machine only.

Which one that is, the toolchain tells: vMLX's where it has vmlx, else mlx-vlm's, else mlx_lm's with
jang's model. vMLX gets the name deepseek-v4-flash-mlx-q4q8, by which 1.3.97 recognises the model
family. Stays in the foreground; Ctrl-C stops it.

    .venv/bin/python scripts/serve.py --bundle DIR [--port 8010] [--python PYTHON]
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from dsv4.errors import UserError, run
from dsv4.model.labels import recorded_quantizer
from dsv4.model.load import read_config
from dsv4.settings import add_setting
from dsv4.toolchain.python_env import default_python, probe
from dsv4.toolchain.server import check_free, server_command, server_environment, server_kind
from dsv4.verification.checks.runtimes import Versions, refusal_reason


def check_loads(versions: Versions, config: dict[str, Any]) -> None:
    """Raise UserError for a runtime that is known to crash on bundles of this quantizer."""
    quantizer = recorded_quantizer(config) or ""
    if because := refusal_reason(versions, quantizer):
        found = f"vmlx {versions['vmlx'] or 'not installed'} and QUANTIZER={quantizer}"
        raise UserError("serve", found, "a runtime that loads it", because)


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
    words = server_command(args.python, args.bundle, args.port, kind)
    try:
        os.execvpe(args.python, words, server_environment(kind))
    except OSError as error:
        raise UserError(
            f"{args.python}", error.strerror or str(error), "a Python", "set TOOLCHAIN_PYTHON"
        ) from error


if __name__ == "__main__":
    raise SystemExit(run(main))
