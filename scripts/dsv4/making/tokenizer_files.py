"""The tokenizer and encoding files of a bundle: which there are, and copying them."""

from __future__ import annotations

from pathlib import Path

from dsv4.stop import Stop
from dsv4.storage.bounds import DOCUMENT
from dsv4.storage.durable import copy_file

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
    """Copy these files; return the names of those that were not there or had other bytes.

    Raises Stop for one that is larger than any document.
    """
    written = []
    for name in names:
        if (size := (origin / name).stat().st_size) > DOCUMENT:
            found = f"{size:,} bytes"
            raise Stop(f"{origin / name}", found, f"at most {DOCUMENT:,}", "do not use this folder")
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        if copy_file(origin / name, bundle / name):
            written.append(name)
    return written
