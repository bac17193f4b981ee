"""Copy the tokenizer and encoding files into the bundle.

Copies from the source, or from a finished bundle that is known to work (--reference). Files that
patch.py edits are copied only when the bundle lacks them, or with --reference; the others always.
Takes a second.

    .venv/bin/python scripts/finalize.py --source DIR --bundle DIR [--reference DIR]
"""

from __future__ import annotations

import argparse

from dsv4.conversion.tokenizer_files import copy_tokenizer_files
from dsv4.errors import run
from dsv4.model.folder_roles import bundle_path
from dsv4.model.load import read_config
from dsv4.settings import add_setting
from dsv4.storage import locks
from dsv4.text import escape_line, print_escaped


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True)
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "REFERENCE", help="take the files from this bundle instead")
    args = parser.parse_args()
    bundle_path(args.bundle, args.source)
    read_config(args.bundle)
    origin = args.reference or args.source
    with locks.locked(args.bundle):
        written = copy_tokenizer_files(origin, args.bundle, keep_edited=args.reference is None)
    names = ", ".join(map(escape_line, written)) or "nothing"
    print_escaped(f"{escape_line(args.bundle)}: {names} copied from {escape_line(origin)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
