"""List and copy the tokenizer and encoding files of a bundle."""

from __future__ import annotations

from pathlib import Path

from dsv4.errors import UserError
from dsv4.model.chat_template import CHAT_TEMPLATE, ENCODING
from dsv4.storage import filesystem, safe_paths
from dsv4.storage.atomic import copy_file
from dsv4.storage.limits import DOCUMENT
from dsv4.storage.system_files import is_system_file

REQUIRED = ("tokenizer.json", "tokenizer_config.json", ENCODING)
EDITED = ("tokenizer_config.json", "generation_config.json", CHAT_TEMPLATE)
OPTIONAL = ("generation_config.json", "special_tokens_map.json", CHAT_TEMPLATE)


def required_files(origin: Path) -> list[str]:
    """Return relative paths of the files to copy. Raises UserError if a required one is missing."""
    missing = [name for name in REQUIRED if not (origin / name).is_file()]
    if missing:
        raise UserError(
            f"{origin}",
            f"no {missing[0]}",
            "tokenizer and encoding files",
            "download them, or name a bundle that has them: REFERENCE=DIR",
        )
    encoding = [p for p in sorted((origin / "encoding").rglob("*")) if p.is_file()]
    names = [path.relative_to(origin).as_posix() for path in encoding]
    names = [name for name in names if "__pycache__" not in name and not is_system_file(name)]
    names += [name for name in (*REQUIRED, *OPTIONAL) if (origin / name).is_file()]
    return sorted(set(names))


def copy_tokenizer_files(origin: Path, bundle: Path, keep_edited: bool) -> list[str]:
    """Copy the files of `required_files`. Return the names of the files that were written.

    keep_edited: do not overwrite the files that patch.py edits.
    """
    kept = EDITED if keep_edited else ()
    return copy_files(
        origin,
        bundle,
        [n for n in required_files(origin) if n not in kept or not (bundle / n).is_file()],
    )


def copy_files(origin: Path, bundle: Path, names: list[str]) -> list[str]:
    """Copy these files. Return the names of those that were missing or had other bytes.

    Raises UserError, before anything is copied, when the bundle's encoding/ is a link, when a file
    is larger than a document may be, and when two names are the same on the bundle's volume.
    """
    for name in names:
        safe_paths.expect_type(bundle, name, safe_paths.FILE, safe_paths.LINK, safe_paths.NOTHING)
        if (size := (origin / name).stat().st_size) > DOCUMENT:
            found = f"{size:,} bytes"
            raise UserError(
                f"{origin / name}", found, f"at most {DOCUMENT:,}", "do not use this folder"
            )
    filesystem.check_case(f"{origin}", names, bundle)
    return [name for name in names if copy_file(origin / name, bundle / name, bundle)]
