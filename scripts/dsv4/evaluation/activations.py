"""What a pass leaves on the disk: hidden states, logits, and how far it came.

In a pass's folder: record.json; after-NNN.npy, the hidden states after NNN layers, float32
(tokens, hc_mult, hidden), which holds F16 and BF16 exactly; logits.npy, float32 (tokens,
vocabulary); sums-NNN.safetensors, what the experts of a layer were fed. Each file takes its name
when it is whole, record.json last: a pass that was killed goes on after the last layer that it
names.
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
    """How far a pass came: -1 before the embedding, then the number of layers that are done.

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
    """The folder's record; a new one where there is none."""
    path = folder / RECORD
    return Record(**read_json(path, FORM)) if path.is_file() else Record()


def write_record(folder: Path, record: Record) -> None:
    write_json(folder / RECORD, asdict(record))


def states_path(folder: Path, layers: int) -> Path:
    """The file of the hidden states after so many layers."""
    return folder / f"after-{layers:03d}.npy"


def sums_path(folder: Path, layer: int) -> Path:
    """A layer's sums: `w1`, `w2`, `w3` float32 (experts, columns), `tokens` uint32 (experts,)."""
    return folder / f"sums-{layer:03d}.safetensors"


def portions(tokens: int, most: int) -> list[slice]:
    """The tokens cut into portions, none of which is one token alone, if there are two.

    >>> portions(5, 2)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    starts = list(range(0, tokens, most))
    if len(starts) > 1 and tokens - starts[-1] == 1:
        starts.pop()  # for one token alone models have other code
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], tokens], strict=True)]


def write_rows(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    """A .npy file of float32 and this shape, written as its rows come, whole or not at all."""
    with atomic_writer(path) as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for some in rows:
            file.write(np.ascontiguousarray(some, np.float32).data)


def read_rows(path: Path) -> np.ndarray:
    """The array of such a file, mapped: read when it is looked at."""
    return np.load(path, mmap_mode="r")


def squared_sums(found: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The sum of squared differences, and that of the reference's squares, in float64."""
    wide = reference.astype(np.float64)
    return float(np.square(found - wide).sum()), float(np.square(wide).sum())
