"""Escape untrusted text before it is printed or put into HTML or Markdown.

Names, dtypes, labels and the output of servers and child processes are untrusted. They may hold
escape sequences that rewrite the terminal, marks that reverse a line, line breaks that forge an
`error:` or `passed:` line, or a megabyte of text. Everything that is printed, or shown in a model
card or a page, goes through `escape_line` first.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PART = 200  # characters of one foreign value
LINE = 2000  # characters of a whole line

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 2, 8, 8, 4
_short.maxstring = _short.maxother = _short.maxlong = PART


def escape_line(text: object, limit: int = PART) -> str:
    r"""Return one line of at most `limit` printable characters; longer text is cut in its middle.

    Escapes as `repr` does: control characters (C0, C1, NUL, line breaks), bidirectional and
    invisible marks, blanks other than the space, lone surrogates and unassigned code points.
    Printable text is unchanged.

    >>> escape_line("mlx\x1b[2K\npassed: all good")
    'mlx\\x1b[2K\\npassed: all good'
    """
    text = _truncate_middle(str(text), limit)  # first, so that a megabyte is not escaped
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return _truncate_middle(text, limit)


def _truncate_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def short_repr(value: Any) -> str:
    """Return the `repr` of any value, escaped; long lists and strings are cut.

    >>> short_repr([1, "a", None]), short_repr("a\\nb")
    ("[1, 'a', None]", "'a\\\\nb'")
    """
    return escape_line(_short.repr(value))


def join_some(names: Any, most: int = 8, separator: str = ", ") -> str:
    """Return the first `most` names in one line, and how many more there are.

    >>> join_some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return separator.join(escape_line(name) for name in names[:most]) + more


def page_text(value: Any, limit: int) -> Any:
    """Return a value for a page: text is escaped as a line, but not yet for HTML."""
    return escape_line(value, limit) if type(value) is str else value


def render_html(template: Path, limit: int, **values: Any) -> str:
    """Return the page of a jinja2 template.

    Each text is cut to `limit` characters, escaped as a line, then escaped for HTML.
    """
    from jinja2 import Environment  # imported here: it takes longer than a page

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: page_text(value, limit),
    )  # fmt: skip
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


@contextlib.contextmanager
def with_path(path: Path | str) -> Iterator[None]:
    """Add `path` to an OSError of the body that names no file.

    Errors of reading, writing and flushing an open file do not name it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def print_escaped(text: object, **options: Any) -> None:
    """Print a text with each of its lines escaped.

    Escape its parts before joining them: a line break in a part would still begin a line.
    """
    with with_path("standard output"):
        print("\n".join(escape_line(line, LINE) for line in str(text).split("\n")), **options)
