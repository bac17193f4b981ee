"""Check that a source has every tensor that its config.json calls for.

A source that lacks one looks complete by its index and headers and converts without an error. Only
a loader notices, hours later: it leaves the parameter at its initial value, or stops.
"""

from __future__ import annotations

from collections.abc import Iterator

from dsv4.errors import UserError
from dsv4.model.load import block_counts, config_count, mtp_declared
from dsv4.model.names import mtp_layer
from dsv4.model.tensor_table import DRAFTERS, Block, Row, compress_ratio, rows_in
from dsv4.storage.checkpoint import Checkpoint


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


def check_whole(source: Checkpoint) -> None:
    """Raise UserError when the source lacks a tensor that its config.json calls for."""
    wanted = [name for name, _, _ in expected_weights(source)]
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise UserError(
            f"{source.folder}", f"no {missing[0]} ({len(missing):,} of {len(wanted):,} missing)",
            "every tensor that config.json calls for",
            "fetch the source again, or restore config.json",
        )  # fmt: skip


def lacking_mtp(source: Checkpoint) -> str:
    """Return words for a source with fewer MTP layers than config.json declares; else "".

    That is legal: people strip MTP.
    """
    declared, stored = mtp_declared(source.config, source.folder), block_counts(source)["mtp"]
    if stored >= declared:
        return ""
    return f"MTP layers: {declared} declared in config.json, {stored or 'none'} there"
