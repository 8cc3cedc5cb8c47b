"""Figures of a run: when requests are due, how long they waited, and whether that is what is required."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def due_times(rate: float, seconds: float) -> list[float]:
    """When requests are due, in seconds from the start: an open loop, which does not wait for answers."""
    return [number / rate for number in range(round(rate * seconds))]


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest of these values (in ascending order) that at least this share of them does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """What is told of waiting times: how many, and p50, p99, p99.9 and the longest in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p99.9_ms": 0.999, "max_ms": 1.0}
    return {"count": len(ordered), **{name: percentile(ordered, share) * 1e3 for name, share in shares.items()}}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Several repeats as one."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "repeats": len(values)}


@dataclass(frozen=True)
class Requirement:
    """A figure, and what is asked of it."""

    name: str
    found: float
    limit: float
    unit: str
    at_least: bool = False  # otherwise at most

    @property
    def is_reached(self) -> bool:
        """Whether the figure is good enough; one that is not a number is not."""
        return self.found >= self.limit if self.at_least else self.found <= self.limit

    def line(self) -> str:
        """A line of the table."""
        sign = "≥" if self.at_least else "≤"
        verdict = "reached" if self.is_reached else "MISSED"
        return f"{self.name:62} {self.found:10,.1f} {self.unit:11} {f'{sign} {self.limit:,.0f}':>9}  {verdict}"
