"""What must hold of a state directory and its results files at rest, whatever happened. Looks only.

The invariants have numbers, so that tests, docs and `fedsweep doctor` speak of the same things:

    I0  the ledger's file is whole: indices agree with their tables, and every reference leads somewhere
    I1  a task has one result at most
    I2  every acknowledged result is in the ledger as it was sent
    I3  a results file has a valid header, rows that all parse, and one row for each cell that has a result
    I4  attempt numbers only grow, over restarts too
    I5  a task has one open attempt at most
    I6  pending + assigned + complete + failed = total
    I7  a task is failed only after four failures of its own, or five losses, or because it was cancelled
    I8  a sweep is over only when every task is complete or failed and I3 holds
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsweep.errors import StateError
from fedsweep.files import read_word
from fedsweep.manager.columns import FILE_NAME, PARAMETERS, RowFormat, header
from fedsweep.manager.csv_lines import BYTE_ORDER_MARK, Header, read_header, read_row, split
from fedsweep.manager.failures import CANCELLED_ERROR
from fedsweep.manager.ledger import MAX_FAILURES, MAX_LOSSES
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.opening import reading
from fedsweep.manager.protocol import ResultData
from fedsweep.manager.records import Row
from fedsweep.manager.state_dir import LEDGER_FILE, STATUS_FILE

# What SQLite says of indices and values; whatever else it finds is damage.
_MENDABLE = re.compile(r"(missing from|wrong # of entries in|non-unique entry in) index|constraint failed")
SHOWN = 5  # of several alike in one message


@dataclass(frozen=True, order=True)
class Violation:
    """Something that does not hold: which invariant, in which file, and what is there instead of what."""

    invariant: str  # I0 to I8
    where: str  # a file, with a line number where there is one: `out/a/final_results.csv:7`
    what: str
    is_derived: bool  # whether it can be made again from what the ledger says elsewhere

    def __str__(self) -> str:
        return f"{self.invariant} {self.where}: {self.what}"


def check(
    state_dir: str | Path,
    *,
    folder: str | Path = ".",
    acknowledged: Mapping[str, Mapping[str, Any]] | None = None,
    has_ended: bool = False,
) -> list[Violation]:
    """Everything that does not hold of a state directory that no manager writes to meanwhile. Changes nothing.

    Args:
        state_dir: the folder with the ledger.
        folder: what relative output folders are relative to, the current folder of the manager.
        acknowledged: results by signature, as they were sent and acknowledged.
        has_ended: whether the manager has ended saying that all is done (status 0 or 1).

    Raises:
        StateError: there is no ledger, or it cannot be read.
    """
    ledger = Path(state_dir) / LEDGER_FILE
    with reading(ledger) as db:
        found = [*check_ledger(db, str(ledger)), *check_files(db, folder), *_check_last_status(db, ledger.parent)]
        if acknowledged is not None:
            found += check_acknowledged(db, str(ledger), acknowledged)
        if has_ended:
            found += check_end(db, str(ledger), found)
    return found


# ---- the ledger ---------------------------------------------------------------------------------------------------


def check_ledger(db: sqlite3.Connection, where: str) -> list[Violation]:
    """What does not hold within the ledger (I0 to I2, I4 to I7)."""
    found = list(_check_storage(db, where))
    found += [
        Violation(rule.invariant, where, rule.message.format(_some(tasks)), rule.is_derived)
        for rule in RULES
        if (tasks := [row[0] for row in db.execute(rule.query)])
    ]
    return [*found, *_check_results(db, where), *_check_counts(db, where)]


def _check_storage(db: sqlite3.Connection, where: str) -> Iterator[Violation]:
    problems = [" ".join(str(row[0]).split()) for row in db.execute("PRAGMA integrity_check(20)")]
    if problems != ["ok"]:
        if damaged := [problem for problem in problems if not _MENDABLE.search(problem)]:
            raise sqlite3.DatabaseError(damaged[0])
        yield Violation("I0", where, _some(problems), is_derived=True)
    if dangling := [f"{row[0]}:{row[1]}" for row in db.execute("PRAGMA foreign_key_check")]:
        yield Violation("I0", where, f"rows that refer to none: {_some(dangling)}", is_derived=False)


@dataclass(frozen=True)
class _Rule:
    """A query that names the tasks of which something does not hold, and what."""

    invariant: str
    message: str
    query: str
    is_derived: bool = False


# What is held against a task must have happened to its attempts; another state's failures came without any.
COUNTED = "(SELECT count(*) FROM attempts a WHERE a.task = t.number AND a.ended_as = '{}')"
NO_TAKE_OVER = "NOT EXISTS (SELECT 1 FROM meta WHERE key = 'taken_over')"
RULES = (
    _Rule(
        "I1",
        "more than one result of {}",
        "SELECT t.task_id FROM results r JOIN tasks t ON t.number = r.task GROUP BY r.task HAVING count(*) > 1",
    ),
    _Rule("I1", "more than one task for {}", "SELECT signature FROM tasks GROUP BY signature HAVING count(*) > 1"),
    _Rule("I1", "more than one task is called {}", "SELECT task_id FROM tasks GROUP BY task_id HAVING count(*) > 1"),
    _Rule(
        "I2",
        "complete, but without a result: {}",
        "SELECT task_id FROM tasks WHERE status = 'complete' AND number NOT IN (SELECT task FROM results)",
        is_derived=True,
    ),
    _Rule(
        "I2",
        "there is a result, but it is not complete: {}",
        "SELECT task_id FROM tasks WHERE status != 'complete' AND number IN (SELECT task FROM results)",
        is_derived=True,
    ),
    _Rule(
        "I2",
        "an attempt brought a result that is not there: {}",  # its row may still hold it
        "SELECT DISTINCT t.task_id FROM attempts a JOIN tasks t ON t.number = a.task "
        "WHERE a.ended_as = 'result' AND a.task NOT IN (SELECT task FROM results)",
    ),
    _Rule(
        "I4",
        "its open attempt is not its last: {}",
        "SELECT t.task_id FROM tasks t JOIN attempts a ON a.task = t.number "
        "GROUP BY t.number HAVING t.attempt < max(a.number)",
    ),
    _Rule(
        "I4",
        "the next attempt would get a number that was given out already; the last was {}",
        "SELECT last FROM (SELECT max(number) AS last FROM attempts) "
        "WHERE last > coalesce((SELECT max(seq) FROM sqlite_sequence WHERE name = 'attempts'), 0)",
        is_derived=True,
    ),
    _Rule(
        "I4",
        "its result came from an attempt that was never made: {}",
        "SELECT t.task_id FROM results r JOIN tasks t ON t.number = r.task "
        "LEFT JOIN attempts a ON a.number = r.attempt WHERE r.attempt IS NOT NULL AND a.task IS NOT r.task",
    ),
    _Rule(
        "I5",
        "more than one open attempt of {}",
        "SELECT t.task_id FROM attempts a JOIN tasks t ON t.number = a.task WHERE a.ended_as IS NULL "
        "GROUP BY a.task HAVING count(*) > 1",
        is_derived=True,
    ),
    _Rule(
        "I5",
        "assigned to an attempt that is not open, or open and not assigned: {}",
        "SELECT t.task_id FROM tasks t LEFT JOIN attempts a ON a.task = t.number AND a.ended_as IS NULL "
        "WHERE t.attempt IS NOT a.number GROUP BY t.number",
        is_derived=True,
    ),
    _Rule(
        "I6",
        "in none of the four states: {}",
        "SELECT task_id FROM tasks WHERE status NOT IN ('pending', 'assigned', 'complete', 'failed') "
        "OR (status = 'assigned') != (attempt IS NOT NULL)",
        is_derived=True,
    ),
    _Rule(
        "I7",
        f"failed, but neither {MAX_FAILURES} failures nor {MAX_LOSSES} losses: {{}}",
        f"SELECT task_id FROM tasks t WHERE status = 'failed' AND failures < {MAX_FAILURES} AND losses < {MAX_LOSSES} "
        f"AND last_error IS NOT '{CANCELLED_ERROR}'",
        is_derived=True,
    ),
    _Rule(
        "I7",
        "more failures or losses are held against it than its attempts had: {}",
        f"SELECT task_id FROM tasks t WHERE (failures > {COUNTED.format('failed')} "
        f"OR losses > {COUNTED.format('lost')}) AND {NO_TAKE_OVER}",
        is_derived=True,
    ),
)


def _check_results(db: sqlite3.Connection, where: str) -> Iterator[Violation]:
    query = "SELECT t.task_id, r.data, r.history FROM results r JOIN tasks t ON t.number = r.task"
    bad = [task_id for task_id, data, history in db.execute(query) if not is_result(data, history)]
    if bad:
        yield Violation("I2", where, f"the result cannot be read: {_some(bad)}", is_derived=True)


def is_result(data: str, history: str | None) -> bool:
    """Whether this is the text of a result and its history, as the ledger keeps them."""
    try:
        whole = _strict(data) | ({} if history is None else {"history": _strict(history)})
        ResultData.model_validate(whole)
    except (ValidationError, ValueError, TypeError):
        return False
    return True


def _strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def _check_counts(db: sqlite3.Connection, where: str) -> Iterator[Violation]:
    """Whether the amounts that are kept beside the tasks are those of the tasks."""
    kept = {tuple(key): amount for *key, amount in db.execute("SELECT * FROM counts") if amount}
    real = Counter(tuple(row) for row in db.execute("SELECT status, orphaned, diverged FROM tasks"))
    if kept != real:
        total, by_state = sum(kept.values()), ", ".join(f"{amount} {key[0]}" for key, amount in sorted(kept.items()))
        what = f"counted are {by_state or 'none'}, {total} in all; there are {_by_state(real)}, {real.total()} in all"
        yield Violation("I6", where, what, is_derived=True)
    unfinished = {cost: amount for cost, amount in db.execute("SELECT cost, amount FROM unfinished") if amount}
    waiting = "SELECT cost, count(*) FROM tasks WHERE status IN ('pending', 'assigned') AND orphaned = 0 GROUP BY cost"
    if unfinished != {cost: amount for cost, amount in db.execute(waiting)}:
        yield Violation("I6", where, "what is noted as unfinished is not what waits or is assigned", is_derived=True)


def _by_state(counted: Counter[tuple[Any, ...]]) -> str:
    return ", ".join(f"{amount} {key[0]}" for key, amount in sorted(counted.items())) or "none"


def check_acknowledged(
    db: sqlite3.Connection, where: str, acknowledged: Mapping[str, Mapping[str, Any]]
) -> Iterator[Violation]:
    """Whether every one of these results, by signature, is in the ledger as it was sent (I2)."""
    kept = dict(LedgerView(db).results())
    lost = sorted(signature for signature in acknowledged if signature not in kept)
    if lost:
        yield Violation("I2", where, f"acknowledged, but not there: {_some(lost)}", is_derived=False)
    changed = [
        signature
        for signature, result in acknowledged.items()
        if signature in kept and _canonical(kept[signature]) != _canonical(result)
    ]
    if changed:
        yield Violation("I2", where, f"not as it was acknowledged: {_some(sorted(changed))}", is_derived=False)


def _canonical(result: Mapping[str, Any]) -> str:
    return json.dumps(result, sort_keys=True)


def check_end(db: sqlite3.Connection, where: str, found: Iterable[Violation]) -> Iterator[Violation]:
    """Whether a sweep that is over has nothing left to do (I8); `found` is what does not hold besides."""
    counts = LedgerView(db).counts()
    if not counts.is_terminal:
        left = f"{counts.pending} pending and {counts.assigned} assigned"
        yield Violation("I8", where, f"the sweep has ended with {left}", is_derived=False)
    if files := sorted({violation.where for violation in found if violation.invariant == "I3"}):
        yield Violation("I8", where, f"the sweep has ended, but not all rows stand in {_some(files)}", is_derived=True)


def _check_last_status(db: sqlite3.Connection, state_dir: Path) -> Iterator[Violation]:
    """Whether every task that was complete when the manager last ended still has its result: none ever goes (I8)."""
    complete = read_word(state_dir / STATUS_FILE).get("complete")
    if not isinstance(complete, int):
        return  # none was left, or it is no such file; it only ever informs
    (results,) = db.execute("SELECT count(*) FROM results").fetchone()
    if results < complete:
        what = f"when the last manager ended, {complete} experiments were complete; the ledger has {results} results"
        yield Violation("I8", str(state_dir / STATUS_FILE), what, is_derived=False)


# ---- the results files --------------------------------------------------------------------------------------------


def check_files(db: sqlite3.Connection, folder: str | Path) -> Iterator[Violation]:
    """What does not hold of the results file of every output folder (I3)."""
    view = LedgerView(db)
    for output_dir, is_active in view.output_dirs().items():
        path = Path(folder) / output_dir / FILE_NAME
        try:
            rows = list(view.rows_in(output_dir))
        except StateError:
            continue  # a result cannot be read, which is said of the ledger
        if not os.path.exists(path):
            if rows and is_active:  # a folder of an earlier grid may have been removed
                what = f"it is missing; the ledger has {len(rows)} rows for it"
                yield Violation("I3", str(path), what, is_derived=True)
        elif not path.is_file():
            yield Violation("I3", str(path), "it is not a regular file", is_derived=False)
        else:
            try:
                content = path.read_bytes()
            except OSError as error:
                yield Violation("I3", str(path), f"it cannot be read ({error.strerror})", is_derived=False)
            else:
                yield from check_file(str(path), content, rows, view.varying(output_dir))


def check_file(where: str, content: bytes, rows: Iterable[Row], varying: Iterable[str]) -> Iterator[Violation]:
    """What does not hold of a results file that must have these rows (I3). Rows of others may stand in it too."""

    def violation(what: str, line: int = 0) -> Violation:
        return Violation("I3", f"{where}:{line}" if line else where, what, is_derived=True)

    lines, tail = split(content)
    found = read_header(lines[0]) if lines else None
    if found is None:
        yield violation("its first line is no header of a results file", 1)
        return
    lacking = sorted(set(header(varying)) - set(found.columns))
    if lacking or not found.is_plain or not found.starts_as_ours:
        yield violation(_header_problem(found, lines[0], lacking), 1)
        return
    if tail:
        yield violation("the last line has no end", len(lines) + 1)
    yield from _check_rows(violation, lines, found, rows)


def _header_problem(found: Header, raw: bytes, lacking: list[str]) -> str:
    if lacking:
        return f"the header has no {_some(lacking)}"
    if not found.starts_as_ours:
        return "the header does not start with the columns of every results file in their order"
    marked = " and a byte-order mark" if raw.startswith(BYTE_ORDER_MARK) else ""
    ends = " and CRLF line ends" if raw.endswith(b"\r") else ""
    between = " and semicolons" if found.delimiter == ";" else ""
    return f"the header is not as we write it: it has{(marked + ends + between).removeprefix(' and') or ' quotes'}"


def _check_rows(
    violation: Callable[..., Violation], lines: list[bytes], found: Header, rows: Iterable[Row]
) -> Iterator[Violation]:
    names = ("phase", "signature", *(name for name in found.columns if name in PARAMETERS))

    def cell_of(raw: bytes) -> tuple[str, ...]:
        row = read_row(raw, found)
        return tuple(row.get(name, "") for name in names)

    expected = {cell_of(raw): raw for raw in map(RowFormat(found.columns), rows)}
    seen: dict[tuple[str, ...], int] = {}
    for number, raw in enumerate(lines[1:], start=2):
        try:
            cell = cell_of(raw)
        except ValueError as error:
            yield violation(f"this is no row: {error}", number)
            continue
        if cell not in expected:
            continue  # of others
        if cell in seen:
            yield violation(f"the row of line {seen[cell]} stands here again", number)
        elif raw != expected[cell]:
            yield violation(_difference(read_row(raw, found), read_row(expected[cell], found)), number)
        seen.setdefault(cell, number)
    if missing := len(expected) - len(seen):
        yield violation(f"{missing} of {len(expected)} rows are missing")


def _difference(row: Mapping[str, str], expected: Mapping[str, str]) -> str:
    names = [name for name in row if row[name] != expected.get(name, "")]
    if not names:
        return "the row is not written as we write it"
    name = names[0]
    more = f", and {len(names) - 1} more fields differ" if names[1:] else ""
    return f"{name} is {row[name][:80]!r} where the ledger has {expected.get(name, '')!r}{more}"


def _some(names: Iterable[Any]) -> str:
    """The first few of these, and how many more there are."""
    all_names = [str(name) for name in names]
    more = f" and {len(all_names) - SHOWN} more" if len(all_names) > SHOWN else ""
    return ", ".join(all_names[:SHOWN]) + more
