"""A child that ends when its parent does, however the parent ended."""

from __future__ import annotations

import os
import signal
import sys
import threading


def exit_when_stdin_closes() -> None:
    """Watch standard input from a thread; at its end, ask this process to stop as SIGTERM would.

    The parent holds the other end of the pipe and never writes to it, so the pipe closes exactly when the
    parent is gone, also when it was killed and could tell nobody.
    """
    threading.Thread(target=_wait_for_end, name="parent-watch", daemon=True).start()


def _wait_for_end() -> None:
    try:
        while os.read(sys.stdin.fileno(), 4096):
            pass
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
