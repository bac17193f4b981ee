"""Documents of the types that their readers count on.

A form is written as the values look: a type; a tuple of forms, one of which holds; `[form]`, a list
of such; `{str: form}`, an object of any keys; `{"key": form, "other?": form}`, an object that has
these keys, of which "other" may be missing; further keys are nobody's business. `None` is null.
Numbers are finite and fit 64 bits, True is no number.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsv4.stop import Stop
from dsv4.words import plain, shown

Form = Any
OBJECT: Form = {}  # whose keys are nobody's business
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}


def misfit(value: Any, form: Form, where: str = "") -> tuple[str, str, str] | None:
    """(where, found, expected) of the first part that is not of its form; None when all are.

    >>> misfit({"a": [1, "x"]}, {"a": [int]})
    ('a[1]', "'x'", 'a whole number')
    """
    if isinstance(form, tuple):
        if any(misfit(value, one, where) is None for one in form):
            return None
        odd = [misfit(value, one, where) for one in form if _same_kind(value, one)]
        return odd[0] if odd else (where, shown(value), " or ".join(map(named, form)))
    if isinstance(form, (list, dict)):
        if not isinstance(value, type(form)):
            return where, shown(value), named(form)
        parts = _in_list(value, form) if isinstance(form, list) else _in_object(value, form)
        found = (misfit(part, of, f"{where}{step}".lstrip(".")) for step, part, of in parts)
        return next((one for one in found if one is not None), None)
    return None if _is(value, form) else (where, shown(value), named(form))


def fit(path: Path | str, value: Any, form: Form, todo: str) -> Any:
    """The value itself. Raises Stop when a part of it is not of its form."""
    if odd := misfit(value, form):
        where, found, expected = odd
        raise Stop(f"{path}: {where}" if where else f"{path}", found, expected, todo)
    return value


def named(form: Form) -> str:
    """A form in words."""
    if isinstance(form, (list, dict)):
        return "a list" if isinstance(form, list) else "an object"
    return " or ".join(map(named, form)) if isinstance(form, tuple) else NAMES[form]


class Missing:
    """Stands for the value of a key that is not there."""

    def __repr__(self) -> str:
        return "nothing"


def _in_list(value: list, form: list) -> list[tuple[str, Any, Form]]:
    return [(f"[{i}]", part, form[0]) for i, part in enumerate(value)]


def _in_object(value: dict, form: dict) -> list[tuple[str, Any, Form]]:
    if str in form:
        return [(f"[{shown(key)}]", part, form[str]) for key, part in value.items()]
    parts = []
    for key, of in form.items():
        name = key.removesuffix("?")
        if name in value or name == key:
            parts.append((f".{plain(name)}", value.get(name, Missing()), of))
    return parts


def _is(value: Any, form: Form) -> bool:
    if form is None:
        return value is None
    if form in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    if form is float:
        return isinstance(value, float) and math.isfinite(value)
    return type(value) is form


def _same_kind(value: Any, form: Form) -> bool:
    return isinstance(form, (list, dict)) and isinstance(value, type(form))
