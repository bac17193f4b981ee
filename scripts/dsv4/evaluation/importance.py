"""Make an importance matrix by one pass over the source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.evaluation import activations, comparability, driver
from dsv4.evaluation.activations import sums_path
from dsv4.evaluation.driver import PassSettings, WorkerProcess
from dsv4.evaluation.evaluate import text_digest
from dsv4.model.load import config_count
from dsv4.model.names import PROJECTION, expert_base
from dsv4.model.source import open_source
from dsv4.quantization.imatrix import entry_name, write_imatrix
from dsv4.storage.locks import locked
from dsv4.storage.safetensors_file import read_array, read_shard
from dsv4.text import join_some


def collect(
    source: Path, text: Path, tokens: int | None, device: str, settings: PassSettings, out: Path
) -> dict[str, Any]:
    """Write the imatrix to `out`; return a description for JSON.

    {"text", "sha256", "tokens": the text's, BOS included; "layers": tokens that each expert of a
    layer saw; "unseen": [layer, expert] of those that saw none}. Raises UserError as `evaluate`
    does.
    """
    opened = open_source(source)
    comparability.check_counts(opened)
    ids = comparability.tokens_of(opened, text, tokens)
    layers = config_count(opened.config, "num_hidden_layers", source)
    job: dict[str, Any] = {"folder": f"{source.resolve()}", "kind": "source", "ids": ids}
    job["collect"] = True
    driver.prepare(settings.work)
    with locked(settings.work):
        folder = driver.folder_of(opened, settings, device, job)
        driver.remove_other_passes(settings.work, [folder])
        driver.check_space(settings.work, opened.config, len(ids), 0, 0)
        if activations.read_record(folder).layers < layers:
            with WorkerProcess(settings, device) as engine:
                engine.run({**job, "work": f"{folder.resolve()}"}, source.name)
        name = f"{text.name}, {len(ids)} tokens"
        write_imatrix(out, layers * len(PROJECTION), mean_squares(folder, layers), name)
        seen = [tokens_seen(folder, layer).tolist() for layer in range(layers)]
    return {
        "text": text.name,
        "sha256": text_digest(text),
        "tokens": len(ids),
        "layers": seen,
        "unseen": [[n, e] for n, row in enumerate(seen) for e, some in enumerate(row) if not some],
    }


def tokens_seen(folder: Path, layer: int) -> np.ndarray:
    """Return the number of tokens of each expert of a layer, uint32 (experts,)."""
    return read_array(read_shard(sums_path(folder, layer)).tensors["tokens"])


def mean_squares(folder: Path, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (entry, mean squares float32 (experts, columns)) of each stacked matrix.

    Experts without a token have 0.
    """
    for layer in range(layers):
        sums = read_shard(sums_path(folder, layer)).tensors
        tokens = np.maximum(read_array(sums["tokens"]), 1).astype(np.float64)
        for matrix in PROJECTION:
            entry = entry_name(expert_base("layers", layer, 0, matrix), layers)
            yield entry, (read_array(sums[matrix]) / tokens[:, None]).astype(np.float32)


def describe_result(result: dict[str, Any]) -> str:
    """Return a summary: tokens by expert, and the experts without a token."""
    flat = np.concatenate([np.array(row) for row in result["layers"]])
    unseen = [f"layer {layer} expert {expert}" for layer, expert in result["unseen"]]
    line = (f"{len(flat):,} experts, {result['tokens']:,} tokens: an expert saw {flat.min():,} to "
            f"{flat.max():,}, in the middle {int(np.median(flat)):,}")  # fmt: skip
    if unseen:
        line += (f"\n{len(unseen):,} saw none, and all their columns will count alike: "
                 f"{join_some(unseen)}")  # fmt: skip
    return f"{line}\nMTP layers take no part: all columns of their experts count alike"
