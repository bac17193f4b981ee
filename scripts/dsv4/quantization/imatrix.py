"""Read and write an importance matrix: how much each input column of a routed expert matters.

llama.cpp's legacy binary form (tools/imatrix/imatrix.cpp before it wrote GGUF; written for this
model by antirez/ds4, ds4.c `imatrix_collector_save`), little-endian: an int32 number of entries;
for each a name (int32 length, bytes), an int32 number of calls, an int32 number of values and as
many float32: the sums of squared activations over the calls. Then an int32 number of chunks and the
name of the data set (int32 length, bytes), which older files lack.

One entry holds a matrix of all experts of a layer, `blk.L.ffn_{gate,up,down}_exps.weight`, expert
after expert. Only proportions within an expert matter here. ds4 collects nothing for the MTP
layers, which no runtime runs: where there is no entry for them (as block num_hidden_layers + M),
all their columns count the same.

The file is untrusted: every length is checked against the file's size before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsv4.errors import UserError, with_path
from dsv4.model import mtp
from dsv4.model.load import expert_bases
from dsv4.model.names import parse_expert
from dsv4.storage.atomic import atomic_writer
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.filesystem import UNKNOWN
from dsv4.storage.limits import IMATRIX
from dsv4.text import escape_line, print_escaped

GGUF_NAME = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
MAX_NAME = 4096
# The least weight of a column: the calibration text may not use a column that others do.
FLOOR = 1e-3
REDO = "make or fetch this imatrix again"


@dataclass(frozen=True)
class Entry:
    """The calls, the offset in the file and the number of an entry's float32 values."""

    calls: int
    offset: int
    count: int


@dataclass(frozen=True)
class Imatrix:
    """An opened imatrix: entries by name, SHA-256, name of the data set ("" if unknown)."""

    path: Path
    entries: dict[str, Entry]
    digest: str
    dataset: str


@dataclass(frozen=True)
class Importance:
    """Importance of the input columns, float32 (columns,), by an expert's storage name.

    digest: SHA-256 of the file.
    """

    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    digest: str = ""

    @property
    def suffix(self) -> str:
        """The end of a quantizer's digest that names the imatrix."""
        return f"-imatrix-{self.digest[:16]}" if self.digest else ""


EVEN = Importance()  # all columns count the same


class _Reader:
    """Reads numbers and names in sequence. Raises UserError if the file ends too early."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, 0

    def skip(self, nbytes: int, what: str) -> int:
        """Skip `nbytes`. Return their offset."""
        if nbytes > len(self.data) - self.at:
            raise UserError(
                f"{self.path}: {what} at byte {self.at:,}",
                f"{len(self.data) - self.at:,} bytes left",
                f"{nbytes:,}",
                REDO,
            )
        self.at += nbytes
        return self.at - nbytes

    def number(self, what: str, least: int) -> int:
        """Read an int32. Raises UserError if it is below `least`."""
        (value,) = struct.unpack_from("<i", self.data, self.skip(4, what))
        if value < least:
            raise UserError(f"{self.path}: {what}", f"{value}", f"{least} or more", REDO)
        return value

    def name(self, what: str, least: int) -> str:
        """Read a length and as many bytes of UTF-8."""
        length = self.number(f"length of {what}", least)
        if length > MAX_NAME:
            raise UserError(
                f"{self.path}: {what}", f"{length:,} bytes", f"at most {MAX_NAME}", REDO
            )
        start = self.skip(length, what)
        try:
            return bytes(self.data[start : start + length]).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: {what}", "no UTF-8", "a name", REDO) from error


def open_imatrix(path: Path) -> Imatrix:
    """Read the names and sizes of all entries, and the file's SHA-256. Values are read later.

    Raises UserError for a malformed file (a length beyond its end, a duplicate name, bytes after
    the end) and for llama.cpp's newer GGUF format.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"{path}", "no such file, or an empty one", "an imatrix (.dat)", REDO)
    if path.stat().st_size > IMATRIX:
        raise UserError(f"{path}", f"{path.stat().st_size:,} bytes", f"at most {IMATRIX:,}", REDO)
    data = map_file(path)
    if bytes(data[:4]) == b"GGUF":
        raise UserError(
            f"{path}", "a GGUF imatrix", "the .dat form",
            "write it again with llama-imatrix --output-format dat",
        )  # fmt: skip
    reader = _Reader(path, data)
    entries: dict[str, Entry] = {}
    for i in range(reader.number("number of entries", 1)):
        name = reader.name(f"name of entry {i}", 1)
        calls = reader.number(f"{name}: calls", 0)
        count = reader.number(f"{name}: values", 1)
        if name in entries:
            raise UserError(f"{path}: {name}", "this entry twice", "each once", REDO)
        entries[name] = Entry(calls, reader.skip(4 * count, f"{name}: values"), count)
    dataset = _read_trailer(reader)
    return Imatrix(path, entries, hashlib.sha256(data).hexdigest(), dataset)


def map_file(path: Path) -> np.ndarray:
    """Return a file's bytes, uint8: mapped, or read if the file system cannot map (some FUSE)."""
    with with_path(path):
        try:
            return np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            if error.errno not in {*UNKNOWN, errno.ENODEV}:
                raise
        return np.fromfile(path, np.uint8)


def _read_trailer(reader: _Reader) -> str:
    if reader.at == len(reader.data):
        return ""
    reader.number("number of chunks", -(2**31))
    dataset = reader.name("name of the data set", 0) if reader.at < len(reader.data) else ""
    if reader.at != len(reader.data):
        raise UserError(
            f"{reader.path}", f"{len(reader.data):,} bytes", f"{reader.at:,} by its entries", REDO
        )
    return dataset


def write_imatrix(
    path: Path, count: int, entries: Iterable[tuple[str, np.ndarray]], dataset: str
) -> None:
    """Write `count` entries (name, means of squares (experts, columns)), each with one call."""

    def name_bytes(name: str) -> bytes:
        return struct.pack("<i", len(name.encode())) + name.encode()

    with atomic_writer(path) as file:
        file.write(struct.pack("<i", count))
        for name, means in entries:
            file.write(name_bytes(name) + struct.pack("<ii", 1, means.size))
            file.write(np.ascontiguousarray(means, "<f4").data)
        file.write(struct.pack("<i", 1) + name_bytes(dataset))


def entry_name(base: str, layers: int) -> str:
    """Return the entry's name for an expert's storage name; layers: number of main layers.

    >>> entry_name("layers.3.ffn.experts.7.w2", 43), entry_name("mtp.0.ffn.experts.7.w1", 43)
    ('blk.3.ffn_down_exps.weight', 'blk.43.ffn_gate_exps.weight')
    """
    block, layer, _, matrix, _ = parse_expert(f"{base}.weight") or ("", 0, 0, "", "")
    return f"blk.{layer + layers * (block == 'mtp')}.{GGUF_NAME[matrix]}.weight"


def importances(imatrix: Imatrix, source: Checkpoint) -> Importance:
    """Return the importance of the input columns of the source's experts.

    The arrays are views of the mapped file. MTP experts without an entry are left out.
    Raises UserError if a main layer has no entry or an entry has the wrong size.
    """
    layers, experts = source.config["num_hidden_layers"], source.config["n_routed_experts"]
    values = map_file(imatrix.path)
    out = {}
    for base in expert_bases(source):
        _, half = source.tensors[f"{base}.weight"].shape
        name, columns = entry_name(base, layers), 2 * half
        entry = imatrix.entries.get(name)
        if entry is None and mtp.is_mtp(base):
            continue
        if entry is None or entry.count != experts * columns:
            raise UserError(
                f"{imatrix.path}: {name}",
                "no such entry" if entry is None else f"{entry.count:,} values",
                f"{experts} experts × {columns:,} columns",
                "use an imatrix of this model",
            )
        expert = (parse_expert(f"{base}.weight") or ("", 0, 0))[2]
        start = entry.offset + 4 * expert * columns
        out[base] = values[start : start + 4 * columns].view("<f4")
    return Importance(out, imatrix.digest)


def normalized(importance: np.ndarray, name: str) -> np.ndarray:
    """Return an importance with mean 1 and no value below FLOOR, float64.

    All zeros, as of an expert that the calibration did not reach, give equal weights.
    Raises UserError if a value is negative, infinite or NaN.
    """
    values = importance.astype(np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise UserError(f"imatrix: {name}", "a negative, infinite or NaN value", "squares", REDO)
    mean = math.fsum(values) / len(values)
    return np.maximum(values / mean, FLOOR) if mean > 0 else np.ones(len(values))


def load_imatrix(path: Path | None, source: Checkpoint) -> Importance:
    """Load column importances (uniform without an imatrix) and print their coverage.

    Raises UserError for another model's imatrix.
    """
    if path is None:
        return EVEN
    imatrix = open_imatrix(path)
    found = importances(imatrix, source)
    print_escaped(describe_coverage(found.columns, imatrix, source))
    return found


def describe_coverage(found: dict[str, np.ndarray], imatrix: Imatrix, source: Checkpoint) -> str:
    """Return one line: how many experts have importances, how many the calibration missed."""
    bases = expert_bases(source)
    even = sum(bool((found[base] == found[base][0]).all()) for base in found)
    unused = len(imatrix.entries) - len({
        entry_name(base, source.config["num_hidden_layers"]) for base in found
    })  # fmt: skip
    line = f"imatrix: {len(found):,} of {len(bases):,} expert matrices have importances"
    if len(found) < len(bases):
        line += f" ({len(bases) - len(found):,} of MTP layers have none: all columns alike)"
    if even:
        line += f"; {even:,} of them were never reached: all columns alike"
    if unused:
        line += f"; {unused:,} entries are for other tensors"
    return f"{line}; data set {escape_line(imatrix.dataset or 'unknown')}"
