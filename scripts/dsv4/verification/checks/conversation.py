"""Level 1: does a message reach the model as DeepSeek's own encoder writes it, in every runtime?

What is read by whom: vMLX runs encoding/encoding_dsv4.py; mlx-vlm reads chat_template.jinja and
nothing else; transformers and mlx_lm prefer it and fall back on tokenizer_config.json, which alone
vMLX 1.3.97 reads. All of them turn text into tokens by tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dsv4.errors import UserError
from dsv4.model import defaults
from dsv4.model.chat_template import (
    CHAT_TEMPLATE,
    ENCODING,
    RELEASES,
    Conversation,
    TemplateFault,
    conversations,
    encoding_release,
    render_all,
)
from dsv4.model.json_schemas import FORMS
from dsv4.model.special_tokens import BOS, EOS, text_of, vocabulary
from dsv4.storage import limits
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.text import escape_line, short_repr
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

IN_CONFIG = "tokenizer_config.json: chat_template"
SPECIAL = "special_tokens_map.json"
# What steers the tokenizer; what stages and converters add beside it may differ.
TOKENIZER_KEYS = (
    "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token",
    "tokenizer_class", "clean_up_tokenization_spaces", "added_tokens_decoder", "legacy",
)  # fmt: skip
OURS = {"eos_token_id", "transformers_version", "_from_model_config", "bos_token_id"}
# What transformers 5 writes of a tokenizer that it loaded: a new name of the class, no word of what
# is not added, and a post-processor that puts nothing beside a text.
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
FIRST, SECOND = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
IDLE = {"type": "TemplateProcessing", "single": [FIRST], "pair": [FIRST, SECOND],
        "special_tokens": {}}  # fmt: skip


def check(bundle: Scan, source: Checkpoint | None, findings: Findings) -> list[Check]:
    """Every check of the conversation; with a source its files are compared with it."""
    release = check_encoding(bundle, source, findings)
    checks = [check_tokens(bundle, findings), check_templates(bundle, release, findings)]
    if source is not None:
        checks.append(check_against_source(bundle, source, findings))
    return checks


# ------------------------------------------------------------------------------------ the program


def check_encoding(bundle: Scan, source: Checkpoint | None, findings: Findings) -> str:
    """The file that vMLX runs: the source's, or one that is known; returns which release's it is.

    "" when it is unknown or not there.
    """
    data = read_file(bundle, ENCODING)
    if not data:
        found = "no such file" if data is None else "an empty file"
        findings.add("encoding-missing", ENCODING, found, "DeepSeek's encoding")
        return ""
    own = source.folder / ENCODING if source is not None else None
    if own is not None and own.is_file():
        if limits.read_bounded(own) != data:
            findings.add("encoding-differs", ENCODING, "other bytes than the source's", "its file")
    elif encoding_release(data) is None:
        findings.add("encoding-unknown", ENCODING, f"{len(data):,} bytes of unknown code that vMLX "
                     "will run", "a file of DeepSeek's releases")  # fmt: skip
    return encoding_release(data) or ""


def read_file(bundle: Scan, name: str) -> bytes | None:
    """A small file of the bundle; None when it is not there, or not to be read."""
    if name not in bundle.files:
        return None
    try:
        return limits.read_bounded(bundle.checkpoint.folder / name)
    except (UserError, OSError):
        return None


# ------------------------------------------------------------------------------------- the tokens


def check_tokens(bundle: Scan, findings: Findings) -> Check:
    """Token ids lie within the embedding, and all files mean the same by a special token."""
    tokenizer = bundle.documents.get("tokenizer.json")
    if tokenizer is None:
        return Check("tokens within the vocabulary", 0, optional=True)
    ids = vocabulary(tokenizer)
    size = bundle.config.get("vocab_size")
    if isinstance(size, int):
        beyond = [(name, number) for name, number in ids.items() if not 0 <= number < size]
        for name, number in beyond:
            where = f"tokenizer.json: {escape_line(name, 60)}"
            findings.add("token-out-of-range", where, f"id {short_repr(number)}", f"below {size:,}")
    check_special(bundle, ids, findings)
    return Check("tokens within the vocabulary", len(ids), optional=True)


def check_special(bundle: Scan, ids: dict[str, int], findings: Findings) -> None:
    """BOS and EOS are the same in tokenizer_config.json, special_tokens_map.json and by id."""
    for name in ("tokenizer_config.json", SPECIAL):
        document = document_of(bundle, name) or {}
        for key, token in (("bos_token", BOS), ("eos_token", EOS)):
            found = text_of(document.get(key))
            if found is not None and found != token:
                findings.add(
                    "special-token-wrong", f"{name}: {key}", short_repr(found), repr(token)
                )
    for name in ("config.json", "generation_config.json"):
        found = bundle.documents.get(name, {}).get("bos_token_id")
        if found is not None and found != ids.get(BOS):
            where = f"{name}: bos_token_id"
            findings.add("special-token-wrong", where, short_repr(found), f"{ids.get(BOS)}")


def document_of(bundle: Scan, name: str) -> dict[str, Any] | None:
    """A JSON object of the bundle, also one that no runtime needs; None when there is none."""
    if name in bundle.documents or name not in bundle.files:
        return bundle.documents.get(name)
    try:
        return read_json(bundle.checkpoint.folder / name)
    except UserError:
        return None


# ---------------------------------------------------------------------------------- the templates


def check_templates(bundle: Scan, release: str, findings: Findings) -> Check:
    """Both templates are there, are one, and make the encoder's prompts of built-in talks."""
    texts = templates(bundle)
    if CHAT_TEMPLATE not in texts:
        findings.add("chat-template-file-missing", CHAT_TEMPLATE, "none", "one")
    if IN_CONFIG not in texts and "tokenizer_config.json" in bundle.documents:
        findings.add("chat-template-missing", IN_CONFIG, "none", "one")
    if len(set(texts.values())) == 2:
        findings.add("chat-templates-differ", f"{CHAT_TEMPLATE} and {IN_CONFIG}", "two", "one text")
    number = 0
    for where, text in texts.items():
        faults = judge_template(text, release)
        number = len(conversations(release or "first"))
        for name in ("chat-template-wrong", "chat-template-incomplete"):
            mine = [fault for fault in faults if fault[0] == name]
            if mine:
                _, talk, found, expected = mine[0]
                said = f"{where}, {talk!r} ({len(mine)} of {number} conversations so)"
                findings.add(name, said, found, expected)
    return Check("conversations rendered by the templates", number * len(texts), optional=True)


def templates(bundle: Scan) -> dict[str, str]:
    """Where a template stands → its text, of the two places that runtimes read."""
    texts = {}
    data = read_file(bundle, CHAT_TEMPLATE)
    if data:
        texts[CHAT_TEMPLATE] = data.decode("utf-8", "replace")
    found = bundle.documents.get("tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list):  # transformers' several templates: one is called default
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    if isinstance(found, str) and found:
        texts[IN_CONFIG] = found
    return texts


@lru_cache(maxsize=64)
def judge_template(text: str, release: str) -> tuple[tuple[str, str, str, str], ...]:
    """(finding, talk, found, expected) of each built-in talk that a template renders otherwise.

    Without a release, those of the one that fits better. A template comes from the bundle: it is
    rendered in a process of its own, within bounds.
    """
    if not release:
        return min((judge_template(text, one) for one in RELEASES), key=len)
    talks = conversations(release)
    faults = []
    told = render_all(text, [talk for _, talk, _ in talks])
    for (name, talk, prompt), found in zip(talks, told, strict=True):
        if isinstance(found, TemplateFault):
            said = escape_line(found)
        elif found != prompt:
            said = first_difference(found, prompt)
        else:
            continue
        kind = "chat-template-incomplete" if features_used(talk) else "chat-template-wrong"
        faults.append((kind, name, said, short_repr(prompt)))
    return tuple(faults)


def first_difference(found: str, prompt: str) -> str:
    """Where a rendered prompt leaves the right one, for a reader."""
    pairs = enumerate(zip(found, prompt, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(prompt)))
    return f"{short_repr(found[max(0, at - 20) : at + 60])} at character {at:,}"


def features_used(talk: Conversation) -> set[str]:
    """What a talk asks of a template beyond plain turns: 'tools', 'thinking', 'efforts'."""
    messages = talk["messages"]
    found = set()
    if "tools" in talk or any("tools" in m or "tool_calls" in m or m.get("role") == "tool"
                              for m in messages):  # fmt: skip
        found.add("tools")
    if (
        talk.get("enable_thinking")
        or talk.get("thinking")
        or any(m.get("reasoning_content") for m in messages)
    ):
        found.add("thinking")
    if talk.get("reasoning_effort") is not None:
        found.add("efforts")
    return found


def per_runtime(bundle: Scan) -> dict[str, str]:
    """Runtime → what of a conversation reaches the model there as the encoder writes it."""
    data, texts = read_file(bundle, ENCODING), templates(bundle)
    release = encoding_release(data) if data else None
    preferred = texts.get(CHAT_TEMPLATE) or texts.get(IN_CONFIG)
    said = "DeepSeek's own program" if release else "unknown code of the bundle"
    return {
        "vMLX 1.6.81": said if data else "nothing: no encoding file",
        "vMLX 1.3.97": features_kept(texts.get(IN_CONFIG), release or ""),
        "mlx_lm, transformers": features_kept(preferred, release or ""),
        "mlx-vlm": features_kept(texts.get(CHAT_TEMPLATE), release or ""),
    }


def features_kept(text: str | None, release: str) -> str:
    """What a template keeps of the built-in talks: plain turns, tools, thinking, efforts."""
    if text is None:
        return "nothing: no template"
    lost = {name for _, name, _, _ in judge_template(text, release)}
    talks = conversations(release or "first")
    kept = {kind: True for _, talk, _ in talks for kind in features_used(talk) or {"plain turns"}}
    for name, talk, _ in talks:
        if name in lost:
            kept.update(dict.fromkeys(features_used(talk) or {"plain turns"}, False))
    words = ", ".join(f"{kind} {'yes' if yes else 'no'}" for kind, yes in kept.items())
    right = len(talks) - len(lost)
    return f"{words} ({right} of {len(talks)} conversations as the encoder writes them)"


# ------------------------------------------------------------------------------------- the source


def check_against_source(bundle: Scan, source: Checkpoint, findings: Findings) -> Check:
    """The files that make tokens of text are the source's, as far as they steer anything."""
    pairs = list(common_documents(bundle, source))
    for name, own, theirs in pairs:
        if name == "tokenizer.json" and without_idle(own) != without_idle(theirs):
            findings.add("tokenizer-differs", name, "another tokenizer", "the source's")
        elif name == "tokenizer_config.json":
            for key in TOKENIZER_KEYS:
                if key in theirs and effective_value(own, key) != effective_value(theirs, key):
                    report_key("tokenizer-config-differs", name, key, own, theirs, findings)
        elif name == SPECIAL:
            for key in {**own, **theirs}:
                if text_of(own.get(key)) != text_of(theirs.get(key)):
                    report_key("special-tokens-differ", name, key, own, theirs, findings)
        elif name == "generation_config.json":
            added = set(defaults.SAMPLING) & set(own) - set(theirs)
            wrong = [key for key in set(theirs) - OURS if own.get(key) != theirs[key]]
            wrong += [key for key in added if own[key] not in (None, defaults.SAMPLING[key])]
            for key in sorted(wrong):
                report_key("generation-config-differs", name, key, own, theirs, findings)
    return Check("files of the conversation as in the source", len(pairs), optional=True)


def without_idle(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json without a post-processor that adds nothing."""
    idle = tokenizer.get("post_processor") == IDLE
    return {**tokenizer, "post_processor": None} if idle else tokenizer


def effective_value(config: dict[str, Any], key: str) -> Any:
    """What a key of tokenizer_config.json says, or its absence."""
    found = text_of(config.get(key))
    of_class = text_of(config.get("tokenizer_class"))
    if key == "tokenizer_class":
        return CLASSES.get(found, found) if isinstance(found, str) else found
    plain_class = of_class in (*CLASSES, *CLASSES.values())
    adds = key in ("add_bos_token", "add_eos_token")
    return False if adds and plain_class and found is None else found


def common_documents(
    bundle: Scan, source: Checkpoint
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(file, the bundle's content, the source's) of the JSON files that both have."""
    for name in ("tokenizer.json", "tokenizer_config.json", SPECIAL, "generation_config.json"):
        own = document_of(bundle, name)
        if own is not None and (source.folder / name).is_file():
            yield name, own, read_json(source.folder / name, FORMS.get(name, {}))


def report_key(
    fault: str, name: str, key: str, own: dict[str, Any], theirs: dict[str, Any], findings: Findings
) -> None:
    """Report one key that is not the source's."""
    where = f"{name}: {escape_line(key, 60)}"
    findings.add(
        fault, where, short_repr(own.get(key)), f"{short_repr(theirs.get(key))} as in the source"
    )
