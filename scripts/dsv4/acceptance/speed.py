"""Measure time to the first token and tokens per second, by length of the prompt.

Every prompt begins differently, so that no prefix cache is used. A first prompt warms the server
up, and its token count gives the number of tokens per word.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dsv4.acceptance.cases.abilities import long_text, sizes
from dsv4.acceptance.client import Endpoint, Reply, stream
from dsv4.errors import UserError

AT_ONCE = (1, 4)
FIRST = 100  # words of the first prompt
TOKENS = 64  # of an answer
FEWEST = 4  # tokens after the first that a rate needs
LIMIT = 120  # seconds for a request, plus one for each 20 tokens of prompt


@dataclass(frozen=True)
class Speed:
    """prompt: intended tokens; counted: the server's count, 0 without one; at_once: requests.

    first: median seconds to the first token. rate: tokens per second of all requests together after
    their first tokens, None when the answers were too short. why: what went wrong.
    """

    prompt: int
    at_once: int
    counted: int = 0
    tokens: int = 0
    first: float | None = None
    rate: float | None = None
    why: str = ""


def measure(endpoint: Endpoint, context: int) -> Iterator[Speed]:
    """Yield a Speed for each prompt length up to `context` tokens, 1 and 4 requests at once."""
    number, per_word = 1, tokens_per_word(endpoint)
    for prompt in sizes(context):
        for at_once in AT_ONCE:
            words = int(prompt / per_word)
            bodies = [_body(words, number + i) for i in range(at_once)]
            number += at_once
            yield _measure_prompt(endpoint, prompt, bodies)


def tokens_per_word(endpoint: Endpoint) -> float:
    """Return the server's tokens per word of a prompt of FIRST words; 1 where it counts none."""
    body = {**_body(FIRST, 0), "max_tokens": 1}
    try:
        counted = stream(endpoint, body, LIMIT).prompt_tokens
    except UserError:
        return 1.0  # the next measurement reports the fault
    return max(1.0, counted / len(body["messages"][0]["content"].split()))


def _body(words: int, number: int) -> dict:
    """Return a request with `words` words, give or take a sentence."""
    before, after = (
        f"Log {number}, kept {time.time_ns()}.",
        "Write about the ships in your own words.",
    )
    text = long_text(words - len(before.split()) - len(after.split()))
    prompt = " ".join((before, *text, after))
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS}


def _measure_prompt(endpoint: Endpoint, prompt: int, bodies: list[dict]) -> Speed:
    limit, start = (LIMIT + prompt / 20) * len(bodies), time.monotonic()
    try:
        with ThreadPoolExecutor(len(bodies)) as pool:
            replies = list(pool.map(lambda body: stream(endpoint, body, limit), bodies))
    except UserError as stop:
        return Speed(prompt, len(bodies), why=str(stop))
    return summarize_replies(prompt, replies, time.monotonic() - start)


def summarize_replies(prompt: int, replies: list[Reply], seconds: float) -> Speed:
    """Return the Speed of requests that began together and took `seconds` in all."""
    counts = (prompt, len(replies), min(reply.prompt_tokens for reply in replies))
    tokens = sum(reply.tokens for reply in replies)
    if not all(reply.first for reply in replies):
        return Speed(*counts, tokens, why="an answer without a token")
    first = min(reply.first for reply in replies)
    after, rate = tokens - len(replies), None
    if after >= FEWEST * len(replies) and seconds > first:
        rate = round(after / (seconds - first), 2)
    return Speed(*counts, tokens, round(statistics.median(r.first for r in replies), 3), rate)
