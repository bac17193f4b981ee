"""Level 1: check the files that turn a conversation into tokens, for every runtime.

Every prompt must equal what DeepSeek's encoder writes. vMLX runs encoding/encoding_dsv4.py; mlx-vlm
reads only chat_template.jinja; transformers and mlx_lm prefer it and fall back to the template in
tokenizer_config.json; vMLX 1.3.97 reads only the latter. All of them tokenize by tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from dsv4.errors import UserError
from dsv4.model import defaults
from dsv4.model.chat_template import (
    CHAT_TEMPLATE,
    EFFORT_KEY,
    EFFORT_PROMPTS,
    EFFORTS,
    ENCODING,
    RELEASES,
    Conversation,
    TemplateFault,
    conversations,
    effort_holder,
    encoding_release,
    known_release,
    render_all,
)
from dsv4.model.special_tokens import BOS, EOS, text_of, vocabulary
from dsv4.storage import limits
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.documents import source_document
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

IN_CONFIG = "tokenizer_config.json: chat_template"
SPECIAL = "special_tokens_map.json"
# Keys that change the tokens of a text; keys that stages and converters add may differ.
TOKENIZER_KEYS = (
    "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token",
    "tokenizer_class", "clean_up_tokenization_spaces", "legacy",
)  # fmt: skip
# Keys of generation_config.json that may differ from the source's.
REWRITTEN_KEYS = {"eos_token_id", "transformers_version", "_from_model_config", "bos_token_id"}
# transformers 5 saves a tokenizer under another class name, without add_bos_token and add_eos_token
# that are false, and with a post-processor that adds no token.
RENAMED_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
FIRST, SECOND = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
NO_OP_PROCESSOR = {"type": "TemplateProcessing", "single": [FIRST], "pair": [FIRST, SECOND],
                   "special_tokens": {}}  # fmt: skip


def check_conversation(bundle: Scan, source: Checkpoint | None, findings: Findings) -> list[Check]:
    """Run every check of this module; with a source, compare the files with the source's."""
    release = check_encoding(bundle, source, findings)
    checks = [check_tokens(bundle, findings), check_templates(bundle, release, findings)]
    if source is not None:
        checks.append(check_against_source(bundle, source, findings))
    return checks


def check_encoding(bundle: Scan, source: Checkpoint | None, findings: Findings) -> str:
    """Check the file that vMLX runs: it is the source's, or without a source a known one.

    Returns its release, "" when it is unknown or missing.
    """
    data = read_file(bundle, ENCODING)
    if not data:
        found = "no such file" if data is None else "an empty file"
        findings.add("encoding-missing", ENCODING, found, "DeepSeek's encoding")
        return ""
    own = source.folder / ENCODING if source is not None else None
    if own is not None and own.is_file():
        if limits.read_bounded(own) != data:
            findings.add("encoding-differs", ENCODING, "other bytes", "the source's")
    elif known_release(data) is None:
        findings.add("encoding-unknown", ENCODING, f"{len(data):,} bytes of unknown code that vMLX "
                     "will run", "a file of DeepSeek's releases")  # fmt: skip
    release = encoding_release(data)
    if release is None:
        findings.add("encoding-release-unknown", ENCODING, "no effort prompt of a known release",
                     f"those of {' or '.join(EFFORT_PROMPTS.values())}")  # fmt: skip
    check_efforts(bundle, release, findings)
    return release or ""


def check_efforts(bundle: Scan, release: str | None, findings: Findings) -> None:
    """Check that jang_config.json lists the reasoning efforts of the release."""
    holder = effort_holder(bundle.documents.get("jang_config.json", {}))
    if release is None or holder is None:
        return
    levels, expected = holder[EFFORT_KEY], [*EFFORTS[release], None]
    if not isinstance(levels, list) or not all(level in levels for level in expected):
        where = f"jang_config.json: chat.reasoning.{EFFORT_KEY}"
        findings.add("effort-levels-wrong", where, short_repr(levels), short_repr(expected))


def read_file(bundle: Scan, name: str) -> bytes | None:
    """Return the content of a small file of the bundle; None when it is missing or unreadable."""
    if name not in bundle.files:
        return None
    try:
        return limits.read_bounded(bundle.checkpoint.folder / name)
    except (UserError, OSError):
        return None


def check_tokens(bundle: Scan, findings: Findings) -> Check:
    """Check that token ids lie within the embedding and that files agree on special tokens."""
    tokenizer = bundle.documents.get("tokenizer.json")
    if tokenizer is None:
        return Check("tokens within the vocabulary", 0, optional=True)
    ids = vocabulary(tokenizer)
    size = bundle.config.get("vocab_size")
    if isinstance(size, int):
        for name, number in ids.items():
            if not 0 <= number < size:
                where = f"tokenizer.json: {escape_line(name, 60)}"
                found = f"id {short_repr(number)}"
                findings.add("token-out-of-range", where, found, f"below {size:,}")
    check_special_tokens(bundle, ids, findings)
    return Check("tokens within the vocabulary", len(ids), optional=True)


def check_special_tokens(bundle: Scan, ids: dict[str, int], findings: Findings) -> None:
    """Check BOS and EOS in tokenizer_config.json and special_tokens_map.json, and BOS's id.

    The tokens that tokenizer_config.json adds must be tokenizer.json's.
    """
    for name in ("tokenizer_config.json", SPECIAL):
        document = read_document(bundle, name) or {}
        for key, token in (("bos_token", BOS), ("eos_token", EOS)):
            found = text_of(document.get(key))
            if found is not None and found != token:
                where = f"{name}: {key}"
                findings.add("special-token-wrong", where, short_repr(found), repr(token))
    added = bundle.documents.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    for key, token in added.items() if isinstance(added, dict) else ():
        right = ids.get(text) if isinstance(text := text_of(token), str) else None
        if str(right) != key:
            where = f"tokenizer_config.json: added_tokens_decoder.{escape_line(key, 60)}"
            expected = "no such entry" if right is None else f"{right}, as in tokenizer.json"
            findings.add("tokenizer-config-differs", where, short_repr(token), expected)
    for name in ("config.json", "generation_config.json"):
        found = bundle.documents.get(name, {}).get("bos_token_id")
        if found is not None and found != ids.get(BOS):
            where = f"{name}: bos_token_id"
            findings.add("special-token-wrong", where, short_repr(found), f"{ids.get(BOS)}")


def read_document(bundle: Scan, name: str) -> dict[str, Any] | None:
    """Return a JSON object of the bundle, read if `Scan` does not hold it; None without one."""
    if name in bundle.documents or name not in bundle.files:
        return bundle.documents.get(name)
    try:
        return read_json(bundle.checkpoint.folder / name)
    except UserError:
        return None


def check_templates(bundle: Scan, release: str, findings: Findings) -> Check:
    """Check that both templates exist, are equal, and render what the encoder of `release` writes.

    They are rendered with the built-in conversations.
    """
    texts = template_texts(bundle)
    if CHAT_TEMPLATE not in texts:
        findings.add("chat-template-file-missing", CHAT_TEMPLATE, "none", "one")
    if IN_CONFIG not in texts and "tokenizer_config.json" in bundle.documents:
        findings.add("chat-template-missing", IN_CONFIG, "none", "one")
    if len(set(texts.values())) == 2:
        findings.add("chat-templates-differ", f"{CHAT_TEMPLATE} and {IN_CONFIG}", "two", "one text")
    number = len(conversations(release or "first"))
    for where, text in texts.items():
        faults = template_faults(text, release)
        for name in ("chat-template-wrong", "chat-template-incomplete"):
            same = [fault for fault in faults if fault[0] == name]
            if same:
                _, conversation, found, expected = same[0]
                which = f"{where}, {conversation!r} ({len(same)} of {number} conversations)"
                findings.add(name, which, found, expected)
    return Check("conversations rendered by the templates", number * len(texts), optional=True)


def template_texts(bundle: Scan) -> dict[str, str]:
    """Return CHAT_TEMPLATE and IN_CONFIG → the template's text, of those that exist."""
    texts = {}
    data = read_file(bundle, CHAT_TEMPLATE)
    if data:
        texts[CHAT_TEMPLATE] = data.decode("utf-8", "replace")
    found = bundle.documents.get("tokenizer_config.json", {}).get("chat_template")
    if isinstance(found, list):  # several templates, one of them named default
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[0].get("template") if named else None
    if isinstance(found, str) and found:
        texts[IN_CONFIG] = found
    return texts


@lru_cache(maxsize=64)
def template_faults(text: str, release: str) -> tuple[tuple[str, str, str, str], ...]:
    """Return (finding, conversation, found, expected) of each wrong prompt of a template.

    It renders the built-in conversations. With release "", the release with the fewest faults
    counts. The template is untrusted: `render_all` renders it in a child process with limits.
    """
    if not release:
        return min((template_faults(text, known) for known in RELEASES), key=len)
    examples = conversations(release)
    faults = []
    rendered = render_all(text, [conversation for _, conversation, _ in examples])
    for (name, conversation, prompt), found in zip(examples, rendered, strict=True):
        if isinstance(found, TemplateFault):
            difference = escape_line(found)
        elif found != prompt:
            difference = first_difference(found, prompt)
        else:
            continue
        plain = not features_used(conversation)
        finding = "chat-template-wrong" if plain else "chat-template-incomplete"
        faults.append((finding, name, difference, short_repr(prompt)))
    return tuple(faults)


def first_difference(found: str, prompt: str) -> str:
    """Return where a rendered prompt first differs from the right one, and the text there."""
    pairs = enumerate(zip(found, prompt, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(prompt)))
    return f"{short_repr(found[max(0, at - 20) : at + 60])} at character {at:,}"


def features_used(conversation: Conversation) -> set[str]:
    """Return the features that a conversation uses: 'tools', 'thinking', 'efforts'."""
    messages = conversation["messages"]
    found = set()
    if "tools" in conversation or any(
        "tools" in m or "tool_calls" in m or m.get("role") == "tool" for m in messages
    ):
        found.add("tools")
    thinking = conversation.get("enable_thinking") or conversation.get("thinking")
    if thinking or any(m.get("reasoning_content") for m in messages):
        found.add("thinking")
    if conversation.get("reasoning_effort") is not None:
        found.add("efforts")
    return found


def features_by_runtime(bundle: Scan) -> dict[str, str]:
    """Return runtime → the features whose prompts are the encoder's there, as text."""
    data, texts = read_file(bundle, ENCODING), template_texts(bundle)
    release = (encoding_release(data) if data else None) or ""
    preferred = texts.get(CHAT_TEMPLATE) or texts.get(IN_CONFIG)
    program = "DeepSeek's encoder" if release else "unknown code in the bundle"
    return {
        "vMLX 1.6.81": program if data else "nothing: no encoding file",
        "vMLX 1.3.97": describe_features(texts.get(IN_CONFIG), release),
        "mlx_lm, transformers": describe_features(preferred, release),
        "mlx-vlm": describe_features(texts.get(CHAT_TEMPLATE), release),
    }


def describe_features(text: str | None, release: str) -> str:
    """Return which features a template renders right, as text: "plain turns yes, tools no …"."""
    if text is None:
        return "nothing: no template"
    wrong = {name for _, name, _, _ in template_faults(text, release)}
    examples = conversations(release or "first")
    right: dict[str, bool] = {}
    for name, conversation, _ in examples:
        for feature in features_used(conversation) or {"plain turns"}:
            right[feature] = right.get(feature, True) and name not in wrong
    features = ", ".join(f"{feature} {'yes' if ok else 'no'}" for feature, ok in right.items())
    number = f"{len(examples) - len(wrong)} of {len(examples)}"
    return f"{features} ({number} conversations as the encoder writes them)"


def check_against_source(bundle: Scan, source: Checkpoint, findings: Findings) -> Check:
    """Compare the files that turn text into tokens with the source's, by the keys that matter."""
    pairs = list(common_documents(bundle, source))
    for name, own, theirs in pairs:
        if name == "tokenizer.json" and without_no_op(own) != without_no_op(theirs):
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
            wrong = [key for key in set(theirs) - REWRITTEN_KEYS if own.get(key) != theirs[key]]
            wrong += [key for key in added if own[key] not in (None, defaults.SAMPLING[key])]
            for key in sorted(wrong):
                report_key("generation-config-differs", name, key, own, theirs, findings)
    return Check("files of the conversation as in the source", len(pairs), optional=True)


def without_no_op(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json without a post-processor that adds no token."""
    no_op = tokenizer.get("post_processor") == NO_OP_PROCESSOR
    return {**tokenizer, "post_processor": None} if no_op else tokenizer


def effective_value(config: dict[str, Any], key: str) -> Any:
    """Return a key of tokenizer_config.json, or its default, as transformers 5 writes it."""
    found = text_of(config.get(key))
    class_name = text_of(config.get("tokenizer_class"))
    if key == "tokenizer_class":
        return RENAMED_CLASSES.get(found, found) if isinstance(found, str) else found
    defaults_to_false = class_name in (*RENAMED_CLASSES, *RENAMED_CLASSES.values())
    if key in ("add_bos_token", "add_eos_token") and defaults_to_false and found is None:
        return False
    return found


def common_documents(
    bundle: Scan, source: Checkpoint
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (file, the bundle's content, the source's) of the JSON files that both have."""
    for name in ("tokenizer.json", "tokenizer_config.json", SPECIAL, "generation_config.json"):
        own = read_document(bundle, name)
        theirs = source_document(source, name) if own is not None else None
        if own is not None and theirs is not None:
            yield name, own, theirs


def report_key(
    fault: str, name: str, key: str, own: dict[str, Any], theirs: dict[str, Any], findings: Findings
) -> None:
    """Report one key whose value is not the source's."""
    where = f"{name}: {escape_line(key, 60)}"
    findings.add(
        fault, where, short_repr(own.get(key)), f"{short_repr(theirs.get(key))} as in the source"
    )
