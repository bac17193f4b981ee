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

from dsv4.errors import UserError
from dsv4.text import escape_line, short_repr

Form = Any
OBJECT: Form = {}  # whose keys are nobody's business
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}


def first_mismatch(value: Any, form: Form, where: str = "") -> tuple[str, str, str] | None:
    """(where, found, expected) of the first part that is not of its form; None when all are.

    >>> misfit({"a": [1, "x"]}, {"a": [int]})
    ('a[1]', "'x'", 'a whole number')
    """
    if isinstance(form, tuple):
        if any(first_mismatch(value, one, where) is None for one in form):
            return None
        odd = [first_mismatch(value, one, where) for one in form if _same_type(value, one)]
        return (
            odd[0] if odd else (where, short_repr(value), " or ".join(map(describe_schema, form)))
        )
    if isinstance(form, (list, dict)):
        if not isinstance(value, type(form)):
            return where, short_repr(value), describe_schema(form)
        parts = _in_list(value, form) if isinstance(form, list) else _in_object(value, form)
        found = (first_mismatch(part, of, f"{where}{step}".lstrip(".")) for step, part, of in parts)
        return next((one for one in found if one is not None), None)
    return None if _has_type(value, form) else (where, short_repr(value), describe_schema(form))


def validate(path: Path | str, value: Any, form: Form, todo: str) -> Any:
    """The value itself. Raises UserError when a part of it is not of its form."""
    if odd := first_mismatch(value, form):
        where, found, expected = odd
        raise UserError(f"{path}: {where}" if where else f"{path}", found, expected, todo)
    return value


def describe_schema(form: Form) -> str:
    """A form in words."""
    if isinstance(form, (list, dict)):
        return "a list" if isinstance(form, list) else "an object"
    return " or ".join(map(describe_schema, form)) if isinstance(form, tuple) else NAMES[form]


class Missing:
    """Stands for the value of a key that is not there."""

    def __repr__(self) -> str:
        return "nothing"


def _in_list(value: list, form: list) -> list[tuple[str, Any, Form]]:
    return [(f"[{i}]", part, form[0]) for i, part in enumerate(value)]


def _in_object(value: dict, form: dict) -> list[tuple[str, Any, Form]]:
    if str in form:
        return [(f"[{short_repr(key)}]", part, form[str]) for key, part in value.items()]
    parts = []
    for key, of in form.items():
        name = key.removesuffix("?")
        if name in value or name == key:
            parts.append((f".{escape_line(name)}", value.get(name, Missing()), of))
    return parts


def _has_type(value: Any, form: Form) -> bool:
    if form is None:
        return value is None
    if form in (int, float) and isinstance(value, int) and not isinstance(value, bool):
        return -(2**63) <= value < 2**63
    if form is float:
        return isinstance(value, float) and math.isfinite(value)
    return type(value) is form


def _same_type(value: Any, form: Form) -> bool:
    return isinstance(form, (list, dict)) and isinstance(value, type(form))
