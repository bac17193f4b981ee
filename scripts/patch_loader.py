"""Patch the installed jang_tools so that it loads correct bundles.

patches/load_jangtq.patch: jang 2.5.8 and 2.5.9 overwrite a right quantization config at load time.
patches/mlx_model.patch: their model does not run on a machine without Metal.
Each patch's header gives the reason, and the line of the installed file that needs it.

A file is in one of four states: pristine (will be patched), patched (nothing to do), not needed (it
lacks the faulty code: jang 2.5.12 and later), unknown (refused; the hunks that do not match are
printed). The original is kept as NAME.orig; --undo restores it byte for byte. Takes a second, needs
no network. Exit 0: patched, or nothing to do; 1: refused.

    .venv/bin/python scripts/patch_loader.py --python .venv/bin/python
    .venv/bin/python scripts/patch_loader.py --file /path/to/jang_tools/load_jangtq.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4.errors import UserError, run
from dsv4.settings import add_setting, parse_path
from dsv4.toolchain import python_env
from dsv4.toolchain.patches import DEFAULT, patch_file, read_patch, unpatch_file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "TOOLCHAIN_PYTHON", option="--python",
                help="toolchain Python whose jang_tools is patched")  # fmt: skip
    parser.add_argument("--app", type=parse_path, default=python_env.APP, help="where else to look")
    parser.add_argument("--file", type=parse_path, help="the file itself; needs one --patch")
    parser.add_argument("--patch", type=parse_path, action="append", help="default: both patches")
    parser.add_argument("--undo", action="store_true", help="restore the original")
    args = parser.parse_args()
    patches = [read_patch(path) for path in args.patch or DEFAULT]
    if args.file:
        patches = [patch for patch in patches if Path(patch.target).name == args.file.name]
        if not patches:
            raise UserError(
                f"{args.file}", "no patch for a file of that name", "one", "see --patch"
            )
    for patch in patches:
        if not patch.concerns_this_machine:
            print(f"{patch.target}: not needed on a Mac with Metal")
            continue
        file = args.file or python_env.module_file(args.python, patch.target, args.app)
        print(f"{file}: {(unpatch_file if args.undo else patch_file)(file, patch)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
