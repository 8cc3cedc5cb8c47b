"""The tasks of a ledger as the collections that programs expect: a mapping of tasks, a set of signatures."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any, TypeVar

from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.records import Status, UnknownTask

Item = TypeVar("Item")


class Tasks(Mapping[str, dict[str, Any]]):
    """The present tasks (those in `status`, if given) by id, in the order of the grid. Read-only; always up to date."""

    def __init__(self, view: LedgerView, lock: threading.RLock, status: Status | None = None) -> None:
        self._view = view
        self._lock = lock
        self._status = status

    def __getitem__(self, task_id: str) -> dict[str, Any]:
        with self._lock:
            try:
                task = self._view.task(task_id)
            except UnknownTask:
                raise KeyError(task_id) from None
        if task.orphaned or self._status not in (None, task.status):
            raise KeyError(task_id)
        return task.as_dict()

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(self._view.task_ids(self._status))

    def __len__(self) -> int:
        with self._lock:
            counts = self._view.counts()
        return counts.total if self._status is None else int(getattr(counts, self._status))


class CompletedSignatures(Set[str]):
    """The signatures of the present tasks that have a result. Read-only; always up to date."""

    def __init__(self, view: LedgerView, lock: threading.RLock) -> None:
        self._view = view
        self._lock = lock

    @classmethod
    def _from_iterable(cls, items: Iterable[Item]) -> frozenset[Item]:  # what a union or a difference of these is
        return frozenset(items)

    def __contains__(self, signature: object) -> bool:
        with self._lock:
            task = self._view.task_with_signature(str(signature))
        return task is not None and task.status == "complete" and not task.orphaned

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(self._view.complete_signatures())

    def __len__(self) -> int:
        with self._lock:
            return self._view.counts().complete
