"""What the ledger in a state directory says, read beside a manager or after it: how far all is, what failed and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedsweep.manager.failure_view import FailureView
from fedsweep.manager.failures import CANCELLED, Group
from fedsweep.manager.ledger import MAX_LOSSES
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.opening import reading
from fedsweep.manager.records import Counts
from fedsweep.manager.state_dir import LEDGER_FILE


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a sweep is."""

    counts: Counts
    cancelled: int  # of the failed
    seen_at: datetime  # when the ledger changed last; in local time

    def __str__(self) -> str:
        counts = self.counts
        words = [f"{counts.complete} of {counts.total} experiments complete"]
        if failed := counts.failed - self.cancelled:
            words.append(f"{failed} failed for good")
        if self.cancelled:
            words.append(f"{self.cancelled} cancelled")
        if left := counts.pending + counts.assigned:
            words.append(f"{left} still to be run")
        return ", ".join(words)


def standing(state_dir: Path) -> Standing:
    """How far the sweep of a state directory is.

    Raises:
        StateError: there is no ledger, or it cannot be read.
    """
    with _views(state_dir) as (view, failures):
        counts, cancelled = view.counts(), failures.cancelled()
    ledger = state_dir / LEDGER_FILE
    files = (ledger, ledger.with_name(f"{LEDGER_FILE}-wal"))
    changed = max(path.stat().st_mtime for path in files if path.exists())
    return Standing(counts=counts, cancelled=cancelled, seen_at=datetime.fromtimestamp(changed).astimezone())


def failed_groups(state_dir: Path) -> list[Group]:
    """The causes for which tasks failed for good, those that failed the most first; the cancelled tasks last.

    Raises:
        StateError: there is no ledger, or it cannot be read.
    """
    with _views(state_dir) as (_, failures):
        return [group for group in failures.groups() if group.failed]


def given_up(state_dir: Path) -> dict[str, bool]:
    """The signatures of the tasks that failed for good, and whether they were cancelled; empty where no ledger is.

    Those of an earlier configuration too: they are as they were when they come back.

    Raises:
        StateError: the ledger cannot be read.
    """
    if not (state_dir / LEDGER_FILE).exists():
        return {}
    with _views(state_dir) as (_, failures):
        return failures.given_up()


def is_cancelled(group: Group) -> bool:
    """Whether these tasks did not fail, but shall not be run."""
    return group.group == CANCELLED


@contextlib.contextmanager
def _views(state_dir: Path) -> Iterator[tuple[LedgerView, FailureView]]:
    with reading(state_dir / LEDGER_FILE) as db:
        yield LedgerView(db), FailureView(db, MAX_LOSSES)
