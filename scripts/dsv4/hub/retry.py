"""Retries: how long, how often, and when the server says so.

huggingface_hub's own retries end after seconds. A download of 160 GB shall survive a network that
is gone for minutes, and a server that asks to wait for minutes, and say what it waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from tqdm import tqdm

from dsv4.hub.hub_errors import describe, is_transient, requested_delay

T = TypeVar("T")

LONGEST_WAIT = 60  # seconds between two attempts
LONGEST_REQUESTED = 3600  # seconds in all that a server may ask to wait while nothing comes
WORTH_SAYING = 8  # a wait of so many seconds is printed


def with_retries(
    attempt: Callable[[], T],
    patience: float,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], Any] = time.sleep,
) -> T:
    """Call `attempt` until it succeeds; after transient errors wait 1, 2, 4 … 60 seconds.

    Raises the last error when it is final, or when `progress` has not changed for `patience`
    seconds of waiting. Delays that the server asks for do not count against `patience`, but end at
    LONGEST_REQUESTED. With a patience of 0 there is one attempt, whatever the server asks.
    """
    backoff = waited = requested = 0.0
    before = progress()
    while True:
        try:
            return attempt()
        except Exception as error:
            if not patience or not is_transient(error):
                raise
            if progress() != before:
                backoff = waited = requested = 0.0
                before = progress()
            asked, seconds = requested_delay(error), min(2 * backoff or 1.0, LONGEST_WAIT)
            if asked > seconds:
                seconds = asked
                requested += asked
            else:
                backoff = seconds
                waited += seconds
            if waited > patience or requested > LONGEST_REQUESTED:
                raise
            if seconds >= WORTH_SAYING:
                found = (describe(error) or (type(error).__name__,))[0]
                note = ", as it asks" if seconds == asked else ""
                tqdm.write(f"note: {found}; trying again in {seconds:,.0f} s{note}")
        pause(seconds)
