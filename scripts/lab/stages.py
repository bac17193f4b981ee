"""Run this repository's scripts, and make a bundle by its stages."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import locations  # noqa: F401

from dsv4.toolchain.python_env import call_script, script_command


def run_script(
    python: Path, name: str, *arguments: object, stdin: Any = None, env: Mapping[str, str] = {}
) -> str:
    """Run scripts/NAME.py in `python` with `stdin` as JSON; return its stdout.

    Raises UserError with the last line of its stderr when it fails.
    """
    command = script_command(python, name, *arguments)
    return call_script(command, name, "run it alone to see why", json.dumps(stdin), env)


def make_bundle(
    source: Path,
    bundle: Path,
    quantizer: str,
    size: object = None,
    any_shape: bool = False,
    mtp: str = "source",
) -> None:
    """Convert, finalize and patch. size: bytes of a mixture, which is planned first."""
    python = Path(sys.executable)
    options: tuple[object, ...] = ("--quantizer", quantizer, "--mtp", mtp)
    if size is not None:
        plan = bundle.with_name(f"{bundle.name}.json")
        shapes = ["--any-shape"] * any_shape + ["--mtp", mtp]
        run_script(python, "plan", "--source", source, "--plan", plan, "--size", size, *shapes)
        options += ("--plan", plan)
    run_script(python, "convert", "--source", source, "--bundle", bundle, *options)
    run_script(python, "finalize", "--source", source, "--bundle", bundle)
    run_script(python, "patch", "--source", source, "--bundle", bundle)
