"""Bundles that left experts out (REAP and its like): which of the source's each kept one is.

Nothing records it. But a kept expert keeps its row of the router, so that rows tell: the bundle's
router, row by row, against the source's rounded to the same dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.storage.tensor_reader import TensorReader, as_float32, round_to_dtype
from dsv4.verification.scan import Scan

ROUTER = ".ffn.gate.weight"
Kept = Mapping[str, list[int] | None]


def kept_experts(bundle: Scan, source: Checkpoint) -> Kept:
    """`layers.N` → the source's numbers of the experts that are left, in the bundle's order.

    None where a row of the router is none of the source's. Layers that lack no expert are not
    there.
    """
    found: dict[str, list[int] | None] = {}
    for name, tensor in bundle.tensors.items():
        origin = source.tensors.get(name) if name.endswith(ROUTER) else None
        if origin is not None and is_pruned(tensor, origin):
            found[name.removesuffix(ROUTER)] = match_rows(tensor, origin)
    return found


def is_pruned(tensor: Tensor, origin: Tensor) -> bool:
    """True for a router with fewer rows of as many columns."""
    same = len(tensor.shape) == len(origin.shape) == 2 and tensor.shape[1] == origin.shape[1]
    floats = tensor.dtype in FLOATS and origin.dtype in FLOATS
    return same and floats and 0 < tensor.shape[0] < origin.shape[0]


def match_rows(tensor: Tensor, origin: Tensor) -> list[int] | None:
    """The row of `origin` that each row of `tensor` is."""
    reader = TensorReader()
    mine, theirs = reader.read(tensor), reader.read(origin)
    reader.close()
    if origin.dtype != tensor.dtype:
        theirs = round_to_dtype(as_float32(theirs, origin.dtype), tensor.dtype)
    rows = {row.tobytes(): number for number, row in enumerate(split_rows(theirs, origin))}
    numbers = [rows.get(row.tobytes()) for row in split_rows(mine, tensor)]
    return None if None in numbers else numbers


def split_rows(data: np.ndarray, tensor: Tensor) -> np.ndarray:
    return data.reshape(tensor.shape[0], -1)


def select_rows(origin: Tensor, kept: list[int]) -> Tensor:
    """Those rows of a tensor, as one."""
    size = origin.nbytes // origin.shape[0]
    rows = tuple(
        replace(origin, shape=(1, *origin.shape[1:]), nbytes=size, offset=origin.offset + k * size)
        for k in kept
    )
    shape = (len(kept), *origin.shape[1:])
    return replace(origin, shape=shape, nbytes=size * len(kept), pieces=rows)
