"""Hold the headers of a source against what its config.json calls for.

A source that lacks a tensor looks complete by its index and converts without an error. Only a
loader notices, hours later: it leaves the parameter at its initial value, or stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsv4.errors import UserError
from dsv4.model.bundle_tensors import SCALE_DTYPES
from dsv4.model.fp8_blocks import read_block, scale_shape
from dsv4.model.load import block_counts, config_count, mtp_declared
from dsv4.model.names import GROUP, parse_expert, treatment
from dsv4.model.source_format import has_dspark, has_vision
from dsv4.model.tensor_table import (
    TOWER,
    Block,
    MissingSize,
    Row,
    compress_ratio,
    other_spelling,
    rows_in,
)
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, NUMPY_DTYPE, Tensor, read_array

# The dtypes in which a source may have a tensor: fine-tuned copies have matrices that are dense.
STORED = {
    "FP4": ("I8",),
    "FP8": ("F8_E4M3", *FLOATS),
    "BF16": FLOATS,
    "F32": FLOATS,
    "INT": ("I64", "I32"),
}
NAMED = 5  # faults in an error's line


def blocks(source: Checkpoint) -> Iterator[Block]:
    """Yield the ends, the main layers, the stored MTP layers or DSpark stages, the vision tower.

    Raises UserError when a count in config.json is missing, no whole number or beyond any index.
    """
    config, folder = source.config, source.folder
    counts = block_counts(source)
    layers, stages = counts["layers"], counts["mtp"]
    hashed = config_count(config, "num_hash_layers", folder) if "num_hash_layers" in config else 0
    vision = has_vision(source.tensors, config)
    yield Block("", vision=vision)
    for layer in range(layers):
        ratio = compress_ratio(config, layer)
        yield Block(f"layers.{layer}.", ratio, hashed=layer < hashed, vision=vision)
    drafter = "dspark" if has_dspark(source.tensors, config) else "mtp"
    for stage in range(stages):
        ratio, last = compress_ratio(config, layers + stage), stage == stages - 1
        yield Block(
            f"mtp.{stage}.", ratio, drafter=drafter, first=stage == 0, last=last, vision=vision
        )
    for number in range(config_count(config, "vision_n_layers", folder) if vision else 0):
        yield Block(f"{TOWER}{number}.", vision=True)


def expected_weights(source: Checkpoint) -> Iterator[tuple[str, Row, Block]]:
    """Yield (storage name, row, block) of every tensor but the scales. Raises as `blocks` does."""
    experts = config_count(source.config, "n_routed_experts", source.folder)
    tied = source.config.get("tie_word_embeddings") is True
    for block in blocks(source):
        for row in rows_in(block):
            if tied and row.name == "head.weight":
                continue
            numbers = range(experts) if ".E." in row.name else (0,)
            for number in numbers:
                name = block.prefix + row.name.replace(".E.", f".{number}.")
                other = other_spelling(name)
                yield other if other in source.tensors else name, row, block


def source_faults(source: Checkpoint) -> list[str]:
    """Return what headers show to be wrong with a source, a phrase for each tensor.

    A tensor that config.json calls for and that is missing, one that it does not call for, a wrong
    shape or dtype, a weight without its scale, a scale without its weight. Sizes that config.json
    lacks are not checked.
    """
    faults, expected, tensors = [], set(), source.tensors
    for name, row, block in expected_weights(source):
        expected.add(name)
        tensor = tensors.get(name)
        if tensor is None:
            faults.append(f"no {name}")
        else:
            faults += _tensor_faults(source, tensor, row, block)
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            faults += _lone_scale_faults(source, tensor)
        elif name not in expected:
            reason = "config.json calls for no such tensor"
            if treatment(name) is None:
                reason = "a name that this recipe does not know"
            faults.append(f"{name}: {reason}")
    return faults


def _tensor_faults(source: Checkpoint, tensor: Tensor, row: Row, block: Block) -> Iterator[str]:
    allowed = STORED[row.stored]
    if tensor.dtype not in allowed:
        yield f"{tensor.name}: {tensor.dtype}, expected {' or '.join(allowed)}"
        return
    try:
        shape = row.shape(source.config, block)
    except MissingSize:
        shape = tensor.shape
    else:
        if row.stored == "FP4":
            shape = (shape[0], shape[1] // 2)
    if tensor.shape != shape or (row.stored in ("FP4", "FP8") and len(shape) != 2):
        yield f"{tensor.name}: shape {list(tensor.shape)}, expected {list(shape)}"
    elif row.stored == "FP4":
        yield from _scale_faults(source, tensor, (shape[0], 2 * shape[1] // GROUP))
    elif tensor.dtype == "F8_E4M3":
        block_size = read_block(source.config, source.folder)
        yield from _scale_faults(source, tensor, scale_shape(shape, block_size))


def _scale_faults(source: Checkpoint, weight: Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    name = weight.name.removesuffix("weight") + "scale"
    scale = source.tensors.get(name)
    if scale is None:
        yield f"no {name}"
    elif scale.dtype not in SCALE_DTYPES or scale.shape != shape:
        yield f"{name}: {scale.dtype} {list(scale.shape)}, expected F8_E8M0 {list(shape)}"


def _lone_scale_faults(source: Checkpoint, scale: Tensor) -> Iterator[str]:
    weight = source.tensors.get(scale.name.removesuffix("scale") + "weight")
    if weight is None:
        yield f"{scale.name}: no weight of that name"
    elif weight.dtype in FLOATS:
        yield f"{scale.name}: {scale.dtype} beside a weight in {weight.dtype}, not FP4 or FP8"


def check_scales(source: Checkpoint) -> None:
    """Raise SourceFaults when an F32 scale of an FP8 matrix is no power of two.

    Reads these scales, 1.6 MB of Flash's. Those of experts are checked when they are converted.
    """
    faults = []
    for name, tensor in source.tensors.items():
        if name.endswith(".scale") and tensor.dtype == "F32" and not parse_expert(name):
            mantissa, _ = np.frexp(read_array(tensor))
            odd = mantissa[mantissa != 0.5]
            if odd.size:
                faults.append(f"{name}: {odd.size:,} F32 scales that are no power of two")
    if faults:
        raise SourceFaults(
            source.folder, faults, "powers of two, as UE8M0 has them",
            "take these tensors from the release that this is a copy of",
        )  # fmt: skip


Read = Callable[[Tensor], np.ndarray]  # the bytes or integers of a whole tensor


def check_tables(source: Checkpoint, read: Read = read_array) -> None:
    """Raise SourceFaults when a hash-routed layer's table names an expert which is not there.

    Reads the tables, 6 MB for each of Flash's three. `read` returns a tensor's data as an array.
    """
    experts = config_count(source.config, "n_routed_experts", source.folder)
    faults = []
    for name, tensor in source.tensors.items():
        if name.endswith(".tid2eid") and tensor.nbytes:
            table = read(tensor).view(NUMPY_DTYPE[tensor.dtype])
            if table.min() < 0 or table.max() >= experts:
                faults.append(f"{name}: experts {table.min()} to {table.max()} of {experts}")
    if faults:
        raise SourceFaults(
            source.folder, faults, "numbers of experts that there are",
            "write the tables anew for the experts that were kept",
        )  # fmt: skip


class SourceFaults(UserError):
    """A source with faults, of which the message has the first few. faults: a phrase for each."""

    def __init__(self, folder: Path, faults: list[str], expected: str, todo: str) -> None:
        self.faults = faults
        shown = "; ".join(faults[:NAMED])
        more = f"; {len(faults) - NAMED:,} more, see make check" if len(faults) > NAMED else ""
        super().__init__(f"{folder}", shown + more, expected, todo)


def check_headers(source: Checkpoint) -> None:
    """Raise SourceFaults for a source with a fault in its headers."""
    if faults := source_faults(source):
        raise SourceFaults(
            source.folder, faults,
            "the tensors that config.json calls for, in their formats and shapes",
            "restore config.json, or take these tensors from the release that this is a copy of",
        )  # fmt: skip


def lacking_mtp(source: Checkpoint) -> str:
    """Return words for a source with fewer MTP layers than config.json declares; else "".

    That is legal: people strip MTP.
    """
    declared, stored = mtp_declared(source.config, source.folder), block_counts(source)["mtp"]
    if stored >= declared:
        return ""
    return f"MTP layers: {declared} declared in config.json, {stored or 'none'} there"
