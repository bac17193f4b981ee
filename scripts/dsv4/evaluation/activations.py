"""Read and write the files of a pass: hidden states, logits, and its progress.

In a pass's folder: record.json; after-NNN.npy, the hidden states after NNN layers, float32
(tokens, hc_mult, hidden), which holds F16 and BF16 exactly; logits.npy, float32 (tokens,
vocabulary); sums-NNN.safetensors, squared inputs of a layer's experts. Files are written
atomically, record.json last: a killed pass continues after the last layer that it records.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from dsv4.storage.atomic import atomic_writer, write_json
from dsv4.storage.checkpoint import read_json

RECORD, LOGITS = "record.json", "logits.npy"
FORM = {"layers": int, "dtype": str, "errors": [float], "reading": float, "computing": float}


@dataclass
class Record:
    """Progress of a pass: -1 before the embedding, then the number of finished layers.

    dtype: that of the hidden states while they are computed. errors: relative L2 distance of the
    hidden states to those of another pass, after the embedding and after each layer. reading,
    computing: seconds.
    """

    layers: int = -1
    dtype: str = ""
    errors: list[float] = field(default_factory=list)
    reading: float = 0.0
    computing: float = 0.0


def read_record(folder: Path) -> Record:
    """Return the folder's record, or a new one."""
    path = folder / RECORD
    return Record(**read_json(path, FORM)) if path.is_file() else Record()


def write_record(folder: Path, record: Record) -> None:
    write_json(folder / RECORD, asdict(record))


def states_path(folder: Path, layers: int) -> Path:
    """Return the file of the hidden states after `layers` layers."""
    return folder / f"after-{layers:03d}.npy"


def sums_path(folder: Path, layer: int) -> Path:
    """Return the file of a layer's sums.

    `w1`, `w2`, `w3` float32 (experts, columns), `tokens` uint32 (experts,).
    """
    return folder / f"sums-{layer:03d}.safetensors"


def portions(tokens: int, most: int) -> list[slice]:
    """Split tokens into portions of `most`; the last one is never a single token.

    >>> portions(5, 2)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    starts = list(range(0, tokens, most))
    if len(starts) > 1 and tokens - starts[-1] == 1:
        starts.pop()  # models have other code for a single token
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], tokens], strict=True)]


def write_rows(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    """Write a float32 .npy file atomically from an iterable of rows."""
    with atomic_writer(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for some in rows:
            file.write(np.ascontiguousarray(some, np.float32).data)


def read_rows(path: Path) -> np.ndarray:
    """Return the memory-mapped array of such a file."""
    return np.load(path, mmap_mode="r")


def squared_sums(found: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return the sums of squared differences and of the reference's squares, in float64."""
    wide = reference.astype(np.float64)
    return float(np.square(found - wide).sum()), float(np.square(wide).sum())
