"""The thread that looks after the files beside the server."""

from __future__ import annotations

import logging
import threading
import time

from fedsweep.errors import FedsweepError
from fedsweep.manager.sweep import OpenSweep

log = logging.getLogger(__name__)

OUTPUTS_EVERY_S = 30.0


class Refresher(threading.Thread):
    """Looks for rows that others wrote, every `refresh_s`, and keeps summaries and histories up to date."""

    def __init__(self, sweep: OpenSweep, refresh_s: float) -> None:
        super().__init__(name="refresher", daemon=True)
        self._sweep = sweep
        self._refresh_s = refresh_s
        self._is_over = threading.Event()
        self._outputs_due = time.monotonic() + OUTPUTS_EVERY_S

    def stop(self) -> None:
        """End the thread, after what it is at."""
        self._is_over.set()
        self.join()

    def run(self) -> None:
        """Refresh until stopped."""
        while not self._is_over.wait(self._refresh_s):
            try:
                self._sweep.sync(patient=True)
                if time.monotonic() >= self._outputs_due:
                    self._write_outputs()
            except FedsweepError as error:
                log.error("the results files could not be looked at: %s", error)
            except Exception:
                log.exception("the results files could not be looked at")

    def _write_outputs(self) -> None:
        """Write the summaries, at most every 30 s, and less often where that takes long."""
        began = time.monotonic()
        self._sweep.write_outputs()
        now = time.monotonic()
        self._outputs_due = now + max(OUTPUTS_EVERY_S, 20 * (now - began))
