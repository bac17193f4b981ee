"""Render a chat template that nobody vouches for, as transformers would, within bounds.

A program of its own: chat_template.py starts it with `python -I`, so that it sees no folder of this
project, and it needs jinja2 alone. A template may loop, double a text or nest without end; so each
run has, beyond its start, a second of processor time, ten seconds on the clock, 256 MiB of address
space, and a prompt has a million characters. Processor and clock end the process by the signal's
own action, in the middle of a C function too. On Linux it ends with the process that started it;
elsewhere when it next reads or writes, or by its bounds.

macOS refuses RLIMIT_AS or hardly enforces it: there a template may take what memory it can fill in
a second.

Reads {"template": text, "talks": [variables, …]} as JSON from stdin, and writes a line of JSON for
each talk: {"prompt": text} or {"fault": sentence}.

    echo '{"template": "{{ messages[0].content }}", "talks": [{"messages": [{"content": "Hi"}]}]}' |
        .venv/bin/python -I scripts/dsv4/model/template_sandbox.py
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 1.0
WALL_SECONDS = 10
ADDRESS_SPACE = 256 << 20
PROMPT_CHARACTERS = 1_000_000
SENTENCE = 300  # characters of a fault that are worth telling


class Generation(Extension):
    """`{% generation %}`, where transformers marks what the assistant said: its body as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py, 5.23)."""
    out = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    out.filters["tojson"] = tojson
    out.globals["raise_exception"] = raise_exception
    out.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return out


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(sentence: str) -> None:
    raise TemplateError(sentence)


def set_limits() -> None:
    """Take the bounds that no template can lift again."""
    kill_with_parent()
    for signal_number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signal_number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS may refuse
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(WALL_SECONDS)
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    seconds = int(used + CPU_SECONDS) + 2  # in case that the timer is not kept
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def kill_with_parent() -> None:
    """Ask Linux for SIGKILL when the parent ends; other systems have no such request."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def rendered_or_fault(make: Callable[[], str]) -> dict[str, str]:
    """{"prompt": what `make` returns} or {"fault": why it did not}.

    A foreign template can raise anything that Python raises, so anything is a fault of it.
    """
    try:
        return {"prompt": make()}
    except MemoryError:
        return {"fault": f"it needs more than {ADDRESS_SPACE >> 20} MiB of memory"}
    except RecursionError:
        return {"fault": "it is nested too deeply"}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {str(error)[:SENTENCE]}"}


def prompt(template: Template, talk: dict[str, Any]) -> str:
    """The rendered text; raises ValueError as soon as it is too long."""
    pieces: list[str] = []
    left = PROMPT_CHARACTERS
    for piece in template.generate(**talk):
        left -= len(piece)
        if left < 0:
            raise ValueError(f"a prompt of more than {PROMPT_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> int:
    asked = json.load(sys.stdin)
    set_limits()
    compiled: list[Template] = []

    def compile_template() -> str:
        compiled.append(environment().from_string(asked["template"]))
        return ""

    broken = rendered_or_fault(compile_template)
    for talk in asked["talks"]:
        told = (
            rendered_or_fault(lambda talk=talk: prompt(compiled[0], talk)) if compiled else broken
        )
        print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
