"""Read the bytes of tensors by position; convert F16, BF16 and F32 into each other."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dsv4.errors import UserError, with_path
from dsv4.storage.holes import HoleDetector
from dsv4.storage.safetensors_file import FLOATS, ITEMSIZE, NUMPY_DTYPE, REDO, Tensor

OPEN = 4  # shards kept open: of a matrix and its scale, in the source and the bundle
AHEAD = 1 << 19  # bytes that `rows` reads at least
WINDOWS = 6  # tensors read ahead: a matrix, its scale, and the bundle's three parts
_NOTHING = np.empty(0, np.uint8)


class TensorReader:
    """Positioned reads; the shards that were read last stay open. One for each thread.

    watch: finds holes in what is read.
    """

    def __init__(self, watch: HoleDetector | None = None) -> None:
        self._open: dict[Path, int] = {}
        self._ahead: dict[tuple[Path, int], tuple[int, np.ndarray]] = {}
        self._watch = watch

    def read(self, tensor: Tensor, first: int = 0, nbytes: int | None = None) -> np.ndarray:
        """Return `nbytes` bytes of a tensor from byte `first`, uint8.

        Raises UserError if the file ends before.
        """
        if tensor.pieces:
            return self._read_pieces(tensor, first, nbytes)
        fd = self._opened(tensor.path)
        nbytes = tensor.nbytes - first if nbytes is None else nbytes
        data = b""
        while len(data) < nbytes:
            at = tensor.offset + first + len(data)
            with with_path(tensor.path):
                more = os.pread(fd, nbytes - len(data), at)
            if not more:
                raise UserError(f"{tensor.path}", "its end", f"{tensor.name} there", REDO)
            data = data + more if data else more
        array = np.frombuffer(data, np.uint8)
        if self._watch:
            self._watch.scan(tensor, first, array)
        return array

    def _opened(self, path: Path) -> int:
        """Return the descriptor of a shard, and close the least recently read one."""
        fd = self._open.pop(path, -1)
        if fd < 0:
            if len(self._open) >= OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            fd = os.open(path, os.O_RDONLY)
        self._open[path] = fd  # the last one now
        return fd

    def _read_pieces(self, tensor: Tensor, first: int, nbytes: int | None) -> np.ndarray:
        last = tensor.nbytes if nbytes is None else first + nbytes
        parts, begin = [], 0
        for piece in tensor.pieces:
            start, end = max(first, begin), min(last, begin + piece.nbytes)
            if start < end:
                parts.append(self.read(piece, start - begin, end - start))
            begin += piece.nbytes
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def rows(self, tensor: Tensor, first: int, last: int) -> np.ndarray:
        """Return rows `first` to `last` - 1 as bytes.

        Reads ahead, so that successive calls cost few large reads. No byte is read twice.
        """
        row = tensor.nbytes // tensor.shape[0]
        begin, end = first * row, last * row
        start, data = self._ahead.pop((tensor.path, tensor.offset), (begin, _NOTHING))
        if not start <= begin <= start + len(data):
            start, data = begin, _NOTHING
        if end > start + len(data):
            rest = data[begin - start :]
            at = begin + len(rest)
            more = self.read(tensor, at, min(max(end - at, AHEAD), tensor.nbytes - at))
            start, data = begin, np.concatenate((rest, more)) if len(rest) else more
        if len(self._ahead) >= WINDOWS:
            del self._ahead[next(iter(self._ahead))]
        self._ahead[tensor.path, tensor.offset] = start, data
        return data[begin - start : end - start]

    def close(self) -> None:
        """Close all files."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


def as_float32(data: np.ndarray, dtype: str) -> np.ndarray:
    """Convert bytes of F16, BF16 or F32 to float32."""
    array = data.view(NUMPY_DTYPE[dtype])
    if dtype == "BF16":
        wide = array.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return array.astype(np.float32)


def round_to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to F16, BF16 or F32, ties to even. Return bytes."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values.astype(NUMPY_DTYPE[dtype])).view(np.uint8)


def element_index(tensor: Tensor, at: int) -> str:
    """Return the indices of element `at` as text."""
    index = np.unravel_index(at, tensor.shape) if tensor.shape else ()
    return f"element {[int(i) for i in index]}"


def format_element(data: np.ndarray, dtype: str, at: int) -> str:
    """Return one element as text."""
    one = data[at * ITEMSIZE[dtype] : (at + 1) * ITEMSIZE[dtype]]
    value = as_float32(one, dtype)[0] if dtype in FLOATS else one.view(NUMPY_DTYPE[dtype])[0]
    return f"{value:.8g}" if dtype in FLOATS else f"{value}"
