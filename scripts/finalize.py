"""Copy the tokenizer and encoding files into the bundle.

They come from the source, or from a finished bundle that is known to speak (--reference). Files
that patch.py edits are copied only when the bundle lacks them, or when a reference is named; the
others are made equal to the origin's. Takes a second.

    .venv/bin/python scripts/finalize.py --source DIR --bundle DIR [--reference DIR]
"""

from __future__ import annotations

import argparse

from dsv4.making.tokenizer_files import finalize
from dsv4.model.opening import read_config
from dsv4.model.roles import place_of
from dsv4.settings import add_setting
from dsv4.stop import run
from dsv4.storage import locks
from dsv4.words import plain, say


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True)
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "REFERENCE", help="take the files from this bundle instead")
    args = parser.parse_args()
    place_of(args.bundle, args.source)
    read_config(args.bundle)
    origin = args.reference or args.source
    with locks.held(args.bundle):
        written = finalize(origin, args.bundle, keep_edited=args.reference is None)
    said = ", ".join(map(plain, written)) or "nothing"
    say(f"{plain(args.bundle)}: {said} copied from {plain(origin)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
