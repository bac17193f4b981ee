"""Match the experts of pruned bundles (REAP and similar) to the source's.

No file records which experts were kept, but each keeps its row of the router. So the rows of the
bundle's router are compared with the source's, rounded to the same dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.storage.tensor_reader import TensorReader, as_float32, round_to_dtype
from dsv4.verification.scan import Scan

ROUTER = ".ffn.gate.weight"
Kept = Mapping[str, list[int] | None]


def kept_experts(bundle: Scan, source: Checkpoint) -> Kept:
    """Return `layers.N` → the source's numbers of the kept experts, in the bundle's order.

    None if a row of the router is none of the source's. Only pruned layers have an entry.
    """
    found: dict[str, list[int] | None] = {}
    for name, tensor in bundle.tensors.items():
        origin = source.tensors.get(name) if name.endswith(ROUTER) else None
        if origin is not None and is_pruned(tensor, origin):
            found[name.removesuffix(ROUTER)] = match_rows(tensor, origin)
    return found


def is_pruned(tensor: Tensor, origin: Tensor) -> bool:
    """Return whether a router has fewer rows than the source's, of as many columns."""
    same = len(tensor.shape) == len(origin.shape) == 2 and tensor.shape[1] == origin.shape[1]
    floats = tensor.dtype in FLOATS and origin.dtype in FLOATS
    return same and floats and 0 < tensor.shape[0] < origin.shape[0]


def match_rows(tensor: Tensor, origin: Tensor) -> list[int] | None:
    """Return the number of the equal row of `origin` for each row of `tensor`, None without one."""
    reader = TensorReader()
    mine, theirs = reader.read(tensor), reader.read(origin)
    reader.close()
    if origin.dtype != tensor.dtype:
        theirs = round_to_dtype(as_float32(theirs, origin.dtype), tensor.dtype)
    theirs, mine = theirs.reshape(origin.shape[0], -1), mine.reshape(tensor.shape[0], -1)
    rows = {row.tobytes(): number for number, row in enumerate(theirs)}
    numbers = [rows.get(row.tobytes()) for row in mine]
    return None if None in numbers else numbers


def select_rows(origin: Tensor, kept: list[int]) -> Tensor:
    """Return a tensor that consists of the rows `kept` of another."""
    size = origin.nbytes // origin.shape[0]
    rows = tuple(
        replace(origin, shape=(1, *origin.shape[1:]), nbytes=size, offset=origin.offset + k * size)
        for k in kept
    )
    shape = (len(kept), *origin.shape[1:])
    return replace(origin, shape=shape, nbytes=size * len(kept), pieces=rows)
