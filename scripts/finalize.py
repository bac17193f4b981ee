"""Copy the tokenizer and encoding files into the bundle.

They come from the source, or from a finished bundle that is known to speak (--reference). Files
that patch.py edits are copied only when the bundle lacks them, or when a reference is named; the
others are made equal to the origin's. Takes a second.

    .venv/bin/python scripts/finalize.py --source DIR --bundle DIR [--reference DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4.checkpoint import read_config
from dsv4.durable import copy_file
from dsv4.stop import Stop, run

REQUIRED = ("tokenizer.json", "tokenizer_config.json", "encoding/encoding_dsv4.py")
EDITED = ("tokenizer_config.json", "generation_config.json")
OPTIONAL = ("generation_config.json", "special_tokens_map.json", "chat_template.jinja")


def wanted(origin: Path) -> list[str]:
    """Relative paths of the files to copy. Raises Stop when a required one is not there."""
    missing = [name for name in REQUIRED if not (origin / name).is_file()]
    if missing:
        raise Stop(
            f"{origin}",
            f"no {missing[0]}",
            "tokenizer and encoding files",
            "download them, or name a bundle that has them: REFERENCE=DIR",
        )
    encoding = [p for p in sorted((origin / "encoding").rglob("*")) if p.is_file()]
    names = [str(path.relative_to(origin)) for path in encoding if "__pycache__" not in path.parts]
    names += [name for name in (*REQUIRED, *OPTIONAL) if (origin / name).is_file()]
    return sorted(set(names))


def finalize(origin: Path, bundle: Path, keep_edited: bool) -> list[str]:
    """Copy what is wanted; return the names of the files that were written."""
    kept = EDITED if keep_edited else ()
    return copy(
        origin, bundle, [n for n in wanted(origin) if n not in kept or not (bundle / n).is_file()]
    )


def copy(origin: Path, bundle: Path, names: list[str]) -> list[str]:
    """Copy these files; return the names of those that were not there or had other bytes."""
    written = []
    for name in names:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        if copy_file(origin / name, bundle / name):
            written.append(name)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="take the files from this bundle instead")
    args = parser.parse_args()
    read_config(args.bundle)
    origin = args.reference or args.source
    written = finalize(origin, args.bundle, keep_edited=args.reference is None)
    print(f"{args.bundle}: {', '.join(written) or 'nothing'} copied from {origin}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
