"""Cases for a full model: long prompts, tools, turns, languages, JSON, long answers.

A prompt of n words has at least n tokens.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from dsv4.acceptance.case import TOKENS, Case, CaseSession
from dsv4.acceptance.cases.basics import leaked_markers
from dsv4.acceptance.client import HttpStatusError
from dsv4.acceptance.smoke_questions import SUM, sum_fault
from dsv4.model.special_tokens import BOS
from dsv4.text import short_repr

SIZES = (100, 1000, 6000, 16000)  # of prompts; 6,000 × 6 experts are more than 32,768 (mlx#3856)
NEEDLE, SECRET = "The code word of the harbour is KESTREL-7391.", ("kestrel", "7391")
FLASH = 1_048_576  # tokens, for a server that announces no context length
GOODS, TOWNS = ("salt", "wool", "lamps", "maps", "tar"), ("Ostby", "Marrel", "Tinwick", "Low Vale")
TOOL = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather in a city, now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]}}}  # fmt: skip
STATION = "heron-42"
TURNS = ("My cat is called Mitzi. Say only: good.", "I have three red boats. Say only: good.",
         "What is my cat called, and how many boats have I?")  # fmt: skip
LANGUAGES = {
    "Wie heißt die Hauptstadt von Frankreich? Antworte auf Deutsch in einem Satz.": ("Paris",),
    "法国的首都是哪里？请用中文回答。": ("巴黎",),
    "Какой город — столица Франции? Ответь по-русски.": ("Париж",),
    "フランスの首都はどこですか。日本語で答えてください。": ("パリ",),
    "ما هي عاصمة فرنسا؟ أجب بالعربية.": ("باريس",),
}
WINDOW, OFTEN, LEAST = 8, 4, 300  # so many words repeated so often are a loop; words of a story


def long_text(words: int) -> list[str]:
    """Return different sentences of at least `words` words in all."""
    out, count, number = [], 0, 0
    while count < words:
        number += 1
        goods, town = GOODS[number % len(GOODS)], TOWNS[number % len(TOWNS)]
        out.append(f"Ship {number} brought {number * 7 % 90 + 10} crates of {goods} to {town}.")
        count += len(out[-1].split())
    return out


def needle(words: int, most: int, context: int) -> Case:
    """Return a case that asks for a sentence hidden in a prompt of `words` words."""

    def run(session: CaseSession) -> str:
        text = long_text(words)
        text.insert(len(text) * 3 // 8, NEEDLE)
        reply = session.ask(" ".join(text) + " What is the code word of the harbour?")
        if 0 < reply.prompt_tokens < words:
            return f"the server counts {reply.prompt_tokens:,} tokens: the prompt was cut"
        content = reply.answer.content.lower()
        missing = [part for part in SECRET if part not in content]
        return f"not the code word: {short_repr(reply.answer.content)}" if missing else ""

    skip = f"the server takes {most:,} tokens" if 0 < most < 2 * words else ""
    skip = f"CONTEXT={context}" if words > context else skip
    expected = f"KESTREL-7391, out of {words:,} tokens"
    return Case(f"needle-{words}", expected, 300 + words / 20, run, skip=skip)


def tool_call(session: CaseSession) -> str:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris?"}]
    reply = session.ask(messages, tools=[TOOL])
    if len(reply.calls) != 1 or reply.answer.finish_reason != "tool_calls":
        return f"no single call as tool_calls: {reply}"
    number, name, arguments = reply.calls[0]
    try:
        city = json.loads(arguments)["city"]
    except (ValueError, LookupError, TypeError, RecursionError):
        city = None
    if name != "get_weather" or not isinstance(city, str) or "paris" not in city.lower():
        return f"call {name!r} with {short_repr(arguments)}"
    called = {"id": number or "1", "type": "function",
              "function": {"name": name, "arguments": arguments}}  # fmt: skip
    result = json.dumps({"celsius": 17, "station": STATION})
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": called["id"], "content": result},
        {"role": "user", "content": "Which station says so, and how warm is it?"},
    ]
    answer = session.ask(messages, tools=[TOOL]).answer
    if STATION not in answer.content.lower() or "17" not in answer.content:
        return f"the result is not used: {short_repr(answer.content)}"
    return leaked_markers(answer)


def turns(session: CaseSession) -> str:
    messages = []
    for question in TURNS:
        messages.append({"role": "user", "content": question})
        answer = session.ask(messages).answer
        messages.append({"role": "assistant", "content": answer.content})
    text = answer.content.lower()
    right = "mitzi" in text and ("three" in text or "3" in text)
    return leaked_markers(answer) if right else f"forgotten: {short_repr(answer.content)}"


def languages(session: CaseSession) -> str:
    for question, words in LANGUAGES.items():
        content = session.ask(question).answer.content
        if not any(word in content for word in words):
            return f"{question} {short_repr(content)}"
    return ""


def as_json(session: CaseSession) -> str:
    question = 'Answer in JSON with the keys "city" and "country": what is the capital of France?'
    content = session.ask(question, response_format={"type": "json_object"}).answer.content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return f"no JSON: {short_repr(content)}"
    if not isinstance(value, dict) or value.get("city") != "Paris":
        return f"another object: {short_repr(value)}"
    return ""


def too_long(most: int) -> Case:
    """Return a case: a prompt above the context limit is refused, and the server goes on."""

    def run(session: CaseSession) -> str:
        try:
            reply = session.ask("a " * (most + 1000) + SUM, max_tokens=20)
        except HttpStatusError as refused:
            if not 400 <= refused.status < 500:
                return str(refused)
            return sum_fault(session.ask(SUM).answer) or ""
        return f"taken, as {reply.prompt_tokens:,} tokens: {reply}"

    return Case("context-limit", f"HTTP 4xx for more than {most:,} tokens, then 45", 300, run)


def loop_in(text: str) -> str:
    """Return what is repeated in a text, or "" for nothing."""
    if BOS in text:
        return f"{text.count(BOS)} × {BOS}"
    words = text.split()
    if long := next((word for word in words if len(word) > 400), ""):
        return f"no blank in {short_repr(long)}"
    windows = (tuple(words[i : i + WINDOW]) for i in range(len(words) - WINDOW + 1))
    most = Counter(windows).most_common(1)
    if most and most[0][1] >= OFTEN:
        return f"{most[0][1]} × {short_repr(' '.join(most[0][0]))}"
    return ""


def loops(session: CaseSession) -> str:
    question = "Write a story of about 1,500 words about a lighthouse keeper."
    text = session.ask(question, max_tokens=TOKENS).answer.text
    words = len(text.split())
    return loop_in(text) or ("" if words >= LEAST else f"{words} words: too few to tell")


def cases(context: int, most: int) -> tuple[Case, ...]:
    """Return the cases, with needles in prompts of SIZES and of `context` tokens.

    Needles longer than `context` are skipped. most: the context length that the server announces,
    0 without one.
    """
    return (
        *(needle(n, most, context) for n in sorted({*SIZES, context}) if n >= 1000),
        Case("tool-call", "a call of get_weather for Paris; its result used", 300, tool_call),
        Case("turns", "what was said two turns before", 300, turns),
        Case("languages", f"Paris in {len(LANGUAGES)} languages", 300, languages),
        Case("json", 'an object with "city": "Paris", and nothing else', 120, as_json),
        too_long(most or FLASH),
        Case("loops", f"a story of {LEAST} words or more in {TOKENS:,} tokens; no {WINDOW} words "
             f"{OFTEN} times", 900, loops),
    )  # fmt: skip


def sizes(context: int) -> list[int]:
    """Return prompt lengths in tokens: those of SIZES up to `context`, and `context` itself."""
    return sorted({*(size for size in SIZES if size <= context), context})
