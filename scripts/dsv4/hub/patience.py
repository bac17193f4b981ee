"""Trying again: how long, how often, and when the server says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from tqdm import tqdm

from dsv4.hub.refusals import Slow, asked_wait, explain, is_passing

T = TypeVar("T")

LONGEST_WAIT = 60  # seconds between two attempts
LONGEST_ASKED = 3600  # seconds in all that a server may ask to wait while nothing comes
WORTH_SAYING = 8  # a wait of so many seconds is told


def say(error: Exception, seconds: float) -> None:
    """Tell, without breaking a progress bar, what is waited for."""
    found = (explain(error) or (type(error).__name__,))[0]
    asked = ", as it asks" if asked_wait(error) >= seconds else ""
    tqdm.write(f"note: {found}; trying again in {seconds:,.0f} s{asked}")


class Waits:
    """The waits since something last came: our own count against patience, asked ones do not."""

    def __init__(self, patience: float) -> None:
        self.patience, self.next, self.waited, self.asked = patience, 1.0, 0.0, 0.0

    def after(self, error: Exception) -> float | None:
        """The seconds to wait now, or None when it is time to give up.

        With no patience at all there is one attempt, whatever the server asks.
        """
        if not self.patience:
            return None
        asked = asked_wait(error)
        if asked > self.next:
            self.asked += asked
            return asked if self.asked <= LONGEST_ASKED else None
        now, self.next = self.next, min(self.next * 2, LONGEST_WAIT)
        self.waited += now
        return now if self.waited <= self.patience else None


def patiently(
    attempt: Callable[[], T],
    patience: float,
    progress: Callable[[], int] = lambda: 0,
    pause: Callable[[float], Any] = time.sleep,
    passing: Callable[[Exception], bool] = is_passing,
) -> T:
    """Call `attempt` until it succeeds; between failures that pass, wait 1, 2, 4 … 60 seconds.

    Gives up, with the last error, when `progress` has stood still for `patience` seconds. A server
    that says when to come back is asked no sooner, up to LONGEST_ASKED seconds, not counted as
    patience. What comes too slowly is no progress.
    """
    waits, before = Waits(patience), progress()
    while True:
        try:
            return attempt()
        except Exception as error:
            if progress() != before and not isinstance(error, Slow):
                waits, before = Waits(patience), progress()
            now = waits.after(error) if passing(error) else None
            if now is None:
                raise
            if now >= WORTH_SAYING:
                say(error, now)
        pause(now)
