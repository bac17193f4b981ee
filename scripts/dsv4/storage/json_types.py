"""Validate the types of JSON values.

A form looks like the values: a type; a tuple of forms, one of which must match; `[form]`, a list;
`{str: form}`, an object with any keys; `{"key": form, "other?": form}`, an object with these keys,
of which "other" may be missing. Additional keys are allowed. `None` is null. Numbers must be finite
and fit 64 bits. True is no number.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.text import escape_line, short_repr

Form = Any
OBJECT: Form = {}  # any keys
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", None: "null"}


def first_mismatch(value: Any, form: Form, where: str = "") -> tuple[str, str, str] | None:
    """Return (where, found, expected) of the first part that does not match, None if all do.

    >>> first_mismatch({"a": [1, "x"]}, {"a": [int]})
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
    """Return the value. Raises UserError when a part of it does not match its form."""
    if odd := first_mismatch(value, form):
        where, found, expected = odd
        raise UserError(f"{path}: {where}" if where else f"{path}", found, expected, todo)
    return value


def describe_schema(form: Form) -> str:
    """Return a form in words."""
    if isinstance(form, (list, dict)):
        return "a list" if isinstance(form, list) else "an object"
    return " or ".join(map(describe_schema, form)) if isinstance(form, tuple) else NAMES[form]


class Missing:
    """The value of a missing key, for messages."""

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
