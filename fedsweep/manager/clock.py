"""Time as an argument, so that a test can hold the clock."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class Clock:
    """The clocks of this machine: one to tell people the time, one to measure with."""

    def now(self) -> datetime:
        """The time of day, in UTC. It jumps when someone sets the clock; nothing is decided by it."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since some moment. Never goes back; leases run on it."""
        return time.monotonic()
