"""What the ledger knows of output folders and no results file can say: which cells the present grid asks for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsweep.manager.failures import CANCELLED_ERROR
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.opening import reading
from fedsweep.manager.records import Status
from fedsweep.manager.state_dir import LEDGER_FILE
from fedsweep.plan.experiment import unusual

Reason = Literal["failed", "cancelled", "unfinished"]
RowKey = tuple[str, str]  # phase and signature of a row


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A cell without a result."""

    phase: str
    values: dict[str, Any]  # the parameters as the grid of that phase spells them, the seed too
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """What a ledger knows of the cells of an output folder."""

    gaps: list[Gap]
    earlier: Mapping[RowKey, Sequence[Mapping[str, Any]]]
    """Phases and signatures that had cells of an earlier configuration, with the parameters of the cells that the
    present grid has of them: mostly none, but a result may have several cells, spelled differently."""
    signatures: frozenset[str]  # of all cells, those of an earlier configuration too
    settings: Mapping[str, Any]  # parameters that are the same in all present cells and are not as built in


def find_plans(state_dir: Path, folders: Iterable[Path], *, is_beside: bool = False) -> dict[Path, FolderPlan]:
    """The plans of those folders to which the present grid of a state directory writes, running or at rest.

    What the ledger calls by a relative name lies beside the state directory or, unless `is_beside` says where, in the
    current folder.

    Raises:
        StateError: there is no ledger, or it cannot be read.
    """
    bases = [state_dir.absolute().parent, *([] if is_beside else [Path.cwd()])]
    with reading(state_dir / LEDGER_FILE) as db:
        view = LedgerView(db)
        output_dirs = view.output_dirs()
        places = {name: {os.path.realpath(base / name) for base in bases} for name in output_dirs}
        found = {}
        for folder in folders:
            names = [name for name in output_dirs if os.path.realpath(folder) in places[name]]
            if any(output_dirs[name] for name in names):
                found[folder] = _plan(view, names)
    return found


def _plan(view: LedgerView, names: Sequence[str]) -> FolderPlan:
    """The plan of the folder that has these names."""
    gaps = [
        Gap(phase=phase, values=values, reason=_reason(status, error))
        for name in names
        for phase, values, status, error in view.without_result(name)
    ]
    earlier: dict[RowKey, list[dict[str, Any]]] = {}
    signatures = set()
    shared: dict[str, Any] | None = None
    for phase, signature, values, is_active in view.cells_in(names):  # those that are not active come first
        signatures.add(signature)
        if not is_active:
            earlier.setdefault((phase, signature), [])
            continue
        if (phase, signature) in earlier:
            earlier[phase, signature].append(values)
        shared = values if shared is None else {name: value for name, value in shared.items() if values[name] == value}
    return FolderPlan(gaps=gaps, earlier=earlier, signatures=frozenset(signatures), settings=unusual(shared or {}))


def _reason(status: Status, error: str | None) -> Reason:
    if status != "failed":
        return "unfinished"
    return "cancelled" if error == CANCELLED_ERROR else "failed"
