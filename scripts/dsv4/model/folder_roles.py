"""Which folder is which: a source is never written as a bundle, and neither lies in the other.

Asked by every command that writes, before it writes: a name mixed up costs a download of 160 GB.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage.checkpoint import read_json
from dsv4.storage.safetensors_file import read_shard

SOURCE, BUNDLE = "an FP4/FP8 source", "an MLX bundle"


def bundle_path(bundle: Path, source: Path | None = None) -> Path:
    """Where a bundle is or will be made: a link to an empty or missing folder is followed.

    Raises UserError for '', '.', '/', a link that leads nowhere, a folder that holds a source, and
    when it is the source's folder, lies in it, or holds it.
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
    """Raise UserError for '', '.' and '/': a setting that is empty, or slipped."""
    if bundle in (Path(), Path(bundle.root)):
        raise UserError(
            "BUNDLE", f"{bundle}", "a folder of the bundle's own", "name it: BUNDLE=DIR"
        )


def resolve_links(path: Path) -> Path:
    """The path without links. Raises UserError for links that go in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}", "links that lead in a circle", "a folder", "name another"
        ) from error


def is_empty(folder: Path) -> bool:
    """True for a folder that is missing or holds nothing."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_apart(place: Path, bundle: Path, source: Path) -> None:
    """Raise UserError when bundle and source are one folder, or one lies in the other."""
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
    """True when `path` is `folder` or lies in it; by the file system where both are there, which
    may not tell capitals apart. Both without links."""
    if folder in (path, *path.parents):
        return True
    with contextlib.suppress(OSError):
        wanted = folder.stat()
        there = [place.stat() for place in (path, *path.parents) if place.exists()]
        return any((stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino) for stat in there)
    return False


def folder_role(folder: Path) -> str:
    """SOURCE, BUNDLE or '': by the dtypes of the shards that can be read, else by config.json.

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
    """What config.json says of the quantization."""
    with contextlib.suppress(UserError):
        config = read_json(folder / "config.json")
        if isinstance(config.get("quantization"), dict):
            return BUNDLE
        own = config.get("quantization_config")
        return SOURCE if isinstance(own, dict) and own.get("quant_method") == "fp8" else ""
    return ""


def check_no_bundle(source: Path) -> None:
    """Raise UserError when a folder that a source is to come into holds a bundle."""
    if folder_role(source) == BUNDLE:
        raise UserError(
            f"{source}", BUNDLE, f"{SOURCE}, or no folder yet", "check SOURCE and BUNDLE"
        )
