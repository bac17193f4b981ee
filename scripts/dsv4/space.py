"""How much disk a build needs, from headers and the hub's metadata, never from a constant."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from dsv4.labels import GROUP_SIZE
from dsv4.names import HEAD, kind
from dsv4.shard import ITEMSIZE

# Upstream starts a new shard when one reaches this size; requantize rewrites one shard at a time.
SHARD = 1_000_000_000


def bundle_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Bytes of the finished bundle's tensors, from the source's (name, dtype, shape).

    A weight of n elements takes n · bits / 8 bytes and 2 × 2 bytes for each group of 32; I8 shapes
    count bytes that hold two FP4 codes each.
    """
    total = 0
    for name, dtype, shape in tensors:
        what, elements = kind(name), math.prod(shape)
        if what == "expert":
            elements *= 2
            total += elements // 2 + elements // GROUP_SIZE * 4
        elif name == HEAD:
            total += elements * ITEMSIZE[dtype]
        elif what == "affine8":
            total += elements + elements // GROUP_SIZE * 4
        elif what == "control" or dtype.startswith(("I", "U")):
            total += elements * ITEMSIZE[dtype]
        elif what == "passthrough":
            total += elements * 2
    return total


def workplace_of(bundle: Path) -> Path:
    """The hidden sibling in which a bundle is made."""
    return bundle.with_name(f".{bundle.name}.converting")


def existing_parent(path: Path) -> Path:
    """The nearest folder of `path` that exists: where its volume is mounted."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free(path: Path) -> int:
    """Bytes that a user may still write on the volume of `path`."""
    stat = os.statvfs(existing_parent(path))
    return stat.f_bavail * stat.f_frsize


def same_volume(a: Path, b: Path) -> bool:
    return existing_parent(a).stat().st_dev == existing_parent(b).stat().st_dev


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 when it is not there."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
