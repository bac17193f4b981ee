"""Find the sampling defaults and answer limits that a bundle sets for requests without them.

| place                                     | keys             | read by                          |
|-------------------------------------------|------------------|----------------------------------|
| jang_config.json: chat.sampling_modes.…   | SAMPLING         | vMLX 1.6.81, before the next     |
| jang_config.json: chat.sampling_defaults  | SAMPLING, LIMITS | vMLX 1.6.81, before the next     |
| generation_config.json                    | SAMPLING, LIMITS | vMLX 1.6.81, transformers        |
|                                           | SAMPLING         | mlx-vlm 0.7.10, before the next  |
| config.json                               | SAMPLING         | mlx-vlm 0.7.10                   |
|                                           | LIMITS           | transformers                     |
| config.json: jang_config.chat, jang.chat  | as in the first  | vMLX without a jang_config.json  |

vMLX 1.3.97 and mlx_lm read none of them. If a bundle sets no limit, vMLX 1.6.81 ends an answer
after 16,384 tokens (vmlx_engine.server, _resolve_max_tokens), vMLX 1.3.97 after 32,768, and the
others after the tokens that `make serve` sets. No release of DeepSeek sets a limit, so one is right
only if the source's own file has it. The right sampling is that of generation_config.json.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

GENERATION = "generation_config.json"
DOCUMENTS = ("config.json", GENERATION, "jang_config.json")
LIMITS = ("max_new_tokens", "max_length")
# The value of each key that changes nothing.
SAMPLING = {
    "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "repetition_penalty_chat": 1.0, "repetition_penalty_thinking": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


def expected(generation: dict[str, Any], key: str) -> Any:
    """Return the right value of a key by generation_config.json, or the neutral one.

    None for a limit that it does not set. Without sampling the temperature is 0.
    """
    if key == "temperature" and generation.get("do_sample") is False:
        return 0.0
    general = key.removesuffix("_chat").removesuffix("_thinking")
    values = (generation.get(key), generation.get(general), SAMPLING.get(key))
    return next((value for value in values if value is not None), None)


def reference(own: dict[str, Any], source: dict[str, Any] | None) -> dict[str, Any]:
    """Return the right generation_config.json: the source's, or the bundle's own without limits."""
    return source if source is not None else {k: v for k, v in own.items() if k not in LIMITS}


def overrides(
    name: str, document: dict[str, Any], generation: dict[str, Any], source: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (object, its path, key) of every default in one of DOCUMENTS that differs.

    generation: the right generation_config.json. source: the source's document of that name, or {};
    a value that it has too is right.
    """
    for holder, place, keys in _holders(name, document):
        for key in keys:
            found = holder.get(key)
            if found is None or (holder is document and found == source.get(key)):
                continue
            if found != expected(generation, key):
                yield holder, place, key


def without_overrides(
    name: str, document: dict[str, Any], generation: dict[str, Any], source: dict[str, Any]
) -> dict[str, Any]:
    """Return a copy without `overrides`, and without a sampling_defaults that becomes empty."""
    document = copy.deepcopy(document)
    for holder, _, key in list(overrides(name, document, generation, source)):
        del holder[key]
    for chat, _ in _chats(name, document):
        if chat.get("sampling_defaults") == {}:
            del chat["sampling_defaults"]
    return document


def _holders(
    name: str, document: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], str, tuple[str, ...]]]:
    """Yield (object, its path, the keys that runtimes read from it) of one of DOCUMENTS.

    Of generation_config.json only limits are yielded, because its sampling is right.
    """
    both = (*LIMITS, *SAMPLING)
    if name != "jang_config.json":
        yield document, "", LIMITS if name == GENERATION else both
    for chat, place in _chats(name, document):
        modes = chat.get("sampling_modes")
        modes = modes if isinstance(modes, dict) else {}
        objects = {"sampling_defaults": chat.get("sampling_defaults")}
        objects |= {f"sampling_modes.{mode}": modes[mode] for mode in modes}
        for where, holder in objects.items():
            if isinstance(holder, dict):
                yield holder, f"{place}{where}.", both


def _chats(name: str, document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (chat, its path) of every object that vMLX may read as jang_config.json's `chat`."""
    places = {"config.json": ("jang_config", "jang"), "jang_config.json": ("",)}
    for key in places.get(name, ()):
        jang = document.get(key) if key else document
        chat = jang.get("chat") if isinstance(jang, dict) else None
        if isinstance(chat, dict):
            yield chat, f"{key}.chat." if key else "chat."
