"""The markers of turns, the stop tokens, and their ids in a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model.json_schemas import FORMS
from dsv4.storage.checkpoint import read_json

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
STOP_TOKENS = (EOS, USER)  # a model that opens the user's turn has finished its own


def text_of(token: Any) -> Any:
    """Return the text of a special token, which may be an object with a content."""
    return token.get("content") if isinstance(token, dict) else token


def vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return token → id of a validated tokenizer.json."""
    ids = dict((tokenizer.get("model") or {}).get("vocab") or {})
    ids.update({entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []})
    return ids


def token_ids(folder: Path, tokens: tuple[str, ...] = STOP_TOKENS) -> list[int]:
    """Return the ids of `tokens` in a folder's tokenizer. Raises UserError for a missing one."""
    path = folder / "tokenizer.json"
    ids = vocabulary(read_json(path, FORMS[path.name]))
    missing = [token for token in tokens if token not in ids]
    if missing:
        raise UserError(
            f"{path}", f"no token {missing[0]}", "DeepSeek-V4's tokenizer", "run finalize"
        )
    return [ids[token] for token in tokens]
