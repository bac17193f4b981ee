"""What a runtime must know to hold a conversation: stop tokens and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.model.forms import FORMS
from dsv4.stop import Stop
from dsv4.storage.checkpoint import read_json

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
STOP_TOKENS = (EOS, USER)  # a model that opens the user's turn has finished its own

# The layout of DeepSeek's own encoding, for runtimes that do not read encoding/encoding_dsv4.py:
# text of system messages bare, turns behind their markers, an answer closed by EOS, and the
# thinking block opened or closed where the answer begins.
TEMPLATE = (
    "{{- '" + BOS + "' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content -}}"
    "{%- elif message.role in ['user', 'developer'] -%}"
    "{{- '" + USER + "' + message.content -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '" + USER + "<tool_result>' + message.content + '</tool_result>' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '" + ASSISTANT + "</think>' + (message.content or '') + '" + EOS + "' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '" + ASSISTANT + "' -}}"
    "{{- '<think>' if enable_thinking | default(false) else '</think>' -}}"
    "{%- endif -%}"
)


def vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Token → id, of a tokenizer.json that is of its form."""
    ids = dict((tokenizer.get("model") or {}).get("vocab") or {})
    ids.update({entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []})
    return ids


def token_ids(folder: Path, tokens: tuple[str, ...] = STOP_TOKENS) -> list[int]:
    """The ids of `tokens` in the folder's tokenizer.json, in that order.

    Raises Stop when the tokenizer does not have one of them.
    """
    path = folder / "tokenizer.json"
    ids = vocabulary(read_json(path, FORMS[path.name]))
    missing = [token for token in tokens if token not in ids]
    if missing:
        raise Stop(f"{path}", f"no token {missing[0]}", "DeepSeek-V4's tokenizer", "run finalize")
    return [ids[token] for token in tokens]
