"""The cells of output folders that have no result: what the ledger knows and no results file can say."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsweep.manager.failures import CANCELLED_ERROR
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.opening import reading
from fedsweep.manager.records import Status
from fedsweep.manager.state_dir import LEDGER_FILE

Reason = Literal["failed", "cancelled", "unfinished"]


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A cell without a result."""

    phase: str
    values: dict[str, Any]  # the parameters as the grid of that phase spells them, the seed too
    reason: Reason


def find_gaps(state_dir: Path, folders: Iterable[Path]) -> dict[Path, list[Gap]]:
    """The gaps of those folders to which the present grid of a state directory writes, running or at rest.

    What the ledger calls by a relative name lies in the current folder, or beside the state directory.

    Raises:
        StateError: there is no ledger, or it cannot be read.
    """
    with reading(state_dir / LEDGER_FILE) as db:
        view = LedgerView(db)
        names = [name for name, is_active in view.output_dirs().items() if is_active]
        found: dict[Path, list[Gap]] = {}
        for folder in folders:
            for name in names:
                if os.path.realpath(folder) in _places(name, state_dir):
                    found.setdefault(folder, []).extend(
                        Gap(phase=phase, values=values, reason=_reason(status, error))
                        for phase, values, status, error in view.without_result(name)
                    )
    return found


def _places(name: str, state_dir: Path) -> set[str]:
    return {os.path.realpath(name), os.path.realpath(state_dir.absolute().parent / name)}


def _reason(status: Status, error: str | None) -> Reason:
    if status != "failed":
        return "unfinished"
    return "cancelled" if error == CANCELLED_ERROR else "failed"
