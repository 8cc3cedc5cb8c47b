"""What the log says of those who were refused: never so much that they could fill it, and how often it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

PAUSE_S = 10.0


@dataclass
class _Kind:
    """Lines that differ in their arguments only."""

    said_at: float  # when one of them was last written, monotonic
    left_out: int = 0  # how many were not, since then
    last: str = ""  # the last of these


class Seldom:
    """Writes one line of a kind in ten seconds, and counts the others."""

    def __init__(
        self, log: logging.Logger, pause_s: float = PAUSE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._pause_s = pause_s
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def warn(self, text: str, *arguments: object) -> None:
        """Write a warning, or count it; `text` is its kind."""
        self.tell()
        now = self._clock()
        kind = self._kinds.get(text)
        if kind is not None and now - kind.said_at < self._pause_s:
            kind.left_out += 1
            kind.last = text % arguments
            return
        self._kinds[text] = _Kind(said_at=now)
        self._log.warning(text, *arguments)

    def tell(self, *, is_last: bool = False) -> None:
        """Write how many were left out of each kind that may be written again; of every kind, if there is no later."""
        now = self._clock()
        for kind in self._kinds.values():
            if kind.left_out and (is_last or now - kind.said_at >= self._pause_s):
                self._log.warning("%s more like this: %s", f"{kind.left_out:,}", kind.last)
                kind.said_at, kind.left_out = now, 0

    def forget(self) -> None:
        """Begin anew."""
        self._kinds.clear()


refusals = Seldom(logging.getLogger(__name__))
