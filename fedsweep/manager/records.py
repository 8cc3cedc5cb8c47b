"""What the ledger takes and gives: frozen values, and the errors of its methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from fedsweep.errors import FedsweepError

Status = Literal["pending", "assigned", "complete", "failed"]
Verdict = Literal["accepted", "duplicate"]


class UnknownTask(FedsweepError):
    """No task has this id."""


class UnknownAttempt(FedsweepError):
    """The task was never handed out so."""


class LedgerUnwritable(FedsweepError):
    """The ledger cannot be written (is the disk full?). Nothing was changed."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One computation, as the ledger knows it at one moment."""

    number: int  # its row in the ledger
    task_id: str
    signature: str
    phase: str
    config: dict[str, Any]  # every parameter, run options too
    seed: int
    cohort: str  # tasks with the same can train together
    output_dir: str
    output_dirs: tuple[str, ...]
    status: Status
    orphaned: bool  # in no configuration any more: kept, not run
    attempt: int | None  # the open one
    assigned_to: str | None
    assigned_at: datetime | None
    failures: int
    losses: int
    last_error: str | None

    def as_dict(self) -> dict[str, Any]:
        """The task as people and old tools know it: `assigned_at` is a datetime, `retry_count` its failures."""
        return {
            "task_id": self.task_id,
            "phase": self.phase,
            "config": self.config,
            "seed": self.seed,
            "output_dir": self.output_dir,
            "output_dirs": list(self.output_dirs),
            "status": self.status,
            "assigned_to": self.assigned_to,
            "assigned_at": self.assigned_at,
            "retry_count": self.failures,
            "last_error": self.last_error,
            "signature": self.signature,
        }


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A worker with open attempts."""

    worker_id: str
    tasks: int  # that it holds
    lease_s: float  # after so long without a sign of it they are taken back


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell and the result of its task: what one line of a CSV is made from."""

    output_dir: str
    phase: str
    spelled: dict[str, Any]  # the parameters as the grid of that phase spells them
    signature: str
    result: dict[str, Any]  # without the history


@dataclass(frozen=True)
class History:
    """A result with its rounds, and whose it is."""

    place: int  # in the order of acceptance
    signature: str
    task_id: str
    seed: int
    result: dict[str, Any]  # with `history`


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many tasks of the present grid are in which state; orphans are counted apart."""

    pending: int = 0
    assigned: int = 0
    complete: int = 0
    failed: int = 0
    diverged: int = 0  # of the complete
    orphaned: int = 0

    @property
    def total(self) -> int:
        """All tasks of the present grid."""
        return self.pending + self.assigned + self.complete + self.failed

    @property
    def is_terminal(self) -> bool:
        """Whether nothing is left to do."""
        return self.pending == self.assigned == 0


@dataclass(frozen=True, kw_only=True)
class PlanChange:
    """What storing a grid changed."""

    added: int
    kept: int
    removed: int
    restored: int  # orphans that came back; counted in no other
    ended_attempts: tuple[int, ...] = ()  # those of removed tasks

    def as_dict(self) -> dict[str, int]:
        """The four counts."""
        return {"added": self.added, "kept": self.kept, "removed": self.removed, "restored": self.restored}

    def __str__(self) -> str:
        restored = f"{self.restored} restored" if self.restored else ""
        return ", ".join(filter(None, (f"{self.added} added", f"{self.kept} kept", restored)))


def orphans_words(count: int) -> str:
    """What becomes of so many tasks that the present configuration does not ask for; empty where there are none."""
    if not count:
        return ""
    plural, verb = ("", "is") if count == 1 else ("s", "are")
    return f"{count} experiment{plural} of an earlier configuration {verb} kept, with all results, but not run"


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """A result in a row that someone else wrote, and where it stood."""

    task: int  # its number in the ledger
    data: Mapping[str, Any]
    source: str
