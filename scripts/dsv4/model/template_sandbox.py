"""Render an untrusted chat template as transformers does, within limits.

chat_template.py starts this program with `python -I`, so that it imports nothing of the project; it
needs jinja2 only. A template may loop, double a text or nest without end. So each run is limited to
a second of processor time after its start, ten seconds of wall time, 256 MiB of address space and
prompts of a million characters. Signals with their default action enforce both times, so they end a
C function too. On Linux the process ends with its parent; elsewhere at its next read or write, or
at a limit.

macOS refuses RLIMIT_AS or hardly enforces it: there a template may fill memory for a second.

Reads {"template": text, "conversations": [variables, …]} as JSON from stdin. Writes a line of JSON
for each conversation: {"prompt": text} or {"fault": sentence}.

    echo '{"template": "{{ messages[0].content }}",
           "conversations": [{"messages": [{"content": "Hi"}]}]}' |
        .venv/bin/python -I scripts/dsv4/model/template_sandbox.py
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
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
SENTENCE = 300  # characters of a fault


class Generation(Extension):
    """Render the body of `{% generation %}`, which marks answers for transformers, as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """Return the Jinja environment of transformers 5.23 (utils/chat_template_utils.py)."""
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
    """Return JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


def raise_exception(sentence: str) -> None:
    raise TemplateError(sentence)


def set_limits() -> None:
    """Set the limits. A template cannot lift them again."""
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
    """Return {"prompt": the result of `make`} or {"fault": the reason why it has none}.

    An untrusted template can raise any exception, so all of them are faults of the template.
    """
    try:
        return {"prompt": make()}
    except MemoryError:
        return {"fault": f"it needs more than {ADDRESS_SPACE >> 20} MiB of memory"}
    except RecursionError:
        return {"fault": "it is nested too deeply"}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {str(error)[:SENTENCE]}"}


def prompt(template: Template, conversation: dict[str, Any]) -> str:
    """Render a conversation. Raises ValueError as soon as the text is too long."""
    pieces: list[str] = []
    left = PROMPT_CHARACTERS
    for piece in template.generate(**conversation):
        left -= len(piece)
        if left < 0:
            raise ValueError(f"a prompt of more than {PROMPT_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def main() -> int:
    request = json.load(sys.stdin)
    set_limits()
    compile_template = functools.cache(environment().from_string)
    for conversation in request["conversations"]:
        answer = rendered_or_fault(
            lambda variables=conversation: prompt(compile_template(request["template"]), variables)
        )
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
