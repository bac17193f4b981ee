"""Give DeepSeek-V4's chat template, and render untrusted templates in a child process.

DeepSeek ships a program, encoding/encoding_dsv4.py, and no template; vMLX runs the program, others
read chat_template.jinja or tokenizer_config.json alone. chat_template.jinja beside this file makes
the same prompts. The releases differ in one table, the efforts, so a template is made for one.

conversations.json holds conversations that together cover every rule, and the prompts that
DeepSeek's own program made of them. A bundle's template must make the same prompts.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dsv4.storage import limits

HERE = Path(__file__).resolve().parent
SANDBOX = HERE / "template_sandbox.py"
RELEASES = ("first", "0731", "nano")
# SHA-256 of encoding_dsv4.py from its first line that is neither empty nor a comment on: vMLX's
# copy of -0731's has the licence above it. The file of DeepSeek's first release has nothing above.
DIGESTS = {
    "bdbd57c132a1b3725042323d02b98b9d1df28e5f388f134399555d041f5055e0": "first",
    "abc0d26120250dda0ae077dc64aa28836026e61e970854aaeb792445e6a0dde6": "0731",
    "68ba6b13de5573bf47f0b5d34c2ab4ce3c1a20ca78cfc236517465b7c0d9a7a2": "nano",
}
# SHA-256 of the prompts that encoding_dsv4.py puts before a conversation by reasoning_effort, and
# the first release that has them.
EFFORT_PROMPTS = {
    "a3cd6069381bb93989d04e9f7eae56d24b061cda9f6ccddee3a84674ec022c86": "first",
    "d7857bd10b5f328f87705bb8733359219009286bf16fc1f31938a60814724f2e": "0731",
}
# The values of reasoning_effort that each release knows.
EFFORT_KEY = "reasoning_effort_levels"  # of jang_config.json, in chat.reasoning
EFFORTS = {"first": ("max", "high"), "0731": ("max", "high", "low"), "nano": ("max", "high")}
# The template that this project wrote into bundles before: 15 lines, and nothing with tools.
EARLIER = "d58d60fe1ad797462b902cd78b44f0805692adf7f9094042417e6296dcb9cd7e"
ENCODING = "encoding/encoding_dsv4.py"
CHAT_TEMPLATE = "chat_template.jinja"
RELEASE_LINE = "{%- set release = '0731' -%}"
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
WALL_SECONDS = 15  # template_sandbox.py ends itself before
SIGNALS = {
    signal.SIGPROF: "it takes more than a second of processor time",
    signal.SIGXCPU: "it takes more than a second of processor time",
    signal.SIGALRM: "it takes more than ten seconds",
    signal.SIGKILL: "it was killed, as by a system that is short of memory",
}

Conversation = dict[str, Any]  # a template's variables: messages, tools, …


class TemplateFault(Exception):
    """A template that does not compile, raises, or exceeds its limits; its text says which."""


def encoding_release(encoding: bytes) -> str | None:
    """Return which of RELEASES an encoding_dsv4.py belongs to; None if nothing tells.

    A known file tells by its bytes, another one by the prompts in its constants: a copy may have
    other comments, or more functions. The program is not run.
    """
    return known_release(encoding) or _release_by_constants(encoding)


def known_release(encoding: bytes) -> str | None:
    """Return the release of a known file, byte for byte but for comments above; else None."""
    lines = encoding.splitlines(keepends=True)
    above = next((n for n, line in enumerate(lines) if line.strip() and line[:1] != b"#"), 0)
    for program in (encoding, b"".join(lines[above:])):
        if release := DIGESTS.get(hashlib.sha256(program).hexdigest()):
            return release
    return None


def _release_by_constants(encoding: bytes) -> str | None:
    """Return the release by the texts that the program assigns at its top level, else None."""
    try:
        body = ast.parse(encoding).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    found = set()
    for statement in body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.strip().encode("utf-8", "surrogatepass")
                found.add(EFFORT_PROMPTS.get(hashlib.sha256(text).hexdigest()))
    return "0731" if "0731" in found else "first" if "first" in found else None


def effort_holder(jang_config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the object of jang_config.json that lists the reasoning efforts, if there is one."""
    holder: Any = jang_config
    for key in ("chat", "reasoning"):
        holder = holder.get(key) if isinstance(holder, dict) else None
    return holder if isinstance(holder, dict) and EFFORT_KEY in holder else None


@cache
def template_text(release: str) -> str:
    """Return chat_template.jinja for one of RELEASES; raises KeyError for another."""
    if release not in RELEASES:
        raise KeyError(release)
    text = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    before, line, after = text.partition(RELEASE_LINE)
    assert line, f"chat_template.jinja: no line {RELEASE_LINE}"
    return before + line.replace("0731", release) + after


def folder_release(folder: Path) -> str | None:
    """Return the release of a folder's encoding file; None if that is missing or unknown."""
    path = folder / ENCODING
    return encoding_release(limits.read_bounded(path)) if path.is_file() else None


def template_for(folder: Path, release: str = "") -> str:
    """Return the template of `release`, or of the folder's encoding file; unknown: the first's."""
    return template_text(release or folder_release(folder) or "first")


def is_own_template(text: object) -> bool:
    """Return whether this project wrote the template: now or earlier, for any release."""
    if not isinstance(text, str):
        return False
    earlier = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() == EARLIER
    return earlier or text in map(template_text, RELEASES)


@cache
def conversations(release: str) -> tuple[tuple[str, Conversation, str], ...]:
    """Return (name, conversation, prompt) of each built-in conversation that `release` supports."""
    stored = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    return tuple(
        (entry["name"], entry["conversation"], entry["prompts"][release])
        for entry in stored
        if release in entry["prompts"]
    )


def render_all(text: str, conversations: Sequence[Conversation]) -> list[str | TemplateFault]:
    """Return the prompt of each conversation, or the fault of the template; raise nothing.

    One process renders all of them within the limits of template_sandbox.py. Its start takes 0.2 s;
    a hostile template costs one second more. If a conversation ends the process, the later ones get
    the same fault.
    """
    request = json.dumps({"template": text, "conversations": list(conversations)})
    child = subprocess.Popen(
        [sys.executable, "-I", str(SANDBOX)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"LC_ALL": "C", **{k: os.environ[k] for k in KEPT_ENVIRONMENT if k in os.environ}},
    )
    try:
        out, _ = child.communicate(request.encode(), timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        out, _ = child.communicate()
    finally:
        child.kill()
        child.wait()
    prompts = [parse_line(line) for line in out.splitlines(keepends=True) if line.endswith(b"\n")]
    number, rest = len(conversations), TemplateFault(describe_exit(child.returncode))
    return [*prompts, *[rest] * (number - len(prompts))][:number]


def parse_line(line: bytes) -> str | TemplateFault:
    """Parse a line that template_sandbox.py wrote."""
    answer = json.loads(line)
    return answer["prompt"] if "prompt" in answer else TemplateFault(answer["fault"])


def describe_exit(status: int) -> str:
    """Say why a process ended before it had rendered everything."""
    if status >= 0:
        return f"rendering it ended with status {status}; is jinja2 installed?"
    number = signal.Signals(-status)
    return SIGNALS.get(number, f"rendering it ended by {number.name}")
