"""Convert the FP4/FP8 source into a bundle with upstream's own converter.

Runs `jang_tools.dsv4.convert_dsv4_jangtq --profile 4 --format jang` with the toolchain's Python.
The result is the stock bundle: attention, shared experts, embedding and head are 8-bit affine and
right; routed experts are still the source's FP4 bytes under a wrong label, which requantize.py
mends.

The converter reads shards by a glob and drops what is missing without a word, so the source is
first checked against its index. It writes into a hidden sibling that takes the bundle's name only
when every tensor has arrived. An existing bundle is never written over: one that holds all of this
source counts as done. Costs hours for the 160 GB source, and the bundle's size in disk.

    .venv/bin/python scripts/convert.py --source DIR --bundle DIR [--python PYTHON]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dsv4.checkpoint import INDEX, Checkpoint, check_index, open_bundle, open_source
from dsv4.durable import fsync_folder
from dsv4.names import kind
from dsv4.stop import Stop, run
from dsv4.toolchain import environment

CONVERTER = "jang_tools.dsv4.convert_dsv4_jangtq"


def check_complete(bundle: Checkpoint, source: Checkpoint) -> None:
    """Raise Stop unless the bundle has a tensor for every tensor of the source."""
    check_index(bundle, "convert")
    wanted = [name for name in source.tensors if kind(name) != "scale"]
    missing = [name for name in wanted if name not in bundle.tensors]
    if missing:
        raise Stop(
            f"{bundle.folder}",
            f"no {missing[0]} ({len(missing):,} of {len(wanted):,} tensors missing)",
            "a tensor for every tensor of the source",
            "delete this folder and convert again",
        )


def is_done(folder: Path, source: Checkpoint) -> bool:
    """True when `folder` holds this source converted; False when it is absent or empty.

    Raises Stop when it holds anything else, because nothing is written over.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / INDEX).is_file():
        raise Stop(
            f"{folder}",
            "a folder with other files",
            "no folder, or a bundle of this source",
            "choose another BUNDLE, or move it away",
        )
    bundle = open_bundle(folder)
    wanted = {name for name in source.tensors if kind(name) != "scale"}
    if not wanted <= set(bundle.tensors):
        check_complete(bundle, source)
    return True


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A locked, empty, hidden sibling of `folder`; removed when the body raises."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.converting")
    temporary.mkdir(exist_ok=True)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Stop(
                f"{temporary}", "another convert at work", "none", "wait for it, or stop it"
            ) from error
        for left_over in temporary.iterdir():
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def run_converter(python: Path, source: Path, target: Path) -> None:
    """Run upstream's converter without the DSV4_* variables that would change its result."""
    env = {k: v for k, v in environment().items() if not k.startswith("DSV4_")}
    command = [
        str(python), "-m", CONVERTER,
        "--src", str(source.resolve()),
        "--dst", str(target.resolve()),
        "--profile", "4",
        "--format", "jang",
    ]  # fmt: skip
    status = subprocess.run(command, env=env, stdout=sys.stderr).returncode
    if status:
        raise Stop(
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
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)


def convert(source: Checkpoint, folder: Path, python: Path) -> None:
    """Convert `source` into `folder`, which appears whole or not at all."""
    with workplace(folder) as temporary:
        run_converter(python, source.folder, temporary)
        check_complete(open_bundle(temporary), source)
        make_durable(temporary)
        temporary.replace(folder)
        fsync_folder(folder.parent)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="toolchain")
    args = parser.parse_args()
    source = open_source(args.source)
    if is_done(args.bundle, source):
        print(f"{args.bundle}: holds every tensor of {args.source} already; delete it to convert "
              "afresh")  # fmt: skip
        return 0
    convert(source, args.bundle, args.python)
    print(f"{args.bundle}: converted, {len(source.tensors):,} source tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
