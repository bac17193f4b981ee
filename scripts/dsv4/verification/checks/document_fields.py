"""Level 1: compare every field of a bundle's JSON files with what it should be.

This recipe's own documents are a function of the source, the quantizer and the tokenizer
(dsv4/model/runtime_documents.py), so they are compared whole. Of other makers' documents the keys
that steer a runtime are compared: those beyond the source's, and jang_config.json's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dsv4.errors import UserError
from dsv4.model import defaults
from dsv4.model.bundle_tensors import StorageFormat
from dsv4.model.configs import CODE, FIELDS
from dsv4.model.json_schemas import origin_of
from dsv4.model.labels import (
    RECORD,
    TURBO,
    has_turboquant,
    make_record,
    most_common_label,
    recorded_mtp,
    recorded_quantizer,
)
from dsv4.model.mtp import SOURCE, is_mtp
from dsv4.model.names import stack_of
from dsv4.model.naming_schemes import STORAGE
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.model.runtime_documents import (
    TOKENIZER,
    UNRECORDED,
    model_name,
    read_json_or_none,
    written_documents,
)
from dsv4.model.special_tokens import text_of
from dsv4.storage.checkpoint import INDEX, Checkpoint
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.headers import (
    COUNTS,
    UNUSED_FIELDS,
    WRITTEN_FIELDS,
    quantizer_of,
)
from dsv4.verification.checks.steering import NEUTRAL, Steer, steer_of
from dsv4.verification.checks.stored_formats import LABEL_KEYS, label_at
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

JANG = "jang_config.json"
NAMES = ("config.json", JANG, defaults.GENERATION, TOKENIZER, INDEX)
DIFFERS, STEERS, ADDITION = "document-differs", "document-steers", "document-addition"
AFFINE = ("affine", "jang_affine", "mxfp4", "mxfp8", "nvfp4")  # weight_format without TurboQuant
WIDTHS = ("mxtq_", "routed_expert_bit", "group_size")  # vMLX reads them of TurboQuant alone
SAMPLING = ("answer-limit", "sampling-differs")
# File → path of a key → the findings that report it. (): another check always compares it.
COVERED: dict[str, dict[str, tuple[str, ...]]] = {
    "config.json": {
        "quantization": (), "quantization_config": (), "model_type": (),
        "eos_token_id": ("eos-wrong", "eos-few"), "bos_token_id": ("special-token-wrong",),
        **dict.fromkeys(("jang_config", "jang"), SAMPLING),
        **dict.fromkeys((*defaults.LIMITS, *defaults.SAMPLING), ()),
    },
    JANG: {
        "source": (), "source_model": (),
        "quantization.group_size": ("jang-config-group-size",),
        **dict.fromkeys(("chat.sampling_defaults", "chat.sampling_modes"), ()),
        "chat.reasoning.reasoning_effort_levels": ("effort-levels-wrong",),
        **dict.fromkeys(("weight_format", "mxtq_seed", "mxtq_bits"), ("turbo-config-wrong",)),
    },
    defaults.GENERATION: {
        "eos_token_id": ("eos-wrong", "eos-few"), "bos_token_id": ("special-token-wrong",),
        **dict.fromkeys(defaults.SAMPLING, ()), **dict.fromkeys(defaults.LIMITS, ()),
        "": ("generation-config-differs",),
    },
    TOKENIZER: {
        "chat_template": (),
        "": ("tokenizer-config-differs", "special-token-wrong"),
    },
    INDEX: {"weight_map": ()},
}  # fmt: skip


class Missing:
    """The value of a key that is not there."""

    def __repr__(self) -> str:
        return "no such key"


MISSING = Missing()


@dataclass(frozen=True)
class Difference:
    """A field with another value than expected: the finding's name, the place, and both values.

    steer: what the key steers; None if no runtime reads it.
    """

    name: str
    file: str
    path: tuple[str, ...]
    found: Any
    expected: Any
    steer: Steer | None = None

    @property
    def where(self) -> str:
        """The place as text."""
        return f"{self.file}: {'.'.join(escape_line(key, 60) for key in self.path)}"


def check_document_fields(bundle: Scan, source: Checkpoint | None, findings: Findings) -> Check:
    """Check every field of the JSON files that is not compared by another check."""
    for one in document_differences(bundle, source):
        if is_covered(one, source, findings):
            continue
        found = short_repr(one.found)
        if one.steer is not None:
            found += f", by which {one.steer.runtime} {one.steer.effect}"
        expected = one.expected if one.expected is not MISSING else "none"
        findings.add(one.name, one.where, found, short_repr(expected))
    number = sum(len(bundle.documents[name]) for name in NAMES if name in bundle.documents)
    return Check("fields of JSON files as they should be", number)


def is_covered(one: Difference, source: Checkpoint | None, findings: Findings) -> bool:
    """Return whether another check compares this field, or has reported it."""
    if one.file == "config.json" and source is not None and is_sources(one.path[0], source, True):
        return True  # config-differs
    if CODE & {*one.path} and "config-runs-code" in findings:
        return True
    rows = COVERED.get(one.file, {})
    paths = [".".join(one.path[:length]) for length in range(len(one.path), -1, -1)]
    names = next((rows[path] for path in paths if path in rows), None)
    return names is not None and (not names or bool({*names} & findings.names))


def document_differences(bundle: Scan, source: Checkpoint | None) -> Iterator[Difference]:
    """Yield every field of the JSON files that is not as expected."""
    ours = has_own_documents(bundle)
    expected = expected_documents(bundle, source) if ours else others_documents(bundle, source)
    for name in NAMES:
        if name in bundle.documents and name in expected:
            pair = (bundle.documents[name], expected[name])
            for path, *values in differences(*(compared(name, one) for one in pair)):
                name_of = judge(bundle, source, Difference("", name, path, *values), ours)
                if name_of is not None:
                    yield name_of
    if ours:
        yield from origin_differences(bundle, source)
        yield from label_additions(bundle)


def compared(name: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a document that no other check always compares."""
    rows = COVERED[name]
    return {key: value for key, value in document.items() if rows.get(key, SAMPLING)}


def has_own_documents(bundle: Scan) -> bool:
    """Return whether convert, or upstream's converter and requantize, made the documents.

    A bundle of another maker that was repaired keeps that maker's.
    """
    if not bundle.is_ours or bundle.scheme is not STORAGE:
        return False
    shards = bundle.checkpoint.shards.values()
    if all("convert_layout" in shard.metadata for shard in shards):
        return True
    jang = bundle.documents.get(JANG, {})
    return "source_config" in jang and "variant" not in jang


def expected_documents(bundle: Scan, source: Checkpoint | None) -> dict[str, dict[str, Any]]:
    """Return the documents that this recipe writes, as far as they are known.

    Without a source jang_config.json alone, by the bundle's own config.json. An index is always
    known.
    """
    size = sum(tensor.nbytes for tensor in bundle.checkpoint.tensors.values())
    known = {INDEX: {"metadata": {"total_size": size}}}
    form = storage_format(bundle)
    if form is None or "tokenizer.json" not in bundle.documents:
        return known
    recorded = quantizer_of(bundle)
    keys = ("requantize_quantizer", "requantize_table")
    record = make_record(*(recorded.get(key, "") for key in keys))
    if not record["quantizer"]:  # the quantizer mxfp4 keeps stock shards, without a mark
        record = bundle.config.get(RECORD, {})
    origin = source or replace(bundle.checkpoint, config=own_config(bundle))
    try:
        made = written_documents(origin, bundle.checkpoint.folder, form, record)
    except UserError:
        return known
    return known | (made if source is not None else {JANG: made[JANG]})


def own_config(bundle: Scan) -> dict[str, Any]:
    """Return the bundle's config.json with one end of a sentence, as in the source."""
    config, eos = bundle.config, bundle.config.get("eos_token_id")
    return {**config, "eos_token_id": eos[0]} if isinstance(eos, list) and eos else config


def storage_format(bundle: Scan) -> StorageFormat | None:
    """Return how the bundle's experts are stored, by its quantizer's name and its tensors."""
    name = quantizer_of(bundle).get("requantize_quantizer") or recorded_quantizer(bundle.config)
    properties, choice = quantizer_properties(name), recorded_mtp(bundle.config)
    if properties.label is not None:
        return StorageFormat(properties.label, properties.keeps_source, mtp=choice)
    stacks = dict(properties.by_projection or {})
    bases = [base for base in reversed(bundle.bases) if choice != SOURCE or not is_mtp(base)]
    firsts = {} if stacks else {stack_of(base): base for base in bases}
    for stack, base in firsts.items():
        label = label_at(bundle, base)
        if label is not None:
            stacks[stack] = label
    if not stacks:
        return None
    common = most_common_label(stacks)
    return StorageFormat(common, properties.keeps_source, mixture=stacks, mtp=choice)


def others_documents(bundle: Scan, source: Checkpoint | None) -> dict[str, dict[str, Any]]:
    """Return the documents that others' are compared with: the source's, and no jang_config.json.

    Without a source the keys of config.json and generation_config.json may be the source's own.
    """
    if source is None:
        models = {k: v for k, v in bundle.config.items() if k in FIELDS - {"weight_format"}}
        return {"config.json": models, JANG: {}, TOKENIZER: {}}
    theirs = read_json_or_none(source.folder, TOKENIZER)
    known = {"config.json": source.config, JANG: {}}
    return known | ({TOKENIZER: theirs} if theirs is not None else {})


def differences(
    found: Any, expected: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield (path, found, expected) of every innermost field that differs."""
    if isinstance(found, dict) and (isinstance(expected, dict) or (expected is MISSING and found)):
        theirs = expected if isinstance(expected, dict) else {}
        for key in {**theirs, **found}:
            pair = found.get(key, MISSING), theirs.get(key, MISSING)
            yield from differences(*pair, (*path, key))
    elif found != expected or isinstance(found, bool) != isinstance(expected, bool):
        yield path, found, expected


def judge(
    bundle: Scan, source: Checkpoint | None, one: Difference, ours: bool
) -> Difference | None:
    """Return a difference with the finding's name; None for one that is no fault."""
    key, added = one.path[0], one.expected is MISSING
    if source is not None and one.file == "config.json" and is_sources(key, source, ours):
        return replace(one, name=DIFFERS)
    steer = steer_of(one.file, ".".join(one.path))
    if steer is not None and not is_harmless(bundle, one, steer):
        if not added and (ours or one.file == TOKENIZER):
            return replace(one, name=DIFFERS, steer=steer)
        if added and (steer.harmless is not None or adds_token(one)):
            return replace(one, name=STEERS, steer=steer)
    return replace(one, name=ADDITION) if ours and key not in NEUTRAL else None


def is_sources(key: str, source: Checkpoint, ours: bool) -> bool:
    """Return whether a field of config.json must be the source's; that of others may be pruned."""
    left_out = WRITTEN_FIELDS if ours else WRITTEN_FIELDS | UNUSED_FIELDS | {*COUNTS}
    return key in source.config and key not in left_out


def is_harmless(bundle: Scan, one: Difference, steer: Steer) -> bool:
    """Return whether the value found changes nothing in any runtime."""
    key, turbo = one.path[0], has_turboquant(bundle.tensors)
    if key == "weight_format":
        return one.found in ((TURBO, "mxfp4_mixed") if turbo else AFFINE)
    if key.startswith(WIDTHS):
        return not turbo
    if key.startswith("vision_") and key != "vision_config":
        return any(name.startswith("vision.") for name in bundle.tensors)
    if adds_token(one):
        texts = one.found if isinstance(one.found, list) else [one.found]
        return {*map(str, map(text_of, texts))} <= added_tokens(bundle)
    value = one.expected if one.found is MISSING else one.found  # a default may be left out
    return any(value == known and type(value) is type(known) for known in steer.harmless or ())


def adds_token(one: Difference) -> bool:
    """Return whether this is the text of a token beyond the source's in tokenizer_config.json."""
    key = one.path[0]
    is_text = key.endswith("_token") and one.path[1:] in ((), ("content",))
    many = key in ("extra_special_tokens", "additional_special_tokens")
    return one.file == TOKENIZER and one.expected is MISSING and (is_text or many)


def added_tokens(bundle: Scan) -> set[str]:
    """Return the texts of the tokens that tokenizer.json does not split."""
    entries = bundle.documents.get("tokenizer.json", {}).get("added_tokens") or ()
    return {entry["content"] for entry in entries}


def origin_differences(bundle: Scan, source: Checkpoint | None) -> Iterator[Difference]:
    """Yield what is wrong with the record of the source in jang_config.json."""
    document = bundle.documents.get(JANG, {})
    if not document:
        return
    origin, named = origin_of(document), document.get("source_model", MISSING)
    if origin is None and "source" in document:
        yield Difference(ADDITION, JANG, ("source",), document["source"], MISSING)
    expected = model_name(origin) if origin else UNRECORDED
    if named != expected:
        yield Difference(ADDITION, JANG, ("source_model",), named, expected)


def label_additions(bundle: Scan) -> Iterator[Difference]:
    """Yield the keys of config.json's labels that no label has."""
    labels = bundle.config.get("quantization")
    known = {*LABEL_KEYS, "routed_expert_bits", "routed_expert_bit_plan", "mxtq_bits"}
    for key, label in labels.items() if isinstance(labels, dict) else ():
        extra = [(key,)] if not isinstance(label, dict) and key not in known else []
        if isinstance(label, dict) and key not in known and not label.keys() <= {*LABEL_KEYS}:
            extra = [(key, one) for one in label.keys() - {*LABEL_KEYS}]
        for path in extra:
            yield Difference(ADDITION, "config.json", ("quantization", *path), "one", MISSING)


def restored(content: dict[str, Any], wrong: Iterable[Difference]) -> dict[str, Any]:
    """Return a document with these differences put right; additions without effect stay."""
    content = copy.deepcopy(content)
    for one in wrong:
        if one.name in (DIFFERS, STEERS):
            set_field(content, one.path, one.expected)
    return content


def set_field(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set one field, or remove it and the objects that become empty, if `value` is MISSING."""
    key, *rest = path
    if rest and isinstance(document.setdefault(key, {}), dict):
        set_field(document[key], tuple(rest), value)
        if value is MISSING and not document[key]:
            del document[key]
    elif rest or value is MISSING:
        document.pop(key, None)
    else:
        document[key] = copy.deepcopy(value)
