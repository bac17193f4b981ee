"""What runtimes read of a bundle's JSON files: stop tokens, chat template, labels, origin."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from dsv4.hub.origin import provenance
from dsv4.model.chat import BOS, EOS, TEMPLATE, token_ids
from dsv4.model.configs import without_code
from dsv4.model.labels import quantization
from dsv4.model.names import GROUP
from dsv4.model.opening import expert_bases, expert_label
from dsv4.stop import Stop
from dsv4.storage.checkpoint import Checkpoint, read_json

UNRECORDED = "not recorded"


def patched(bundle: Checkpoint, source: Path | None = None) -> dict[str, dict[str, Any]]:
    """File name → content that it should have, for the four JSON files."""
    folder = bundle.folder
    contents = {
        "config.json": config(bundle, expert_label(bundle)),
        "generation_config.json": generation_config(folder),
        "tokenizer_config.json": tokenizer_config(folder),
        "jang_config.json": jang_config(folder, source),
    }
    return {name: without_code(content) for name, content in contents.items()}


def config(bundle: Checkpoint, expert: dict[str, Any] | None) -> dict[str, Any]:
    """config.json with the stop tokens, and labels of experts that are stored as `expert` says.

    None: the labels stay as they are.
    """
    content = copy.deepcopy(bundle.config)
    if expert is not None:
        content.pop("quantization_config", None)
        content["quantization"] = quantization(expert_bases(bundle), expert, bundle.tensors)
    content["eos_token_id"] = token_ids(bundle.folder)
    return content


def generation_config(folder: Path) -> dict[str, Any]:
    eos = token_ids(folder)
    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {"bos_token_id": token_ids(folder, (BOS,))[0]}
    return {**content, "eos_token_id": eos}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "tokenizer_config.json")
    for key, token in (("bos_token", BOS), ("eos_token", EOS)):
        if not content.get(key):
            content[key] = token
    if not content.get("chat_template"):
        content["chat_template"] = TEMPLATE
    return content


def jang_config(folder: Path, source: Path | None) -> dict[str, Any]:
    """With groups of 32, and the source's origin in place of a local path.

    Without a source that is there, an origin that was recorded earlier stays.
    """
    path = folder / "jang_config.json"
    content = read_json(path) if path.is_file() else {"weight_format": "affine"}
    quantized = content.get("quantization")
    quantized = quantized if isinstance(quantized, dict) else {}
    content = {**content, "quantization": {**quantized, "group_size": GROUP}}
    origin = content.pop("source", None)
    if source is not None and source.is_dir():
        origin = provenance(source)
    if not isinstance(origin, dict):
        return {**content, "source_model": UNRECORDED}
    named = f"{origin.get('repo')}@{origin.get('commit')}"
    return {**content, "source_model": named, "source": origin}


def differences(folder: Path, wanted: dict[str, dict[str, Any]]) -> list[str]:
    """`file: key` for every top-level key that would change."""
    out = []
    for name, content in wanted.items():
        path = folder / name
        before = read_json(path) if path.is_file() else {}
        keys = [k for k in {**before, **content} if before.get(k) != content.get(k)]
        out += [f"{name}: {key}" for key in keys]
    return out


def check_json(name: str, content: dict[str, Any]) -> None:
    """Raise Stop when the content does not survive JSON (NaN from a broken config, say)."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise Stop(name, str(error), "plain JSON", "restore the file") from error
