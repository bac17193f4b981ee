"""Find the keys of a bundle's documents that make a runtime answer otherwise, by asking it again.

Keys are put back as in the right documents, half of the suspects at a time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

Documents = dict[str, Any]  # file → JSON value, or text for a file that is not JSON
Answers = dict[str, Any]  # question → answer, as JSON has it
Change = tuple[str, tuple[str, ...]]  # a file and the path of a key in it; (): the whole file
SHOWN = 200  # characters of a value
WHOLE = ("tokenizer.json",)  # put back as a whole: it has 130,000 entries


def changes(own: Any, right: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every innermost key in which two JSON values differ."""
    if own and isinstance(own, dict) and (right is None or isinstance(right, dict)):
        for key in {**own, **(right or {})}:
            yield from changes(own.get(key), (right or {}).get(key), (*path, key))
    elif own != right:
        yield path


def document_changes(own: Documents, right: Documents) -> list[Change]:
    """Return the innermost keys in which documents differ, file by file."""
    found: list[Change] = []
    for name in sorted({*own, *right}):
        pair = own.get(name), right.get(name)
        if pair[0] == pair[1]:
            continue
        paths = [()] if name in WHOLE or pair[0] is None else changes(*pair)
        found += [(name, path) for path in paths]
    return found


def put_back(own: Documents, right: Documents, some: list[Change]) -> Documents:
    """Return the documents with some keys as in the right ones; what becomes empty is left out."""
    made = copy.deepcopy(own)
    for name, path in some:
        restore(made, right, (name, *path))
    return made


def restore(own: Any, right: Any, path: tuple[str, ...]) -> None:
    """Set one key as in `right`, or remove it with the objects that it leaves empty."""
    key, *rest = path
    theirs = right.get(key) if isinstance(right, dict) else None
    if not rest or not isinstance(own.get(key), dict):
        own[key] = copy.deepcopy(theirs)
    else:
        restore(own[key], theirs, tuple(rest))
    if own[key] is None or (own[key] == {} and theirs is None):
        del own[key]


class Search:
    """The search for the keys that make the answers about a bundle differ.

    ask: documents → answers; left: how often it may still be asked; own, right: the documents.
    """

    def __init__(
        self, ask: Callable[[Documents], Answers], left: int, own: Documents, right: Documents
    ) -> None:
        self.ask, self.left, self.first, self.own, self.right = ask, left, own, own, right
        self.changes = document_changes(own, right)

    def is_mended(self, what: str, expected: Any, number: int) -> bool:
        """Return whether an answer is right with the first `number` changes put back."""
        self.left -= 1
        answers = self.ask(put_back(self.own, self.right, self.changes[:number]))
        return answers.get(what) == expected

    def find_cause(self, what: str, expected: Any) -> Change | None:
        """Return a key that has to be put back for the right answer, and forget it; or None."""
        low, high = 0, len(self.changes)
        if not high or not self.is_mended(what, expected, high):
            return None
        while high - low > 1 and self.left > 0:
            middle = (low + high) // 2
            low, high = (low, middle) if self.is_mended(what, expected, middle) else (middle, high)
        return self.changes.pop(high - 1) if high - low == 1 else None

    def causes(self, answers: Answers, expected: Answers) -> dict[str, list[dict[str, Any]]]:
        """Return question → the keys that change its answer."""
        found: dict[str, list[dict[str, Any]]] = {}
        while wrong := differing_keys(answers, expected):
            cause = self.find_cause(wrong[0], expected.get(wrong[0])) if self.left > 0 else None
            if cause is None:
                break
            self.left -= 1
            before, self.own = answers, put_back(self.own, self.right, [cause])
            answers = self.ask(self.own)
            for what in wrong:
                if answers.get(what) != before.get(what):
                    found.setdefault(what, []).append(self.describe(cause))
        return found

    def describe(self, cause: Change) -> dict[str, Any]:
        """Return a key and its value as {"file", "path", "value"}."""
        name, path = cause
        value: Any = self.first.get(name)
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return {"file": name, "path": path, "value": shorten(value) if path else ""}


def differing_keys(answers: Answers, expected: Answers) -> list[str]:
    """Return the questions whose answer is not the expected one."""
    return [what for what in {**expected, **answers} if answers.get(what) != expected.get(what)]


def shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
