"""Make the small files that runtimes read: stop tokens, chat template, labels, defaults."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.hub.provenance import provenance
from dsv4.model import defaults
from dsv4.model.chat_template import (
    CHAT_TEMPLATE,
    EFFORT_KEY,
    EFFORTS,
    effort_holder,
    folder_release,
    is_own_template,
    template_for,
)
from dsv4.model.configs import without_code
from dsv4.model.json_schemas import origin_of
from dsv4.model.labels import quantization
from dsv4.model.load import expert_labels
from dsv4.model.names import GROUP
from dsv4.model.special_tokens import BOS, EOS, text_of, token_ids
from dsv4.storage import limits
from dsv4.storage.checkpoint import Checkpoint, read_json

UNRECORDED = "not recorded"


def patched_documents(
    bundle: Checkpoint, source: Path | None = None, release: str = ""
) -> dict[str, dict[str, Any]]:
    """Return file name → the content that it should have, for the four JSON files."""
    folder = bundle.folder
    contents = {
        "config.json": patched_config(bundle, expert_labels(bundle)),
        "generation_config.json": generation_config(folder),
        "tokenizer_config.json": tokenizer_config(folder, release),
        "jang_config.json": jang_config(folder, source, release),
    }
    return {name: cleaned(folder, source, name, content) for name, content in contents.items()}


def cleaned(
    folder: Path, source: Path | None, name: str, content: dict[str, Any]
) -> dict[str, Any]:
    """Return a document without keys that name code or override the generation defaults.

    The defaults are those of the source's generation_config.json, else of the bundle's.
    """
    content = without_code(content)
    if name not in defaults.DOCUMENTS:
        return content
    own, original = (read_json_or_none(place, defaults.GENERATION) for place in (folder, source))
    generation = defaults.reference(own or {}, original)
    reference = read_json_or_none(source, name) or {}
    return defaults.without_overrides(name, content, generation, reference)


def read_json_or_none(folder: Path | None, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a file; None when it is missing or cannot be read."""
    path = folder / name if folder is not None else None
    with contextlib.suppress(UserError):
        return read_json(path) if path is not None and path.is_file() else None
    return None


def patched_config(bundle: Checkpoint, experts: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """Return config.json with the stop tokens and the labels of the experts.

    experts: expert → label (None: the labels are kept).
    """
    content = copy.deepcopy(bundle.config)
    if experts is not None or content.get("quantization_config") == content.get("quantization"):
        content.pop("quantization_config", None)
    if experts is not None:
        content["quantization"] = quantization(experts, bundle.tensors)
    content["eos_token_id"] = token_ids(bundle.folder)
    if "bos_token_id" in content:
        content["bos_token_id"] = token_ids(bundle.folder, (BOS,))[0]
    return content


def generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json with the ids of BOS and of the stop tokens."""
    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {}
    bos = token_ids(folder, (BOS,))[0]
    return {**content, "bos_token_id": bos, "eos_token_id": token_ids(folder)}


def tokenizer_config(folder: Path, release: str = "") -> dict[str, Any]:
    """Return tokenizer_config.json with its special tokens and a template."""
    content = read_json(folder / "tokenizer_config.json")
    for key, token in (("bos_token", BOS), ("eos_token", EOS)):
        if text_of(content.get(key)) != token:
            content[key] = token
    content["chat_template"] = chat_templates(folder, release)[1]
    return content


def chat_templates(folder: Path, release: str = "") -> tuple[str, Any]:
    """Return (text of chat_template.jinja, chat_template of tokenizer_config.json) to be written.

    A template that is not this recipe's is kept. If only one place has such a template, the other
    place gets it too. If none has, both get this recipe's.
    """
    in_file = template_file(folder)
    in_config = read_json(folder / "tokenizer_config.json").get("chat_template")
    own = template_for(folder, release)
    in_file, in_config = (
        text if text and not is_own_template(text) else None for text in (in_file, in_config)
    )
    shared = in_config if isinstance(in_config, str) else None
    return in_file or shared or own, in_config or in_file or own


def template_file(folder: Path) -> str | None:
    """Return the text of chat_template.jinja; None when it is missing or not UTF-8."""
    path = folder / CHAT_TEMPLATE
    try:
        return limits.read_bounded(path).decode("utf-8") if path.is_file() else None
    except UnicodeDecodeError:
        return None


def jang_config(folder: Path, source: Path | None, release: str = "") -> dict[str, Any]:
    """Return jang_config.json with groups of 32 and the source's origin instead of a local path.

    The reasoning efforts become those of `release`, or of the folder's encoding file.

    Without a source folder the origin that was recorded earlier is kept.
    """
    path = folder / "jang_config.json"
    content = read_json(path) if path.is_file() else {"weight_format": "affine"}
    quantized = content.get("quantization")
    quantized = quantized if isinstance(quantized, dict) else {}
    content = {**content, "quantization": {**quantized, "group_size": GROUP}}
    content = with_effort_levels(content, release or folder_release(folder))
    origin = origin_of(content)
    content.pop("source", None)
    if source is not None and source.is_dir():
        origin = provenance(source)
    if origin is None:
        return {**content, "source_model": UNRECORDED}
    named = f"{origin['repo']}@{origin['commit']}"
    return {**content, "source_model": named, "source": origin}


def with_effort_levels(document: dict[str, Any], release: str | None) -> dict[str, Any]:
    """Return jang_config.json with the reasoning efforts of a release; None: as it is.

    vMLX 1.6.81 answers HTTP 400 to an effort that the document does not list.
    """
    holder = effort_holder(document)
    if release is None or holder is None:
        return document
    document = copy.deepcopy(document)
    effort_holder(document)[EFFORT_KEY] = [*EFFORTS[release], None]
    return document


def changed_keys(folder: Path, wanted: dict[str, dict[str, Any]]) -> list[str]:
    """Return `file: key` for every top-level key that would change."""
    out = []
    for name, content in wanted.items():
        path = folder / name
        before = read_json(path) if path.is_file() else {}
        keys = [k for k in {**before, **content} if before.get(k) != content.get(k)]
        out += [f"{name}: {key}" for key in keys]
    return out


def check_json(name: str, content: dict[str, Any]) -> None:
    """Raise UserError for content that JSON cannot hold, such as NaN from a broken config."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise UserError(name, str(error), "plain JSON", "restore the file") from error
