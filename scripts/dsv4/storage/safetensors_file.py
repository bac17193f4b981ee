"""Read and validate the header of a safetensors file; write one as a stream.

Format (huggingface/safetensors, README "Format"): 8 bytes little-endian header length N, N bytes
of JSON, then the tensors' bytes. JSON maps a name to dtype, shape and data_offsets (relative to the
end of the header), and `__metadata__` to a dict of strings.

A truncated download or a hostile file must end in one clear error, so the reader validates every
value, and reads no header that is longer than a model's can be. The library `safetensors` maps the
file and raises errors without a remedy.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.errors import UserError, with_path
from dsv4.storage import limits
from dsv4.storage.atomic import atomic_writer
from dsv4.text import escape_line, short_repr

# Bytes of an element. The model has none of the 4-bit and 6-bit floats of newer safetensors.
ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

# As NumPy reads a dtype: BF16 and 8-bit floats, which it lacks, as unsigned integers.
NUMPY_DTYPE = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip

FLOATS = ("F16", "BF16", "F32")  # that TensorReader converts to float32

MAX_HEADER = limits.HEADER
REDO = "fetch or rebuild this file"
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor on disk: `nbytes` bytes of `path` from byte `offset` of the file.

    disk: its name there, if `name` is another. pieces: the tensors that it joins, if its bytes are
    not in one place.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    disk: str = ""
    pieces: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Shard:
    """A safetensors file's header: tensors in file order, metadata, the file's size in bytes."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    size: int


def read_shard(path: Path) -> Shard:
    """Read and check the header of `path`; no tensor data is read.

    Raises UserError when the file is not a complete, well-formed safetensors file: too short, a Git
    LFS pointer, header longer than the file, not JSON, duplicate keys, unknown dtype, shape and
    byte count that disagree, offsets out of range, overlapping or with a gap.
    """
    text, size = _read_header(path)
    start = 8 + len(text)
    header = _parse_header(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found = "__metadata__ that is no map of strings"
        raise UserError(f"{path}", found, "a map of strings", REDO)
    tensors = [_parse_tensor(path, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_coverage(path, tensors, start, size)
    return Shard(path, {tensor.name: tensor for tensor in tensors}, metadata, size)


def sample_ranges(shard: Shard) -> list[tuple[int, int]]:
    """Return (offset, bytes) of three samples of a shard's data, which tell two sources apart."""
    start = min((t.offset for t in shard.tensors.values()), default=shard.size)
    offsets = (start, (start + shard.size) // 2, shard.size - SAMPLE_BYTES)
    places = [max(start, offset) for offset in offsets]
    return [(place, min(SAMPLE_BYTES, shard.size - place)) for place in places]


def _read_header(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON and the file's size in bytes."""
    if not path.is_file() and path.exists():  # opening a named pipe waits for a writer
        raise UserError(f"{path}", "no regular file", "a safetensors file", "move it away")
    with with_path(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise UserError(f"{path}", f"{size} bytes", "a safetensors file", REDO)
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, MAX_HEADER):
            limits.check_lfs_pointer(prefix + file.read(len(limits.POINTER)), f"{path}")
            raise UserError(
                f"{path}",
                f"a header of {length:,} bytes in a file of {size:,}",
                f"at most {min(size - 8, MAX_HEADER):,}",
                REDO,
            )
        text = file.read(length)
        if len(text) < length:
            raise UserError(f"{path}", "its end in the header", f"{length:,} bytes of it", REDO)
        return text, size


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            found = f"the key {short_repr(twice)} twice in its header"
            raise UserError(f"{path}", found, "each key once", REDO)
        return result

    limits.check_json_size(text, f"{path}")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
        limits.check_surrogates(text, header)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}", f"a header that is not JSON ({type(error).__name__})",
                   "JSON text", REDO) from error  # fmt: skip
    if not isinstance(header, dict):
        raise UserError(
            f"{path}", f"a header of type {type(header).__name__}", "a JSON object", REDO
        )
    return header


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_tensor(path: Path, name: str, entry: Any, start: int) -> Tensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    where = f"{path}: {escape_line(name)}"
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise UserError(where, f"dtype {short_repr(dtype)}", f"one of {', '.join(ITEMSIZE)}", REDO)
    if not isinstance(shape, list) or not all(_is_count(n) for n in shape[: limits.AXES + 1]):
        raise UserError(where, f"shape {short_repr(shape)}", "a list of sizes", REDO)
    if len(shape) > limits.AXES:
        raise UserError(where, f"{len(shape):,} axes", f"at most {limits.AXES}", REDO)
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise UserError(where, f"data_offsets {short_repr(offsets)}", "[begin, end]", REDO)
    begin, end = offsets
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise UserError(where, f"{end - begin:,} bytes", f"{nbytes:,} for {dtype} {shape}", REDO)
    return Tensor(name, dtype, tuple(shape), path, start + begin, nbytes)


def _check_coverage(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    """Raise UserError unless the tensors cover the rest of the file without gap or overlap."""
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            word = "overlapping" if tensor.offset < position else "a gap before"
            raise UserError(
                f"{path}: {tensor.name}",
                f"{word} data at byte {tensor.offset:,}",
                f"its data at byte {position:,}",
                REDO,
            )
        position += tensor.nbytes
    if position != size:
        raise UserError(f"{path}", f"{size:,} bytes", f"{position:,} by its header", REDO)


def read_array(tensor: Tensor) -> np.ndarray:
    """Read a tensor into a NumPy array of its shape, with the dtype of NUMPY_DTYPE.

    Raises UserError when the file is shorter than when its header was read.
    """
    with with_path(tensor.path), tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise UserError(
            f"{tensor.path}: {tensor.name}", f"{len(data):,} bytes", f"{tensor.nbytes:,}", REDO
        )
    return np.frombuffer(data, NUMPY_DTYPE[tensor.dtype]).reshape(tensor.shape)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class PendingTensor(TensorSpec):
    """A tensor whose bytes `produce()` returns when they are to be written."""

    produce: Callable[[], Iterable[bytes | memoryview | np.ndarray]]


def header_bytes(planned: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Return length prefix and JSON header for tensors in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in planned:
        if tensor.name in header:
            raise ValueError(f"{tensor.name} planned twice")
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class ShardLayout:
    """The header of a shard that will be written, and the offset of each of its tensors.

    Tensors with larger elements come first, as the safetensors library has it, so that all are
    aligned; apart from that, their order is kept.
    """

    slots: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    as_long: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        slots: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        as_long: Mapping[str, str] = {},
    ) -> ShardLayout:
        """Return the layout of a shard with these tensors.

        as_long: dtype → another one of its size. The header is padded to the length that it has
        with the other one, so that the file's size is the same with either.
        """
        ordered = tuple(sorted(slots, key=lambda slot: -ITEMSIZE[slot.dtype]))
        return cls(ordered, metadata, as_long)

    @cached_property
    def header(self) -> bytes:
        """The length prefix and the JSON."""
        header = header_bytes(self.slots, self.metadata)
        if not self.as_long:
            return header
        other = [replace(s, dtype=self.as_long.get(s.dtype, s.dtype)) for s in self.slots]
        text = header[8:].ljust(len(header_bytes(other, self.metadata)) - 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Tensor → its offset in the file."""
        places, place = {}, len(self.header)
        for slot in self.slots:
            places[slot.name] = place
            place += slot.nbytes
        return places

    @cached_property
    def size(self) -> int:
        """The size of the file in bytes."""
        return len(self.header) + sum(slot.nbytes for slot in self.slots)

    def matches_file(self, path: Path) -> bool:
        """Return True when `path` has this header and size: a shard gets its name when complete."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        with with_path(path), path.open("rb") as file:
            return file.read(len(self.header)) == self.header


def write_shard(path: Path, planned: list[PendingTensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors to `path` atomically, one at a time.

    Raises ValueError when a producer gives another number of bytes than its shape and dtype need.
    """
    with atomic_writer(path) as file:
        file.write(header_bytes(planned, metadata))
        for tensor in planned:
            written = 0
            for chunk in tensor.produce():
                written += file.write(memoryview(chunk).cast("B"))
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes for {tensor.nbytes}")
