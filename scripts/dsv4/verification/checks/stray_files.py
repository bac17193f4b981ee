"""Level 1: check small files beside the documents that could steer a runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model.chat_template import ENCODING
from dsv4.model.runtime_documents import TOKENIZER
from dsv4.model.special_tokens import text_of, vocabulary
from dsv4.storage import limits
from dsv4.storage.checkpoint import Checkpoint, read_json
from dsv4.storage.system_files import is_system_file
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.conversation import SPECIAL
from dsv4.verification.checks.document_fields import added_tokens
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

ADDED = "added_tokens.json"


def check_stray_files(bundle: Scan, source: Checkpoint | None, findings: Findings) -> Check:
    """Check special_tokens_map.json, added_tokens.json, and programs beside the encoding file."""
    for name, where, found in strays(bundle, source):
        unknown = source is None and is_program(name)
        fault = "encoding-unknown" if unknown else "document-steers"
        findings.add(fault, where, found, "none, or the source's")
    names = [name for name in bundle.files if name in (SPECIAL, ADDED) or is_program(name)]
    return Check("further files that steer a conversation", len(names), optional=True)


def strays(bundle: Scan, source: Checkpoint | None) -> Iterator[tuple[str, str, str]]:
    """Yield (file, place in it, what was found) of each file that the source lacks."""
    for name in (SPECIAL, ADDED):
        path = source.folder / name if source is not None else None
        if name in bundle.files and not (path is not None and path.is_file()):
            for key, value in wrong_tokens(bundle, name):
                found = f"{short_repr(value)}, which adds or changes a token in transformers"
                yield name, f"{name}: {escape_line(key, 60)}", found
    theirs = source.folder if source is not None else None
    for name in filter(is_program, bundle.files):
        if theirs is None or read_small(theirs / name) != read_small(
            bundle.checkpoint.folder / name
        ):
            yield name, name, f"{bundle.files[name]:,} bytes of code beside {ENCODING}"


def is_program(name: str) -> bool:
    """Return whether a file is a program beside the encoding file."""
    program = name.startswith("encoding/") and name.endswith(".py") and name != ENCODING
    return program and not is_system_file(name)


def wrong_tokens(bundle: Scan, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of one of these files that are not the tokenizer's tokens."""
    try:
        document = read_json(bundle.checkpoint.folder / name)
    except UserError as stop:
        yield "", f"{stop}"
        return
    ids, special = vocabulary(bundle.documents.get("tokenizer.json", {})), added_tokens(bundle)
    own = bundle.documents.get(TOKENIZER, {})
    for key, value in document.items():
        texts = [text_of(one) for one in (value if isinstance(value, list) else [value])]
        if name == ADDED:
            right = ids.get(key) == value
        else:
            right = all(isinstance(text, str) and text in special for text in texts)
            right &= key not in own or text_of(own[key]) == text_of(value)
        if not right:
            yield key, value


def read_small(path: Path) -> bytes | None:
    """Return the content of a small file; None when it is missing or unreadable."""
    try:
        return limits.read_bounded(path) if path.is_file() else None
    except (UserError, OSError):
        return None
