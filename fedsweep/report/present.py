"""Which rows of an output folder are those of the present grid, and what these have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsweep.manager.columns import RESULT_COLUMNS
from fedsweep.report.labels import is_empty, parameters

if TYPE_CHECKING:
    import pandas as pd

    from fedsweep.manager.gaps import FolderPlan


def planned_rows(rows: pd.DataFrame, plan: FolderPlan | None, every_row: bool = False) -> pd.DataFrame:
    """The rows without those of an earlier configuration, and with a column for each setting that all cells share.

    A row of others, which no cell ever had, stays. It may have been made with other settings: then there are no such
    columns.

    Args:
        rows: as `read_results` gives them.
        plan: of their folder; None, and nothing is changed, where it is not known.
        every_row: keep those of an earlier configuration.
    """
    if plan is None or "signature" not in rows:
        return rows
    kept = rows if every_row else _present(rows, plan)
    if not set(kept["signature"]) <= plan.signatures:
        return kept
    return kept.assign(**{name: value for name, value in plan.settings.items() if name not in kept})


def _present(rows: pd.DataFrame, plan: FolderPlan) -> pd.DataFrame:
    """The rows without those of an earlier configuration, and without the columns that only those needed."""
    names = parameters(rows)
    asked = {key: {tuple(values[name] for name in names) for values in cells} for key, cells in plan.earlier.items()}
    is_present = [
        (phase, signature) not in asked
        or tuple(None if is_empty(value) else value for value in values) in asked[phase, signature]
        for phase, signature, *values in rows[["phase", "signature", *names]].itertuples(index=False, name=None)
    ]
    if all(is_present):
        return rows
    kept = rows[is_present].reset_index(drop=True)
    return kept.drop(columns=[name for name in names if name not in RESULT_COLUMNS and _is_same(name, kept, plan)])


def _is_same(name: str, rows: pd.DataFrame, plan: FolderPlan) -> bool:
    """Whether a parameter is the same in all these rows and gaps."""
    values = {None if is_empty(value) else value for value in rows[name].unique()}
    return len(values | {gap.values[name] for gap in plan.gaps}) <= 1
