"""What is said of foreign values, so that they cannot say anything themselves.

A name, a dtype, a label, an answer of a server or of a child comes from a file or a process that
somebody else made. It may hold escape sequences that rewrite the terminal, marks that turn a line
around, line breaks that forge an `error:` or `passed:` of their own, or a megabyte. Whatever is
printed, and whatever a model card or a page shows, goes through `plain` first.
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
    r"""One line of at most `limit` printable characters; what is longer is cut in its middle.

    Escaped, as Python writes them: control characters (C0, C1, NUL, line breaks), marks that turn
    or hide text, blanks other than the space, half of a surrogate pair, code points without a
    character. What is plain already stays as it is.

    >>> plain("mlx\x1b[2K\npassed: all good")
    'mlx\\x1b[2K\\npassed: all good'
    """
    text = _truncate_middle(
        str(text), limit
    )  # before anything is escaped: a megabyte costs nothing
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return _truncate_middle(text, limit)


def _truncate_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def short_repr(value: Any) -> str:
    """A value of any type, as Python writes it: strings in quotes, long lists and strings cut.

    >>> shown([1, "a", None]), shown("a\\nb")
    ("[1, 'a', None]", "'a\\\\nb'")
    """
    return escape_line(_short.repr(value))


def join_some(names: Any, most: int = 8) -> str:
    """Some names in one line, the first of them and how many more there are.

    >>> several(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(escape_line(name) for name in names[:most]) + more


def page_text(value: Any, limit: int) -> Any:
    """What a page shows of a value: text made plain; whoever makes HTML of it still escapes it."""
    return escape_line(value, limit) if type(value) is str else value


def render_html(template: Path, limit: int, **values: Any) -> str:
    """A page of HTML: a jinja2 template, in which each text is plain, at most `limit` characters of
    it, and then escaped.
    """
    from jinja2 import Environment  # here: importing it takes longer than a page

    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: page_text(value, limit),
    )  # fmt: skip
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)


@contextlib.contextmanager
def with_path(path: Path | str) -> Iterator[None]:
    """Give an operating-system error of the body the path that it is about, if it names none.

    Reading, writing and flushing by a file that is open do not say which file it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def print_escaped(text: object, **options: Any) -> None:
    """Print the lines of a text, each of them plain. Its parts must be plain before they are
    joined: a line break in one of them would still begin a line.
    """
    with with_path("standard output"):
        print("\n".join(escape_line(line, LINE) for line in str(text).split("\n")), **options)
