"""How fast a server answers: time to the first token, and tokens a second, by length of prompt.

No two prompts begin alike, so that nothing of one serves the next. How many tokens a word has tells
the server's own count of a first prompt, with which it warms up too.
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
FIRST = 100  # words of the prompt whose tokens are counted
TOKENS = 64  # of an answer
FEWEST = 4  # tokens after the first, of which a rate is told
LIMIT = 120  # seconds of each request, and one more for each 20 tokens of prompt


@dataclass(frozen=True)
class Speed:
    """prompt: tokens aimed at; counted: by the server, 0 when it does not say; at_once: requests.

    first: seconds to the first token, the median of the requests; rate: tokens a second of all of
    them together after their first, None when the answers were too short. why: what went wrong.
    """

    prompt: int
    at_once: int
    counted: int = 0
    tokens: int = 0
    first: float | None = None
    rate: float | None = None
    why: str = ""


def measure(endpoint: Endpoint, context: int) -> Iterator[Speed]:
    """A Speed for each length of prompt up to `context` tokens, alone and with 4 at once."""
    number, in_a_word = 1, tokens_in_a_word(endpoint)
    for prompt in sizes(context):
        for at_once in AT_ONCE:
            words = int(prompt / in_a_word)
            bodies = [_body(words, number + i) for i in range(at_once)]
            number += at_once
            yield _measure_prompt(endpoint, prompt, bodies)


def tokens_in_a_word(endpoint: Endpoint) -> float:
    """By the server's count of its tokens in a prompt of FIRST words; 1 where it does not say."""
    body = {**_body(FIRST, 0), "max_tokens": 1}
    try:
        counted = stream(endpoint, body, LIMIT).prompt_tokens
    except UserError:
        return 1.0  # what is measured next will say what is wrong
    return max(1.0, counted / len(body["messages"][0]["content"].split()))


def _body(words: int, number: int) -> dict:
    """A request of so many words, up to a sentence."""
    before, after = (
        f"Log {number}, kept {time.time_ns()}.",
        "Write about the ships in your own words.",
    )
    text = long_text(words - len(before.split()) - len(after.split()))
    asked = " ".join((before, *text, after))
    return {"messages": [{"role": "user", "content": asked}], "max_tokens": TOKENS}


def _measure_prompt(endpoint: Endpoint, prompt: int, bodies: list[dict]) -> Speed:
    limit, start = (LIMIT + prompt / 20) * len(bodies), time.monotonic()
    try:
        with ThreadPoolExecutor(len(bodies)) as pool:
            replies = list(pool.map(lambda body: stream(endpoint, body, limit), bodies))
    except UserError as stop:
        return Speed(prompt, len(bodies), why=str(stop))
    return summarize_replies(prompt, replies, time.monotonic() - start)


def summarize_replies(prompt: int, replies: list[Reply], seconds: float) -> Speed:
    """One Speed of the replies to requests that began together and took `seconds` in all."""
    about = (prompt, len(replies), min(reply.prompt_tokens for reply in replies))
    tokens = sum(reply.tokens for reply in replies)
    if not all(reply.first for reply in replies):
        return Speed(*about, tokens, why="an answer without a token")
    first = min(reply.first for reply in replies)
    after, rate = tokens - len(replies), None
    if after >= FEWEST * len(replies) and seconds > first:
        rate = round(after / (seconds - first), 2)
    return Speed(*about, tokens, round(statistics.median(r.first for r in replies), 3), rate)
