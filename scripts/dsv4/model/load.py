"""Open a source or a bundle of DeepSeek-V4, and compare it with its config.json.

Only JSON and headers are read: seconds for 180 GB.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import mtp
from dsv4.model.labels import (
    EXPERT,
    MXFP4,
    RECORD,
    TURBO2,
    TURBO_PARTS,
    recorded_mtp,
    recorded_quantizer,
    stored_label,
)
from dsv4.model.names import (
    PROJECTION,
    expert_base,
    mtp_layer,
    stack_base,
    stack_of,
)
from dsv4.model.quantizer_table import quantizer_properties, quantizers_with
from dsv4.model.source_format import check_model_type
from dsv4.storage.checkpoint import (
    Checkpoint,
    open_shards,
    read_index,
    read_json,
)
from dsv4.storage.limits import LAYERS, MATRICES
from dsv4.text import short_repr


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises UserError unless its model_type is deepseek_v4."""
    if not folder.is_dir():
        raise UserError(f"{folder}", "no such folder", "a checkpoint", "check SOURCE and BUNDLE")
    config = read_json(folder / "config.json")
    check_model_type(config, f"{folder / 'config.json'}")
    return config


def config_count(config: dict[str, Any], key: str, folder: Path) -> int:
    """Return a count of config.json. Raises UserError when it is missing or no whole number."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(
            f"{folder / 'config.json'}: {key}", short_repr(value), "a whole number",
            "restore config.json",
        )  # fmt: skip
    return value


def mtp_declared(config: dict[str, Any], folder: Path) -> int:
    """Return the number of MTP layers that config.json declares.

    The tensors may have another: DSpark's three stages are declared as 1 or 3, copies without MTP
    keep the number, and others declare 0 and have MTP. Raises as `config_count` does.
    """
    key = "num_nextn_predict_layers"
    return config_count(config, key, folder) if key in config else 0


def block_counts(checkpoint: Checkpoint) -> dict[str, int]:
    """Count main layers by config.json, MTP layers by the tensors: {"layers": …, "mtp": …}.

    Labels of MTP experts count as tensors, so that MTP layers which a bundle lost are missed.
    Raises UserError for more layers, or more matrices of experts, than an index can name.
    """
    config, folder = checkpoint.config, checkpoint.folder
    experts, declared = (
        config_count(config, "n_routed_experts", folder),
        mtp_declared(config, folder),
    )
    labels = config.get("quantization")
    names = itertools.chain(checkpoint.tensors, labels if isinstance(labels, dict) else ())
    stored = max((n + 1 for name in names if (n := mtp_layer(name)) is not None), default=0)
    layers = {"layers": config_count(config, "num_hidden_layers", folder), "mtp": stored}
    matrices = sum(layers.values()) * experts * len(PROJECTION)
    if max(*layers.values(), declared) > LAYERS or matrices > MATRICES:
        raise UserError(
            f"{folder / 'config.json'}",
            f"{short_repr(layers['layers'])} layers, {short_repr(max(stored, declared))} of MTP "
            f"by it or by a tensor's name, {short_repr(experts)} experts",
            f"at most {LAYERS:,} layers and {MATRICES:,} matrices",
            "restore config.json",
        )
    return layers


def open_bundle(folder: Path) -> Checkpoint:
    """Open a bundle with every shard that its index names.

    Index and shards may disagree: after a killed requantization the index lacks new tensors.
    """
    config = read_config(folder)
    weight_map = read_index(folder)
    return Checkpoint(folder, config, weight_map, open_shards(folder, set(weight_map.values())))


def expert_bases(checkpoint: Checkpoint) -> list[str]:
    """Return the storage names of all routed-expert matrices: of each layer, each expert, three.

    The counts are those of config.json and `block_counts`. Raises as that does.
    """
    experts = config_count(checkpoint.config, "n_routed_experts", checkpoint.folder)
    return [
        expert_base(block, layer, expert, matrix)
        for block, n in block_counts(checkpoint).items()
        for layer in range(n)
        for expert in range(experts)
        for matrix in ("w1", "w2", "w3")
    ]


def expert_labels(bundle: Checkpoint) -> dict[str, dict[str, Any]]:
    """Return the label of each routed-expert matrix, by storage name.

    The matrices that a runtime stacks have one label; in a bundle that is no mixture all have one.
    Raises UserError for a matrix with no label or another one, and for FP4 bytes unless the
    recorded quantizer keeps them: those of a stock bundle are still to be requantized.
    """
    bases, quantizer = expert_bases(bundle), recorded_quantizer(bundle.config)
    properties = quantizer_properties(quantizer)
    copied = recorded_mtp(bundle.config) == mtp.SOURCE
    found = {}
    if properties.label == TURBO2:
        found = {base: TURBO2 for base in bases if not (copied and mtp.is_mtp(base))}
        check_turbo(bundle, list(found))
    firsts: dict[str, dict[str, Any]] = {}
    for base in bases:
        if base in found:
            continue
        kept = copied and mtp.is_mtp(base)
        label = stored_label(bundle.tensors, base, bundle.config)
        stack = stack_of(base) if properties.mixed else mtp.PREFIX * kept
        first = firsts.setdefault(stack, MXFP4 if kept else label or EXPERT)
        if label is None or label != first:
            raise UserError(
                f"{bundle.folder}: {base}", "no affine triple" if label is None else f"{label}",
                f"{first} for every expert of its kind", "run requantize",
            )  # fmt: skip
        if label == MXFP4 and not (properties.copies_fp4 or kept):
            raise UserError(
                f"{bundle.folder}: {base}",
                f"FP4 bytes, and no {RECORD}.quantizer "
                f"{' or '.join(quantizers_with('copies_fp4'))} in config.json",
                "what requantize makes of them", "run requantize",
            )  # fmt: skip
        found[base] = label
    if not found:
        raise UserError(f"{bundle.folder}: routed experts", "none", "some", "run requantize")
    return found


def check_turbo(bundle: Checkpoint, bases: list[str]) -> None:
    """Raise UserError unless every expert is there as TurboQuant's codes and norms."""
    stacks = dict.fromkeys(map(stack_base, bases))
    names = [f"{at}.{part}" for at in stacks for part in TURBO_PARTS]
    missing = [name for name in names if name not in bundle.tensors]
    if missing:
        raise UserError(
            f"{bundle.folder}", f"no {missing[0]} ({len(missing):,} tensors missing)",
            f"{len(names):,} tensors of routed experts", "run requantize",
        )  # fmt: skip
