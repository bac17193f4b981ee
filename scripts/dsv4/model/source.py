"""Open a source and judge it by config.json, index and headers, before a byte of data is read.

Every stage opens its source here, so all of them accept and refuse the same ones. The headers may
be those of a published repository (hub/remote_headers.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dsv4.errors import UserError
from dsv4.model.expected_tensors import check_headers, check_scales, check_tables, lacking_mtp
from dsv4.model.fp8_blocks import read_block
from dsv4.model.load import read_config
from dsv4.model.names import is_control
from dsv4.model.source_format import check_format, image_tensors
from dsv4.storage.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    check_index,
    open_shards,
    read_index,
    unindexed_shards,
)
from dsv4.storage.safetensors_file import read_shard
from dsv4.text import join_some


def open_source(folder: Path) -> Checkpoint:
    """Open an FP4/FP8 source and check its headers, its F32 scales and its tables of experts.

    Raises UserError as `open_headers`, `check_scales` and `check_tables` do.
    """
    source = open_headers(folder)
    check_scales(source)
    check_tables(source)
    return source


def open_headers(folder: Path) -> Checkpoint:
    """Open an FP4/FP8 source and check it by its headers; its data may be missing (sparse files).

    Raises UserError for another model or format, a missing shard, an index that names other tensors
    than its shards hold, and, all in one line, for tensors that are missing, or of another shape or
    dtype than config.json calls for.
    """
    config = read_config(folder)
    weight_map = shard_map(folder)
    source = Checkpoint(folder, config, weight_map, open_shards(folder, set(weight_map.values())))
    check_index(source, "download")
    check_format(source)
    source = without_stray_tower(source)
    read_block(config, folder)
    check_headers(source)
    return source


def without_stray_tower(source: Checkpoint) -> Checkpoint:
    """Return the source, without image tensors when config.json has no key of a tower.

    A text model of a Vision-Exp release may have kept them. The index still names them.
    """
    if any(key.startswith("vision_") for key in source.config):
        return source
    strays = image_tensors(source.tensors)
    shards = {
        file: replace(shard, tensors={n: t for n, t in shard.tensors.items() if n not in strays})
        for file, shard in source.shards.items()
    }
    return replace(source, shards=shards)


def shard_map(folder: Path) -> dict[str, str]:
    """Return tensor name → shard, by the index, or by the header of SINGLE where there is no index.

    Raises UserError when the folder has neither.
    """
    if (folder / INDEX).is_file() or not (folder / SINGLE).is_file():
        return read_index(folder)
    return dict.fromkeys(read_shard(folder / SINGLE).tensors, SINGLE)


def check_tokenizer_files(folder: Path, names: tuple[str, ...]) -> None:
    """Raise UserError when the folder lacks one of these files."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}", f"no {join_some(missing)}", "tokenizer and encoding files",
            "name a folder or a repository that has them, such as the base model's: "
            "REFERENCE=DIR or BASE=deepseek-ai/…",
        )  # fmt: skip


def source_notes(source: Checkpoint) -> list[str]:
    """Return what is unusual in a source and harmless, a phrase each."""
    notes = [lacking_mtp(source)]
    if images := len(source.weight_map) - len(source.tensors):
        notes.append(f"{images:,} tensors for images, of which config.json has no key, ignored")
    strays = unindexed_shards(source)
    if strays:
        notes.append(f"shards that the index does not name, ignored: {join_some(strays)}")
    rounded = [n for n, t in source.tensors.items() if is_control(n) and t.dtype != "F32"]
    if rounded:
        dtypes = ", ".join(sorted({source.tensors[name].dtype for name in rounded}))
        notes.append(f"{len(rounded):,} control tensors in {dtypes}, widened to F32 exactly")
    scales = [n for n, t in source.tensors.items() if n.endswith(".scale") and t.dtype == "F32"]
    if scales:
        notes.append(f"{len(scales):,} scales in F32, taken as UE8M0")
    return [note for note in notes if note]
