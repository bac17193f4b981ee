"""Check that a source has every tensor that its config.json calls for.

A source that lacks one looks complete by its index and headers and converts without an error. Only
a loader notices, hours later: it leaves the parameter at its initial value, or stops.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv4.errors import UserError
from dsv4.model.fp8_blocks import read_block, scale_shape
from dsv4.model.load import block_counts, config_count, mtp_declared
from dsv4.model.names import mtp_layer
from dsv4.model.tensor_table import (
    DRAFTERS,
    Block,
    MissingSize,
    Row,
    compress_ratio,
    rows_in,
)
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import FLOATS, Tensor, read_array
from dsv4.text import escape_line

# The dtypes in which a source may have a tensor: fine-tuned copies have matrices that are dense.
STORED = {
    "FP4": ("I8", "U8"),
    "FP8": ("F8_E4M3", *FLOATS),
    "BF16": FLOATS,
    "F32": FLOATS,
    "INT": ("I64", "I32"),
}


def blocks(source: Checkpoint) -> Iterator[Block]:
    """Yield the model's ends, its main layers, and the MTP layers or DSpark stages that are stored.

    Raises UserError when a count in config.json is missing or no whole number.
    """
    config, folder = source.config, source.folder
    layers = config_count(config, "num_hidden_layers", folder)
    hashed = config_count(config, "num_hash_layers", folder) if "num_hash_layers" in config else 0
    yield Block("")
    for layer in range(layers):
        yield Block(f"layers.{layer}.", compress_ratio(config, layer), hashed=layer < hashed)
    stages, drafter = block_counts(source)["mtp"], "dspark" if has_dspark(source) else "mtp"
    for stage in range(stages):
        ratio, last = compress_ratio(config, layers + stage), stage == stages - 1
        yield Block(f"mtp.{stage}.", ratio, drafter=drafter, first=stage == 0, last=last)


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
                yield block.prefix + row.name.replace(".E.", f".{number}."), row, block


def has_dspark(source: Checkpoint) -> bool:
    """Return True when DSpark's stages are stored under mtp, and not the first release's MTP.

    A tensor that only one of the two has decides; without one, config.json's dspark_ keys.
    """
    stored = {n.split(".", 2)[-1] for n in source.tensors if mtp_layer(n) is not None}
    mtp, dspark = Block("mtp.0.", drafter="mtp"), Block("mtp.0.", 0, False, "dspark", True, True)
    only_mtp = {row.name for row in DRAFTERS if row.present(mtp) and not row.present(dspark)}
    only_dspark = {row.name for row in DRAFTERS if row.present(dspark) and not row.present(mtp)}
    if stored & (only_mtp | only_dspark):
        return bool(stored & only_dspark)
    return any(key.startswith("dspark_") for key in source.config)


def source_faults(source: Checkpoint) -> list[str]:
    """Return what headers show to be wrong with a source, a sentence for each tensor.

    A missing tensor, a shape or dtype that config.json does not call for, a scale that belongs to
    nothing. Sizes that config.json lacks are not checked; a weight without its scale is refused by
    open_source.
    """
    faults = []
    for name, row, block in expected_weights(source):
        tensor = source.tensors.get(name)
        if tensor is None:
            faults.append(f"no {name}")
            continue
        faults += _tensor_faults(source, tensor, row, block)
    for name, tensor in source.tensors.items():
        weight = source.tensors.get(name.removesuffix("scale") + "weight")
        if name.endswith(".scale") and weight is not None and weight.dtype in FLOATS:
            faults.append(
                f"{name} {tensor.dtype} beside a weight in {weight.dtype}, not FP4 or FP8"
            )
    return faults


def _tensor_faults(source: Checkpoint, tensor: Tensor, row: Row, block: Block) -> Iterator[str]:
    allowed = STORED[row.stored]
    if tensor.dtype not in allowed:
        yield f"{tensor.name}: {tensor.dtype}, expected {' or '.join(allowed)}"
        return
    try:
        shape = row.shape(source.config, block)
    except MissingSize:
        return
    if row.stored == "FP4":
        shape = (shape[0], shape[1] // 2)
    if tensor.shape != shape:
        yield f"{tensor.name}: shape {list(tensor.shape)}, expected {list(shape)}"
    elif tensor.dtype == "F8_E4M3":
        scale = source.tensors[tensor.name.removesuffix("weight") + "scale"]  # open_source asked
        expected = scale_shape(shape, read_block(source.config, source.folder))
        if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != expected:
            found = f"{scale.name}: {scale.dtype} {list(scale.shape)}"
            yield f"{found}, expected F8_E8M0 {list(expected)}"


def table_faults(source: Checkpoint) -> list[str]:
    """Return the tables of hash-routed layers that name an expert which is not there.

    Reads the tables, 6 MB for each of Flash's three.
    """
    experts = config_count(source.config, "n_routed_experts", source.folder)
    faults = []
    for name, tensor in source.tensors.items():
        if name.endswith(".tid2eid") and tensor.dtype in STORED["INT"] and tensor.nbytes:
            table = read_array(tensor)
            if table.min() < 0 or table.max() >= experts:
                faults.append(f"{name}: experts {table.min()} to {table.max()} of {experts}")
    return faults


def check_tables(source: Checkpoint) -> None:
    """Raise UserError when a hash-routed layer's table names an expert which is not there."""
    if faults := table_faults(source):
        raise UserError(
            f"{source.folder}", _listed(faults), "numbers of experts that there are",
            "write the tables anew for the experts that were kept",
        )  # fmt: skip


def _listed(faults: list[str]) -> str:
    """Return up to 20 faults in one line."""
    more = f" and {len(faults) - 20:,} more" if len(faults) > 20 else ""
    return "; ".join(escape_line(fault) for fault in faults[:20]) + more


def check_whole(source: Checkpoint) -> None:
    """Raise UserError, with up to 20 faults in one line, when headers show a source to be wrong."""
    faults = source_faults(source)
    if faults:
        raise UserError(
            f"{source.folder}",
            _listed(faults),
            "every tensor that config.json calls for, in its format and shape",
            "restore config.json, or fetch the shards of these tensors again",
        )


def lacking_mtp(source: Checkpoint) -> str:
    """Return words for a source with fewer MTP layers than config.json declares; else "".

    That is legal: people strip MTP.
    """
    declared, stored = mtp_declared(source.config, source.folder), block_counts(source)["mtp"]
    if stored >= declared:
        return ""
    return f"MTP layers: {declared} declared in config.json, {stored or 'none'} there"
