"""How fast a sweep gets on, and so how long it will take."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_S = 600.0  # the pace is that of the last ten minutes
SAMPLE_S = 2.0  # apart
# Ground for saying how long all will take: so many results that are so much of the cost, or a longer look.
SHORTEST_S = 10.0
FEWEST_RESULTS = 3
SMALLEST_SHARE = 0.05
LONG_S = 120.0


@dataclass(frozen=True)
class Sample:
    """How far all was at one moment; every amount counts from the start of the manager."""

    at: float  # monotonic
    done: float  # expected cost, rounds of what is under way included
    results: int
    worked_s: float  # by all workers together


class Pace:
    """Expected cost that a worker does per second, of late.

    To multiply what one experiment took would count the seconds of those that train together many times. A part of an
    experiment that is done counts as that part: they also end together. What passes before the first progress is seen
    says nothing: workers load their data and choose a plan once, and what they were given together ends together.
    """

    def __init__(self) -> None:
        self._finished = 0.0  # cost of all that ended
        self._results = 0
        self._worked_s = 0.0
        self._workers = 0  # at work since the last sample
        self._samples: deque[Sample] = deque()
        self._moves = False  # whether progress was seen; the first sample is then that of the first progress

    def finish(self, cost: float) -> None:
        """Note that an experiment of this expected cost has ended."""
        self._finished += cost
        self._results += 1

    def is_due(self, now: float) -> bool:
        """Whether to take a sample, at this monotonic time."""
        return not self._samples or now - self._samples[-1].at >= SAMPLE_S

    def sample(self, now: float, under_way: float, workers: int, *, is_idle: bool = False) -> None:
        """Note what is done by now.

        Args:
            now: monotonic.
            under_way: cost of what is done of the experiments that have not ended.
            workers: how many hold experiments.
            is_idle: whether no worker is there; the time until one comes says nothing.
        """
        if self._samples:
            self._worked_s += self._workers * (now - self._samples[-1].at)
        self._workers = workers
        sample = Sample(now, self._finished + under_way, self._results, self._worked_s)
        if is_idle or not self._moves:
            self._moves = not is_idle and bool(self._samples) and sample.done > self._samples[0].done
            self._samples.clear()
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].at <= now - WINDOW_S:
            self._samples.popleft()

    def seconds_left(self, waiting: float, held: Sequence[float]) -> float | None:
        """How long it takes until all is done, at the last sample; None where there is no ground to say.

        Args:
            waiting: cost of what no worker has yet.
            held: what each worker has still to do of what it holds.
        """
        if not self._moves:
            return None
        first, last = self._samples[0], self._samples[-1]
        done, worked_s = last.done - first.done, last.worked_s - first.worked_s
        left = waiting + sum(held)
        if done <= 0 or worked_s <= 0 or not has_ground(last.at - first.at, last.results - first.results, done, left):
            return None
        return time_of(waiting, held) * worked_s / done


def has_ground(seconds: float, results: int, done: float, left: float) -> bool:
    """Whether what was seen for so many seconds says how long what is left will take."""
    is_a_share = results >= FEWEST_RESULTS and done >= SMALLEST_SHARE * (done + left)
    return seconds >= LONG_S or (seconds >= SHORTEST_S and is_a_share)


def time_of(waiting: float, held: Sequence[float]) -> float:
    """How long workers take that do one unit of cost in one unit of time: fair shares, but each does what it holds."""
    return max((waiting + sum(held)) / max(len(held), 1), *held, 0.0)
