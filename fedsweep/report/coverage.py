"""What of a sweep has no result, and what that leaves to be said of the cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, product
from operator import itemgetter
from typing import TYPE_CHECKING, Any, get_args

from fedsweep.manager.gaps import Gap, Reason
from fedsweep.report.labels import is_empty, levels, parameters, sorted_cells, varying

if TYPE_CHECKING:
    import pandas as pd

REASONS: tuple[Reason, ...] = get_args(Reason)
COUNTS = tuple(f"n_{reason}" for reason in REASONS)
WORDS = {"failed": "failed", "cancelled": "cancelled", "unfinished": "not finished"}
SHOWN = 4  # cells that are named in one sentence
MOST_COMBINATIONS = 10_000  # among which the missing ones are looked for

Key = tuple[Any, ...]
Pair = Callable[[str, Any], str]


def with_gaps(summary: pd.DataFrame, rows: pd.DataFrame, gaps: Sequence[Gap] | None) -> pd.DataFrame:
    """The cells of a summary and those without any row; of each, how many seeds failed, were cancelled, are unfinished.

    Args:
        summary: what `summarise` gives.
        rows: of which it is.
        gaps: what has no result. None says that it is not known; then the cells are those of the summary, without the
            three columns.
    """
    if gaps is None:
        return summary
    names = ["phase", *parameters(summary)]
    lacking = _count(names, rows, gaps)
    known = _keys(summary[names])
    counts = [lacking.pop(key, Counter()) for key in known]
    added = [dict(zip(names, key, strict=True)) | {"n_seeds": 0, "n_diverged": 0} for key in lacking]
    table = _append(summary, added)
    counts += lacking.values()
    return table.assign(**{f"n_{reason}": [count[reason] for count in counts] for reason in REASONS})


def _count(names: Sequence[str], rows: pd.DataFrame, gaps: Iterable[Gap]) -> dict[Key, Counter[Reason]]:
    """Of each cell, how many seeds have no row, by reason."""
    columns = [*names, "seed"]
    seen = set(_keys(rows[columns])) if gaps else set()
    lacking: dict[Key, Counter[Reason]] = {}
    for gap in gaps:
        values = {**gap.values, "phase": gap.phase}
        key = _key(values[name] for name in columns)
        if key not in seen:
            seen.add(key)
            lacking.setdefault(key[:-1], Counter())[gap.reason] += 1
    return lacking


def _keys(frame: pd.DataFrame) -> list[Key]:
    return [_key(values) for values in frame.itertuples(index=False, name=None)]


def _key(values: Iterable[Any]) -> Key:
    return tuple(None if is_empty(value) else value for value in values)


def _append(summary: pd.DataFrame, added: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The summary with these rows behind its own, every column of its type as far as that holds them."""
    import pandas as pd

    if not added:
        return summary
    columns = {}
    for name in summary.columns:
        values = [row.get(name) for row in added]
        kind: Any = summary[name].dtype
        if kind == "int64" and None in values:
            kind = "Int64" if name in parameters(summary) else "float64"
        columns[name] = pd.Series([*summary[name], *values], dtype=kind)
    return pd.DataFrame(columns)


def is_plan_known(cells: pd.DataFrame) -> bool:
    """Whether it is known what else there should be."""
    return set(COUNTS) <= set(cells.columns)


def runs(cells: pd.DataFrame) -> pd.Series:
    """How many seeds of each cell have a row, diverged ones too."""
    return cells["n_seeds"] + cells["n_diverged"]


def lacking(cells: pd.DataFrame) -> pd.Series:
    """How many seeds of each cell are known to have no result."""
    import pandas as pd

    if not is_plan_known(cells):
        return pd.Series(0, index=cells.index)
    return cells[list(COUNTS)].sum(axis=1)


def reasons(counts: Mapping[Any, int]) -> str:
    """How many have no result for which reason: `3 failed, 1 not finished`."""
    return ", ".join(f"{counts[f'n_{reason}']} {WORDS[reason]}" for reason in REASONS if counts[f"n_{reason}"])


def coverage_note(cells: pd.DataFrame, pair: Pair) -> str:
    """What of these cells has no result, in a sentence without its end; empty if nothing is known to be missing.

    `pair` writes a parameter with its value.
    """
    cells = sorted_cells(cells)
    return _known_note(cells, pair) if is_plan_known(cells) else _unbalanced_note(cells, pair)


def _known_note(cells: pd.DataFrame, pair: Pair) -> str:
    lost = lacking(cells)
    if not lost.any():
        return ""
    counts = {name: int(cells[name].sum()) for name in COUNTS}
    have = "has" if lost.sum() == 1 else "have"
    note = f"{lost.sum()} of {(runs(cells) + lost).sum()} runs {have} no result ({reasons(counts)})"
    is_bare = runs(cells) == 0
    if is_bare.all() or len(cells) == 1:
        return note
    whole = [f"all with {words}" for words, _ in _covering(cells, is_bare, pair)]
    return f"{note}: {_listed([*whole, *_partly(cells, pair)])}"


def _partly(cells: pd.DataFrame, pair: Pair) -> list[str]:
    """The cells that lack some of their seeds, those together that lack the same number of as many."""
    lost, there, parts = lacking(cells), runs(cells), []
    for missing, left in dict.fromkeys(zip(lost, there, strict=True)):
        if not missing or not left:
            continue
        are_such = (lost == missing) & (there == left)
        if are_such.all():
            return [f"{missing} of {missing + left} in each cell"]
        for words, count in _covering(cells, are_such, pair):
            parts.append(f"{missing} of {missing + left} {'in each cell ' if count > 1 else ''}with {words}")
    return parts


def _covering(cells: pd.DataFrame, which: pd.Series, pair: Pair) -> list[tuple[str, int]]:
    """These cells in few words: values, or pairs of them, that no other cell has; then what is left, each by itself.

    With each goes how many of the cells it names.
    """
    names, found = varying(cells), []
    every, others = (_keys(cells.loc[some, names]) for some in (which, ~which))
    these = every
    for places in (some for size in (1, 2) for some in combinations(range(len(names)), size)):
        part = itemgetter(*places)
        elsewhere = {part(cell) for cell in others}
        alone = {part(cell): cell for cell in these if part(cell) not in elsewhere}
        counts = Counter(map(part, every))
        for key, cell in alone.items():
            found.append(
                (_words([names[place] for place in places], [cell[place] for place in places], pair), counts[key])
            )
        these = [cell for cell in these if part(cell) in elsewhere]
    return found + [(_words(names, cell, pair), 1) for cell in these]


def _words(names: Iterable[str], values: Iterable[Any], pair: Pair) -> str:
    return ", ".join(pair(name, value) for name, value in zip(names, values, strict=True))


def _listed(parts: Sequence[str]) -> str:
    more = [f"and {len(parts) - SHOWN} more"] if len(parts) > SHOWN else []
    return "; ".join([*parts[:SHOWN], *more])


def _unbalanced_note(cells: pd.DataFrame, pair: Pair) -> str:
    """What rows alone tell: cells with fewer seeds than others, and combinations of their values that are not there."""
    notes = []
    most = int(runs(cells).max())
    if fewer := int((runs(cells) < most).sum()):
        have = "has" if fewer == 1 else "have"
        notes.append(f"{fewer} of {len(cells)} cells {have} fewer than {most} seeds")
    names = varying(cells)
    values = [levels(name, cells[name]) for name in names]
    total = math.prod(map(len, values))
    if total > len(cells):
        have = "has" if total - len(cells) == 1 else "have"
        note = f"{total - len(cells)} of {total} combinations of values {have} no row"
        if total <= MOST_COMBINATIONS:
            there = set(_keys(cells[names]))
            note += ": " + _listed([_words(names, key, pair) for key in product(*values) if key not in there])
        notes.append(note)
    return "; ".join(notes)
