"""The blocks of FP8: how many rows and columns of a matrix share one scale.

config.json gives the block of a source. It is read once, when the source is opened, and every scale
is checked by it. A block is a power of two on each axis, so after that the shapes of a matrix and
its scale determine the block: two powers of two give the same number of blocks only where either
one covers the whole axis, and then both decode alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.storage.limits import COLUMNS
from dsv4.text import short_repr

RELEASED = 128  # in every release; for a config.json without weight_block_size
LEAST = 32  # mxfp8 has a scale for 32 columns, and repeats that of the block

Block = tuple[int, int]  # rows, columns


def read_block(config: Mapping[str, Any], folder: Path) -> Block:
    """Return quantization_config.weight_block_size of a source's config.json.

    Raises UserError unless it is a list of two powers of two, 32 or more.
    """
    quantization = config.get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if size is None:
        return RELEASED, RELEASED
    if not isinstance(size, list) or len(size) != 2 or not all(map(_is_block_size, size)):
        raise UserError(
            f"{folder / 'config.json'}: quantization_config.weight_block_size", short_repr(size),
            f"[rows, columns], powers of two from {LEAST} on", "restore config.json",
        )  # fmt: skip
    return size[0], size[1]


def _is_block_size(value: Any) -> bool:
    return type(value) is int and LEAST <= value <= COLUMNS and value.bit_count() == 1


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Return the shape of the scale of an FP8 matrix.

    >>> scale_shape((2048, 4100), (128, 128))
    (16, 33)
    """
    return tuple(-(-n // size) for n, size in zip(shape, block, strict=True))


def block_of(shape: tuple[int, ...], scale: tuple[int, ...]) -> Block | None:
    """Return the block of an FP8 matrix by its shape and its scale's; None if no block fits.

    >>> block_of((2048, 4100), (16, 33)), block_of((2048, 4096), (16, 33))
    ((128, 128), None)
    """
    if not len(shape) == len(scale) == 2:
        return None
    rows, columns = map(_size_of, shape, scale)
    return (rows, columns) if rows and columns else None


def _size_of(number: int, blocks: int) -> int:
    """Return the least size of blocks that cuts `number` rows or columns into `blocks`, or 0."""
    size = LEAST
    while size < number and -(-number // size) > blocks:
        size *= 2
    return size if -(-number // size) == blocks else 0
