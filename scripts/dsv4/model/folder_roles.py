"""Refuse a source as BUNDLE, a bundle as SOURCE, and folders that contain each other.

Every command that writes calls this first: two mixed-up names would cost a download of 160 GB.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage.checkpoint import read_json
from dsv4.storage.safetensors_file import read_shard

SOURCE, BUNDLE = "an FP4/FP8 source", "an MLX bundle"


def bundle_path(bundle: Path, source: Path | None = None) -> Path:
    """Return the folder of a bundle, with a link to an empty or missing folder followed.

    Raises UserError for '', '.', '/', links in a circle, a folder that holds a source, and a folder
    that is the source's, or is inside it, or contains it.
    """
    check_bundle_path(bundle)
    place = resolve_links(bundle)
    if source is not None:
        check_apart(place, bundle, source)
    if folder_role(place) == SOURCE:
        raise UserError(f"{bundle}", SOURCE, f"{BUNDLE}, or no folder yet",
                   "check SOURCE and BUNDLE: a source is never written to")  # fmt: skip
    return place if bundle.is_symlink() and is_empty(place) else bundle


def check_bundle_path(bundle: Path) -> None:
    """Raise UserError for '', '.' and '/', which an empty setting or a typo gives."""
    if bundle in (Path(), Path(bundle.root)):
        raise UserError(
            "BUNDLE", f"{bundle}", "a folder of the bundle's own", "name it: BUNDLE=DIR"
        )


def resolve_links(path: Path) -> Path:
    """Return the path without links. Raises UserError for links in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}", "links that lead in a circle", "a folder", "name another"
        ) from error


def is_empty(folder: Path) -> bool:
    """Return True for a folder that is missing or empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_apart(place: Path, bundle: Path, source: Path) -> None:
    """Raise UserError when bundle and source are one folder, or one is inside the other."""
    origin = resolve_links(source)
    if is_within(place, origin) and is_within(origin, place):
        found = "one folder for both"
    elif is_within(place, origin):
        found = f"it inside the source {source}"
    elif is_within(origin, place):
        found = f"the source {source} inside it"
    else:
        return
    raise UserError(f"{bundle}", found, "two folders apart", "check SOURCE and BUNDLE")


def is_within(path: Path, folder: Path) -> bool:
    """Return True when `path` is `folder` or inside it; neither may contain links.

    Folders that exist are compared by inode, because a volume may ignore case.
    """
    if folder in (path, *path.parents):
        return True
    with contextlib.suppress(OSError):
        there = [place for place in (path, *path.parents) if place.exists()]
        return any(place.samefile(folder) for place in there)
    return False


def folder_role(folder: Path) -> str:
    """Return SOURCE, BUNDLE or '', by the dtypes of the readable shards, else by config.json.

    MLX packs what it quantizes into U32, which a source never has; a source has FP8 or FP4 bytes.
    """
    dtypes: set[str] = set()
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with contextlib.suppress(UserError):
            if path.is_file():
                dtypes |= {tensor.dtype for tensor in read_shard(path).tensors.values()}
        if "U32" in dtypes:
            return BUNDLE
    if dtypes & {"F8_E4M3", "F8_E8M0"}:
        return SOURCE
    return "" if dtypes else role_by_config(folder)


def role_by_config(folder: Path) -> str:
    """Return the role of a folder by the quantization in its config.json."""
    with contextlib.suppress(UserError):
        config = read_json(folder / "config.json")
        if isinstance(config.get("quantization"), dict):
            return BUNDLE
        own = config.get("quantization_config")
        return SOURCE if isinstance(own, dict) and own.get("quant_method") == "fp8" else ""
    return ""


def check_no_bundle(source: Path) -> None:
    """Raise UserError when the folder for a source holds a bundle."""
    if folder_role(source) == BUNDLE:
        raise UserError(
            f"{source}", BUNDLE, f"{SOURCE}, or no folder yet", "check SOURCE and BUNDLE"
        )
