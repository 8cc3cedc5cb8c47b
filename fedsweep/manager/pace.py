"""How fast a sweep gets on, and so how long it will take."""

from __future__ import annotations

from collections import deque

WINDOW_S = 600.0  # the pace is that of the last ten minutes
SAMPLE_S = 2.0  # apart
SHORTEST_S = 1.0  # of work that says anything


class Pace:
    """Expected cost done per second, of late.

    To multiply what one experiment took would count the seconds of those that train together many times. A part of an
    experiment that is done counts as that part: they also end together.
    """

    def __init__(self) -> None:
        self._finished = 0.0  # cost of all that ended
        self._samples: deque[tuple[float, float]] = deque()  # when, and what was done by then

    def finish(self, cost: float) -> None:
        """Note that an experiment of this expected cost has ended."""
        self._finished += cost

    def is_due(self, now: float) -> bool:
        """Whether to take a sample, at this monotonic time."""
        return not self._samples or now - self._samples[-1][0] >= SAMPLE_S

    def sample(self, now: float, under_way: float, *, is_idle: bool = False) -> None:
        """Note what is done by now.

        Args:
            now: monotonic.
            under_way: cost of what is done of the experiments that have not ended.
            is_idle: whether no worker is there; the time until one comes says nothing.
        """
        if is_idle:
            self._samples.clear()
        self._samples.append((now, self._finished + under_way))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW_S:
            self._samples.popleft()

    def seconds_for(self, cost: float, now: float, under_way: float) -> float | None:
        """How long it takes until all this cost is done, of which `under_way` is done already; None if not known."""
        if not self._samples:
            return None
        began, before = self._samples[0]
        done = self._finished + under_way - before
        if now - began < SHORTEST_S or done <= 0:
            return None
        return max(cost - under_way, 0.0) * (now - began) / done
