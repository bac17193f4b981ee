"""Upstream's converter, `jang_tools.dsv4.convert_dsv4_jangtq --profile 4 --format jang`.

It makes the stock bundle: attention, shared experts, embedding and head are correct 8-bit affine;
routed experts are the source's FP4 bytes under a wrong label, which requantize corrects. It reads
shards by a glob and drops missing tensors silently, so source and bundle are checked against their
indexes before and after it. Takes hours for the 160 GB source, and cannot resume.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dsv4.errors import UserError, with_path
from dsv4.storage import filesystem, safe_paths
from dsv4.storage.atomic import fsync_folder
from dsv4.storage.disk_space import MARK
from dsv4.storage.locks import LOCK
from dsv4.toolchain.python_env import toolchain_environment

CONVERTER = "jang_tools.dsv4.convert_dsv4_jangtq"


def run_converter(python: Path, source: Path, target: Path) -> None:
    """Run upstream's converter without the DSV4_* variables that would change its result."""
    env = {k: v for k, v in toolchain_environment().items() if not k.startswith("DSV4_")}
    command = [
        str(python), "-m", CONVERTER,
        "--src", str(source.resolve()),
        "--dst", str(target.resolve()),
        "--profile", "4",
        "--format", "jang",
    ]  # fmt: skip
    status = subprocess.run(command, env=env, stdout=sys.stderr).returncode
    if status:
        raise UserError(
            CONVERTER,
            f"exit status {status}",
            "0",
            "read its last lines above (no module: check TOOLCHAIN_PYTHON; no space: free some)",
        )


def make_durable(folder: Path) -> None:
    """Flush every file of the new bundle before it gets its name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                filesystem.flush(file.fileno(), path)
        else:
            fsync_folder(path)
    fsync_folder(folder)


def is_native(shard: Path) -> bool:
    """Return True for a shard that the native converter finished, by its metadata."""
    with with_path(shard), shard.open("rb") as file:
        return b'"convert_layout"' in file.read(4096)


def clear_folder(folder: Path) -> None:
    """Remove the files of a killed run. Raises UserError for shards of the native converter."""
    if any(is_native(path) for path in folder.glob("*.safetensors") if path.is_file()):
        raise UserError(
            f"{folder}", "finished shards of CONVERTER=native", "a folder of this converter's",
            "go on with CONVERTER=native, or delete this folder",
        )  # fmt: skip
    safe_paths.clear_folder(folder, {LOCK, MARK})


def convert_into(folder: Path, source: Path, python: Path) -> None:
    """Convert `source` into a cleared `folder`, durably; clear it again on failure."""
    try:
        run_converter(python, source, folder)
        make_durable(folder)
    except BaseException:
        safe_paths.clear_folder(folder, {LOCK, MARK})
        raise
