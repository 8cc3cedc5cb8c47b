"""SIGTERM and SIGINT: the first ends a worker in order, within its grace; a second ends it at once.

The manager may ask for the same; that is no second signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from fedsweep.errors import Preempted

ASKED = signal.SIGUSR1  # what `request` sends to this process itself
GRACE_S = 2.0  # after a signal, for what must not be interrupted; giving the task back comes on top


class _Interrupted(BaseException):
    """`Preempted` on its way out of an interruptible part: no `except Exception` in there takes it for a failure."""


class StopSignals:
    """While entered, turns a stop signal into `Preempted`, raised in the main thread.

    It is raised at once in an `interruptible` part, so that also a long round is left in time. Elsewhere the signal
    waits for the next `check`, but no longer than the grace: what is then under way (an answer of the manager that
    does not come, a full disk) is safe to leave.

    In another thread than the main one no signal can be caught, and entering does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._may_raise = False
        self._before: dict[signal.Signals, Any] = {}
        self._asking = threading.Lock()  # held while handlers change

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGTERM, signal.SIGINT):
                self._before[kind] = signal.signal(kind, self._stop)
            self._before[ASKED] = signal.signal(ASKED, self._stop_once)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        with self._asking:
            while self._before:
                signal.signal(*self._before.popitem())

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        # Also where `Preempted` is raised at once: were it raised in a destructor, Python would drop it.
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._insist)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S, GRACE_S)
        if self._may_raise:
            raise _Interrupted

    def _stop_once(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self._stop(number, frame)

    def request(self) -> None:
        """Stop as a first signal does; from any thread, and as often as one likes."""
        with self._asking:
            if ASKED in self._before:
                # A sleep or a computation in the main thread is interrupted by nothing else.
                signal.pthread_kill(threading.main_thread().ident or 0, ASKED)
            else:
                self.requested = True

    def _insist(self, _number: int, _frame: FrameType | None) -> None:
        raise _Interrupted if self._may_raise else Preempted

    def settle(self) -> None:
        """Stop insisting: `Preempted` has been caught."""
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self) -> None:
        """Raise `Preempted` if a signal came."""
        if self.requested:
            raise Preempted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part that a signal ends at once."""
        self._may_raise = True
        try:
            self.check()
            yield
        except _Interrupted:
            raise Preempted from None
        finally:
            self._may_raise = False

    def sleep(self, seconds: float) -> None:
        """Sleep, unless a signal comes."""
        with self.interruptible():
            time.sleep(seconds)
