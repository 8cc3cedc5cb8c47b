"""`summary.csv` and `history.parquet` of every output folder, made again when its rows have changed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from fedsweep.errors import DataError
from fedsweep.manager.columns import FILE_NAME
from fedsweep.manager.history import HISTORY_FILE, write_history
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.records import History
from fedsweep.manager.results import SUMMARY_FILE, write_summary

log = logging.getLogger(__name__)


class Outputs:
    """Writes what is derived from the rows. Takes the lock for single looks only, so that requests go on meanwhile."""

    def __init__(self, view: LedgerView, lock: threading.RLock) -> None:
        self._view = view
        self._lock = lock

    def write(self, output_dirs: Iterable[str]) -> None:
        """Bring both files of these folders up to date. A folder that cannot be written is logged and passed over."""
        for output_dir in output_dirs:
            try:
                if _is_older(output_dir, HISTORY_FILE):
                    write_history(output_dir, partial(self._page, output_dir))
                if _is_older(output_dir, SUMMARY_FILE):
                    write_summary(output_dir)
            except (DataError, OSError) as error:
                log.warning("%s: summary and history are not up to date: %s", output_dir, error)

    def _page(self, output_dir: str, after: int) -> list[History]:
        with self._lock:
            return self._view.histories(output_dir, after)


def _is_older(output_dir: str, name: str) -> bool:
    """Whether there are rows, and this file is missing or was written before the last of them."""
    rows, derived = Path(output_dir) / FILE_NAME, Path(output_dir) / name
    if not rows.is_file():
        return False
    return not derived.exists() or derived.stat().st_mtime_ns <= rows.stat().st_mtime_ns
