"""What a worker says of a manager that is away: at once, then less and less often."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 10.0  # between the first two lines; twice as long before each one more
LONGEST_PAUSE_S = 600.0


@dataclass
class Absence:
    """Tells of one manager, between two answers of which hours may lie."""

    clock: Callable[[], float]  # monotonic seconds
    since: float | None = None  # when the first question went unanswered; None while it answers
    _say_at: float = 0.0
    _pause_s: float = FIRST_PAUSE_S

    def note(self, reason: str, limit_s: float | None = None) -> None:
        """It did not answer, for this reason; it is given up `limit_s` after it began, if at all."""
        now = self.clock()
        how_to_end = f"to end this worker: Ctrl-C, or kill {os.getpid()}"
        if self.since is None:
            limit = "" if limit_s is None else f", for {in_words(limit_s)} at most"
            log.warning("%s; trying again until one does%s (%s)", reason, limit, how_to_end)
            self.since, self._pause_s = now, FIRST_PAUSE_S
            self._say_at = now + self._pause_s
        elif now >= self._say_at:
            log.warning("%s, for %s now; still trying (%s)", reason, in_words(now - self.since), how_to_end)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._say_at = now + self._pause_s

    def end(self) -> None:
        """It answers."""
        if self.since is not None:
            log.info("the manager answers, after %s", in_words(self.clock() - self.since))
        self.since = None


def in_words(seconds: float) -> str:
    """A time in its largest unit of which there are two."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
