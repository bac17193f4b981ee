"""Random conversations for encoder and template to agree on, and the encoder's prompt of each.

Everything comes from one random.Random, so that a seed names a conversation. The talks are not
sensible: what matters is that each rule of the encoder meets each other one.
"""

import copy
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

from conftest import ROOT

Talk = dict[str, Any]  # what a template is rendered with
# DeepSeek's own encoding, of the release -0731, as the pinned vMLX of the default stack has it.
LOADERS = "lib/python3.*/site-packages/vmlx_engine/loaders"
(OFFICIAL,) = (ROOT / ".toolchain" / "new").glob(f"{LOADERS}/encoding_dsv4_0731.py")

# FACTS: the two releases differ in this table alone. A nano adds nothing, whatever it is told.
RELEASES = ("first", "0731")

WORDS = (
    "What is 17+28?", "", " ", "\n", "Übersetze:\n\n{% raw %} {{ 'x' }} 你好 👋\n",
    "mit  Leerzeichen ", "<think>no</think>", "<｜User｜>", "</tool_result>",
    'a "quoted" \\ word', "a\u2028b\u00a0c\x85",
    "\x00\x01\x02", "%s {content} {0}", "None", "'single' <b>&amp;</b>", "tab\there",
)  # fmt: skip
KEYS = (
    "path",
    "limit",
    "words",
    "a b",
    "ä",
    "",
    'q"',
    "x\ny",
    "</｜DSML｜parameter>",
    "items",
    "role",
)
NUMBERS = (
    "0", "-0", "-0.0", "1", "42", "-7", "1.0", "2.50", "1e5", "1E5", "1e+16", "1.5e-7", "1e22",
    "1e400", "-1e400", "0.1", "12345678901234567890123", "0e0", "5E-324", "3.141592653589793238",
)  # fmt: skip
CONSTANTS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
NO_JSON = (
    "", " ", "not json", "{", "}", '{"a"}', '{"a":}', '{"a":1,}', "{a: 1}", "{'a': 1}", '{"a": 01}',
    '{"a": 1.}', '{"a": .5}', '{"a": +1}', '{"a": 1e}', '{"a": -}', '{"a": tru}', '{"a": "\t"}',
    '{"a": "\\x"}', '{"a": "\\u12"}', '{"a": "\\u12g4"}', '{"a": "x}', '{"a": 1} 2', '{"a": [1 2]}',
    '{"a": [1,]}', '{"a": ]}', '{"a" 1}', '{"a": 1 "b": 2}', '{"a": \u00a01}', '\ufeff{"a": 1}',
    '{"a": "\x01"}', '{"a": "b"c"}', '{"a": "\\"}', '{"a": 1}}', '{"a": [}]', '{"a": \\"b\\"}',
    '{,"a": 1}', '{"a": 1,, "b": 2}', '{"a"::1}', '{"a": "\n"}', '{"a": 1_000}', '{"a": 0x10}',
    '{"a": ١}', '{"a": "b"', '{"a": infinity}', '{1: 2}', '{"a": -01}', '{"a": 1e5.0}',
    '{"a": ' + "9" * 5000 + "}", '{"a": "\\u+123"}', '{"a": "\\u 123"}', "\x0c{}", '{"a":\x0b1}',
)  # fmt: skip
NO_OBJECT = ("1", "null", '"text"', "[1, 2]", "[]", " true ", "-0.5", '[{"a": 1}]')
SCHEMA = {"type": "object", "properties": {"path": {"type": "string", "enum": ["ä", "<&'>"]}}}


def encoder(path: Path, release: str = "") -> ModuleType:
    """The encoding file at `path`, imported by itself; of -0731's also with the first's efforts."""
    spec = importlib.util.spec_from_file_location(f"encoding_{release}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if release == "first":
        efforts = module.REASONING_EFFORT_PROMPTS
        module.REASONING_EFFORT_PROMPTS = {"high": "", "max": efforts["high"]}
        module.DEFAULT_REASONING_EFFORT = "high"
    return module


def official(encoding: ModuleType, talk: Talk) -> str:
    """The prompt that an encoding file makes of a talk, as the runtimes prepare it for the file.

    tools= goes to the first system message or to an empty one before all, arguments that are an
    object become JSON, a list of text parts one text, and without a generation prompt what stands
    behind the last turn is left out. Raises whatever the encoding raises.
    """
    messages = copy.deepcopy(talk["messages"])
    tools = talk.get("tools")
    systems = [m for m in messages if m.get("role") == "system"]
    if tools and not any(m.get("tools") for m in systems):
        if not systems:
            systems = [{"role": "system", "content": ""}]
            messages = systems + messages
        systems[0]["tools"] = tools
    for message in messages:
        prepare(message)
    thinking = "thinking" if talk.get("enable_thinking") or talk.get("thinking") else "chat"
    if talk.get("continue_final_message") and messages[-1].get("role") == "assistant":
        messages[-1]["wo_eos"] = True
    effort = talk.get("reasoning_effort")
    prompt = encoding.encode_messages(messages, thinking_mode=thinking, reasoning_effort=effort)
    if talk.get("add_generation_prompt"):
        return prompt
    return prompt.removesuffix(transition(encoding, messages, thinking))


def prepare(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, list) and message.get("role") != "tool":
        message["content"] = "".join(part["text"] for part in content)
    for call in message.get("tool_calls") or []:
        if isinstance(call["function"].get("arguments"), dict):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])


def transition(encoding: ModuleType, messages: list[dict[str, Any]], thinking: str) -> str:
    """What the encoding puts behind the last message for the next turn to begin with."""
    last = encoding.merge_tool_messages(messages)[-1:]
    role, task = (last[0].get("role"), last[0].get("task")) if last else (None, None)
    opening = encoding.ASSISTANT_SP_TOKEN + ("<think>" if thinking == "thinking" else "</think>")
    if task is not None:
        return (opening if task == "action" else "") + encoding.DS_TASK_SP_TOKENS[task]
    return opening if role in ("user", "developer") else ""


def talk(rng: random.Random) -> Talk:
    """A conversation in any order of roles, most of them such as the encoder accepts."""
    messages: list[dict[str, Any]] = []
    if rng.random() < 0.5:
        messages.append(system(rng))
    for _ in range(rng.randrange(7)):
        messages += rng.choice((question, question, question, answer, answer, exchange, aside))(rng)
    out: Talk = {"messages": messages, "add_generation_prompt": rng.random() < 0.8}
    if rng.random() < 0.3:
        out["tools"] = tools(rng)
    out[rng.choice(("enable_thinking", "enable_thinking", "thinking"))] = rng.random() < 0.6
    if rng.random() < 0.4:
        out["reasoning_effort"] = rng.choice((None, "low", "high", "max"))
    if rng.random() < 0.02:
        out["reasoning_effort"] = rng.choice(("medium", "HIGH"))
    if messages and messages[-1]["role"] == "assistant":
        out["continue_final_message"] = rng.random() < 0.3
    return out


def text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.choice((1, 1, 1, 3))))


def content(rng: random.Random) -> Any:
    """A text, mostly; or a list of text parts."""
    if rng.random() < 0.85:
        return text(rng)
    return [{"type": "text", "text": text(rng)} for _ in range(rng.randrange(3))]


def tools(rng: random.Random) -> list[dict[str, Any]]:
    names = rng.sample(("read_file", "search", "größe"), rng.randrange(1, 3))
    return [{"type": "function", "function": {"name": n, "parameters": SCHEMA}} for n in names]


def system(rng: random.Random) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "system",
        "content": rng.choice((None, content(rng), content(rng))),
    }
    if rng.random() < 0.1:
        del message["content"]
    if rng.random() < 0.2:
        message["tools"] = rng.choice((tools(rng), []))
    if rng.random() < 0.1:
        message["response_format"] = rng.choice((SCHEMA, {}, None))
    return message


def question(rng: random.Random) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "user", "content": content(rng)}
    if rng.random() < 0.05:
        message["task"] = rng.choice(("action", "query", "title", None, "nonsense"))
    if rng.random() < 0.02:
        message["content"] = None
    return [message]


def answer(rng: random.Random) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": rng.choice((None, content(rng)))}
    if rng.random() < 0.6:
        message["reasoning_content"] = rng.choice((None, "", text(rng)))
    if rng.random() < 0.05:
        message["wo_eos"] = rng.random() < 0.7
    return [message]


def exchange(rng: random.Random) -> list[dict[str, Any]]:
    """Calls and their results: in any order, some missing, some for no call, words between them."""
    message = answer(rng)[0]
    ids = [f"call_{n}" for n in range(rng.randrange(1, 4))]
    message["tool_calls"] = [call(rng, name) for name in ids]
    rng.shuffle(ids)
    results = [result(rng, name) for name in ids if rng.random() < 0.9]
    if rng.random() < 0.1:
        results.append(result(rng, "call_of_nobody"))
    if rng.random() < 0.2:
        results.insert(rng.randrange(len(results) + 1), question(rng)[0])
    return [message, *results]


def call(rng: random.Random, name: str) -> dict[str, Any]:
    function = {"name": rng.choice(("read_file", "search", "größe")), "arguments": arguments(rng)}
    if rng.random() < 0.1:
        return {"type": "function", "function": {**function, "id": name}}
    return {"id": name, "type": "function", "function": function}


def result(rng: random.Random, name: str) -> dict[str, Any]:
    message = {"role": "tool", "tool_call_id": name, "content": text(rng)}
    if rng.random() < 0.15:
        image = {"type": "image_url", "image_url": "x"}
        message["content"] = rng.sample((*content_parts(rng), image), rng.randrange(4))
    if rng.random() < 0.05:
        del message[rng.choice(("content", "tool_call_id"))]
    if rng.random() < 0.03:
        message["content"] = None
    return message


def content_parts(rng: random.Random) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text(rng)}, {"type": "text"}, {"text": "untyped"}]


def aside(rng: random.Random) -> list[dict[str, Any]]:
    """What stands between turns: a reminder, a developer, a system message, an unknown role."""
    role = rng.choice(("latest_reminder", "developer", "developer", "system"))
    if role == "system":
        return [system(rng)]
    message: dict[str, Any] = {"role": role, "content": content(rng)}
    if role == "developer" and rng.random() < 0.3:
        message |= {"tools": tools(rng), "response_format": rng.choice((SCHEMA, None))}
    if role == "developer" and rng.random() < 0.1:
        message["content"] = rng.choice((None, ""))
    if rng.random() < 0.03:
        message["role"] = rng.choice(("narrator", "direct_search_results"))
    return [message]


def arguments(rng: random.Random) -> Any:
    """Mostly a JSON text of an object; or an object; or what is neither."""
    chance = rng.random()
    if chance < 0.7:
        return json_object(rng, 0)
    if chance < 0.85:
        return {rng.choice(KEYS): value(rng, 0) for _ in range(rng.randrange(4))}
    if chance < 0.95:
        return rng.choice(NO_JSON)
    return rng.choice((None, [1, "ä"], 5, True, broken(rng), rng.choice(NO_OBJECT)))


def value(rng: random.Random, depth: int) -> Any:
    """A Python value of any type that JSON has."""
    if depth < 3 and rng.random() < 0.3:
        return [value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if depth < 3 and rng.random() < 0.3:
        return {rng.choice(KEYS): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return rng.choice((text(rng), 1, -0.0, 2.5, 1e22, 10**30, True, False, None, "x"))


def json_text(rng: random.Random, depth: int) -> str:
    """A JSON value in its author's own hand: spaces, escapes and numbers as one likes."""
    chance = rng.random()
    if depth < 4 and chance < 0.2:
        return json_object(rng, depth)
    if depth < 4 and chance < 0.4:
        items = [json_text(rng, depth + 1) for _ in range(rng.randrange(4))]
        return "[" + space(rng) + ",".join(items) + "]"
    if chance < 0.6:
        return space(rng) + rng.choice(NUMBERS + CONSTANTS) + space(rng)
    return space(rng) + json_string(rng, text(rng)) + space(rng)


def json_object(rng: random.Random, depth: int) -> str:
    """With a key for the second time now and then."""
    members = [
        space(rng)
        + json_string(rng, rng.choice(KEYS))
        + space(rng)
        + ":"
        + json_text(rng, depth + 1)
        for _ in range(rng.randrange(5))
    ]
    return space(rng) + "{" + ",".join(members) + space(rng) + "}" + space(rng)


def space(rng: random.Random) -> str:
    return rng.choice(("", "", " ", "  ", "\n", "\t", "\r\n "))


def json_string(rng: random.Random, said: str) -> str:
    """A string with each character escaped in one of the ways that JSON allows."""
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "/": "\\/"}
    out = []
    for char in said + rng.choice(("", "\b\f/")):
        if char in short and rng.random() < 0.8:
            out.append(short[char])
        elif ord(char) < 32 or char in '"\\' or rng.random() < 0.1:
            escaped = json.dumps(char)[1:-1]
            out.append(escaped if "u" in escaped else f"\\u{ord(char):04X}")
        else:
            out.append(char)
    return '"' + "".join(out) + '"'


def broken(rng: random.Random) -> str:
    """A JSON text with one character lost, doubled, or put in another's place."""
    whole = json_object(rng, 1)
    at = rng.randrange(len(whole))
    middle = rng.choice(("", whole[at] * 2, rng.choice('{}[],:"\\ \n0-e.tu')))
    return whole[:at] + middle + whole[at + 1 :]
