"""Schemas of the JSON documents of a checkpoint (see dsv4/storage/json_types.py).

They cover the types of the values that are read. Missing keys and wrong values are found elsewhere.
"""

from __future__ import annotations

import re
from typing import Any

from dsv4.storage.checkpoint import INDEX
from dsv4.storage.json_types import OBJECT, Form, first_mismatch

ORIGIN = {"repo": str, "commit": str, "files": {str: {str: str}}}

FORMS: dict[str, Form] = {
    **dict.fromkeys(("config.json", INDEX, "tokenizer_config.json"), OBJECT),
    **dict.fromkeys(("generation_config.json", "jang_config.json"), OBJECT),
    "tokenizer.json": {
        "model?": ({"vocab?": ({str: int}, None)}, None),
        "added_tokens?": ([{"content": str, "id": int}], None),
    },
}


def origin_of(document: dict[str, Any]) -> dict[str, Any] | None:
    """Return the source's origin by jang_config.json; None unless it is fit for publication.

    {"repo": user/name, "commit": hex digits, "files": {name: {kind of hash: hex digits}}}.
    """
    origin = document.get("source")
    if origin is None or first_mismatch(origin, ORIGIN) is not None:
        return None
    hashes = [digest for of in origin["files"].values() for digest in of.values()]
    names = re.fullmatch(r"[A-Za-z0-9_.-]{1,96}/[A-Za-z0-9_.-]{1,96}", origin["repo"])
    whole = all(re.fullmatch(r"[0-9a-f]{1,64}", digit) for digit in (origin["commit"], *hashes))
    return origin if names and whole and all(origin["files"].values()) else None
