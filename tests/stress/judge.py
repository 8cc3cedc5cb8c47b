"""Whether a sweep kept its promises, judged by what its clients said and heard, its ledger, and its results files.

Pure functions of values: each yields a sentence for everything that is wrong, beginning with the invariant's number.
That a ledger and its files agree is not enough. Work that was acknowledged, lost and silently done again leaves both
in order; only its clients know. So each computation must leave something in its result that no other does.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from facts import Ledger
from histories import Exchange

from fedsweep.manager.columns import RESULT_COLUMNS

MAX_FAILURES, MAX_LOSSES = 4, 5
END = float("inf")
PROOF_COLUMNS = ("mean_test_acc", "num_parameters", "plan", "worker")  # of a row, that must be those of the result


@dataclass(frozen=True)
class Handout:
    """An attempt, as the client heard of it that got it."""

    task_id: str
    attempt: int
    worker: str
    asked: float
    heard: float
    lease_s: float


def problems(history: Sequence[Exchange], ledger: Ledger, files: Mapping[str, bytes]) -> list[str]:
    """Everything that is wrong with a sweep that is over.

    Args:
        history: every exchange of every client.
        ledger: as it was at the end.
        files: the content of the results file of every output folder that the ledger has cells in.
    """
    given = handouts(history)
    return [
        *one_result(history, ledger),
        *acknowledged_is_kept(history, ledger),
        *acknowledged_is_not_asked_for_again(history, given),
        *files_are_exact(ledger, files),
        *attempts_only_grow(given, ledger),
        *no_two_leases(history, given, ledger),
        *counts_add_up(history, ledger),
        *failed_by_their_own_code(history, ledger),
    ]


# ---- what was said


def of_type(history: Iterable[Exchange], kind: str) -> Iterator[Exchange]:
    """The exchanges with requests of this type."""
    return (exchange for exchange in history if exchange.request["type"] == kind)


def is_ack(exchange: Exchange, status: str | None = None) -> bool:
    """Whether the answer is an acknowledgement (with this status)."""
    answer = exchange.answer or {}
    return answer.get("type") == "ack" and (status is None or answer.get("status") == status)


def counts_for(exchange: Exchange, task_id: str) -> bool:
    """Whether the manager took what was said of this task as coming from its open attempt."""
    return is_ack(exchange) and task_id not in (exchange.answer or {}).get("drop", ())


def handouts(history: Iterable[Exchange]) -> list[Handout]:
    """Every hand-out that a client heard of."""
    found = []
    for exchange in of_type(history, "request_task"):
        answer = exchange.answer or {}
        tasks = answer.get("tasks") or ([answer["task"]] if "task" in answer else [])
        found += [
            Handout(
                task_id=task["task_id"],
                attempt=task["attempt"],
                worker=exchange.request["worker_id"],
                asked=exchange.sent,
                heard=exchange.heard or 0.0,
                lease_s=task["lease_s"],
            )
            for task in tasks
        ]
    return found


def renewals(history: Iterable[Exchange]) -> dict[int, list[float]]:
    """For each attempt, when those heartbeats were sent that the manager took as its own."""
    found: dict[int, list[float]] = defaultdict(list)
    for exchange in of_type(history, "heartbeat"):
        for task in exchange.request["tasks"]:
            if counts_for(exchange, task["task_id"]):
                found[task["attempt"]].append(exchange.sent)
    return found


def plain(data: Mapping[str, Any]) -> str:
    """A result as one text, to compare; a history of no rounds is none."""
    return json.dumps({name: value for name, value in data.items() if name != "history" or value}, sort_keys=True)


# ---- the invariants


def one_result(history: Sequence[Exchange], ledger: Ledger) -> Iterator[str]:
    """I1: at most one result for each signature; told `accepted` once."""
    signatures = {task.task_id: task.signature for task in ledger.tasks}
    for signature, count in Counter(signatures[result.task_id] for result in ledger.results).items():
        if count > 1:
            yield f"I1: the ledger has {count} results of {signature}"
    accepted = Counter(
        each.request["task_id"] for each in of_type(history, "submit_result") if is_ack(each, "accepted")
    )
    for task_id, count in accepted.items():
        if count > 1:
            yield f"I1: {count} results of {task_id} were accepted"
    taken: dict[str, list[float]] = defaultdict(list)  # task -> when those were sent that may be its result
    for each in of_type(history, "submit_result"):
        if each.answer is None or is_ack(each, "accepted"):
            taken[each.request["task_id"]].append(each.sent)
    for each in of_type(history, "submit_result"):
        if is_ack(each, "duplicate") and not any(sent < (each.heard or END) for sent in taken[each.request["task_id"]]):
            yield f"I1: {each.request['task_id']}: a result is called a duplicate before another was sent"


def acknowledged_is_kept(history: Sequence[Exchange], ledger: Ledger) -> Iterator[str]:
    """I2: every acknowledged result is in the ledger, byte for byte, and nothing else is."""
    kept = {result.task_id: plain(result.data) for result in ledger.results}
    sent: dict[str, set[str]] = defaultdict(set)
    for each in of_type(history, "submit_result"):
        task_id, content = each.request["task_id"], plain(each.request["result_data"])
        sent[task_id].add(content)
        if is_ack(each) and task_id not in kept:
            yield f"I2: {task_id}: a result was acknowledged ({each.answer}), and the ledger has none"
        elif is_ack(each, "accepted") and kept[task_id] != content:
            yield f"I2: {task_id}: {content} was acknowledged, and the ledger has {kept[task_id]}"
    for task_id, content in kept.items():
        if content not in sent[task_id]:
            yield f"I2: {task_id}: the ledger has a result that nobody sent: {content}"


def acknowledged_is_not_asked_for_again(history: Sequence[Exchange], given: Sequence[Handout]) -> Iterator[str]:
    """I2, seen while it lasts: what is acknowledged is done, so it is neither handed out nor uncounted again."""
    done: dict[str, float] = {}  # task -> when this was first heard
    for each in of_type(history, "submit_result"):
        if is_ack(each) and each.heard is not None:
            task_id = each.request["task_id"]
            done[task_id] = min(each.heard, done.get(task_id, each.heard))
    for handout in given:
        if handout.task_id in done and handout.asked > done[handout.task_id]:
            yield f"I2: {handout.task_id} was handed out as attempt {handout.attempt} after it was acknowledged"
    moments = sorted(done.values())
    for each in of_type(history, "status"):
        if each.answer is not None and not each.is_refused:
            before = sum(moment < each.sent for moment in moments)
            if each.answer["status"]["complete"] < before:
                yield f"I2: status tells {each.answer['status']['complete']} complete after {before} acknowledgements"
    ends = [each.heard for each in of_type(history, "request_task") if (each.answer or {}).get("done") and each.heard]
    for handout in given:
        if ends and handout.asked > min(ends):
            yield f"I2: {handout.task_id} was handed out after a worker was told that all is done"


def files_are_exact(ledger: Ledger, files: Mapping[str, bytes]) -> Iterator[str]:
    """I3: each file parses, and has one row for each cell whose task has a result, with that result's values."""
    signatures = {task.task_id: task.signature for task in ledger.tasks}
    results = {result.task_id: result.data for result in ledger.results}
    for output_dir, content in files.items():
        try:
            header, rows = read_rows(content)
        except ValueError as error:
            yield f"I3: {output_dir}: {error}"
            continue
        cells = [cell for cell in ledger.cells if cell.output_dir == output_dir and cell.task_id in results]
        names = sorted({name for cell in cells for name in cell.spelled} & set(header))
        expected = Counter(
            _shape(cell.phase, signatures[cell.task_id], cell.spelled, results[cell.task_id], names) for cell in cells
        )
        found = Counter(_shape(row.get("phase"), row.get("signature"), row, row, names) for row in rows)
        for shape, count in (expected - found).items():
            yield f"I3: {output_dir}: {count} row(s) missing: {shape}"
        for shape, count in (found - expected).items():
            yield f"I3: {output_dir}: {count} row(s) too many: {shape}"


def read_rows(content: bytes) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a results file, strictly read.

    Raises:
        ValueError: it is not one, or not whole.
    """
    if not content:
        return [], []
    if not content.endswith(b"\n"):
        raise ValueError(f"the last row is torn: {content[-60:]!r}")
    try:
        header, *rows = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"it cannot be read: {error}") from None
    if tuple(header[: len(RESULT_COLUMNS)]) != RESULT_COLUMNS or len(set(header)) < len(header):
        raise ValueError(f"this is no header: {header}")
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} fields where the header has {len(header)}: {row}")
    return header, [dict(zip(header, row, strict=True)) for row in rows]


def _shape(
    phase: object, signature: object, cell: Mapping[str, Any], result: Mapping[str, Any], names: Iterable[str]
) -> tuple[str, ...]:
    values = (phase, signature, *(cell.get(name) for name in names), *(result.get(name) for name in PROOF_COLUMNS))
    return tuple("" if value is None else str(value) for value in values)


def attempts_only_grow(given: Sequence[Handout], ledger: Ledger) -> Iterator[str]:
    """I4: no attempt is handed out twice, a later one has a higher number, and the ledger knows each."""
    known = {attempt.number: (attempt.task_id, attempt.worker) for attempt in ledger.attempts}
    for number, count in Counter(handout.attempt for handout in given).items():
        if count > 1:
            yield f"I4: attempt {number} was handed out {count} times"
    for handout in given:
        if known.get(handout.attempt) != (handout.task_id, handout.worker):
            yield f"I4: the ledger says of attempt {handout.attempt}: {known.get(handout.attempt)}; heard was {handout}"
    for earlier, later in _pairs(given):
        if earlier.heard <= later.asked and earlier.attempt >= later.attempt:
            yield f"I4: {earlier.task_id}: attempt {later.attempt} was handed out after {earlier.attempt}"


def _pairs(given: Sequence[Handout]) -> Iterator[tuple[Handout, Handout]]:
    """Every two hand-outs of one task, the one heard of first before the other."""
    by_task: dict[str, list[Handout]] = defaultdict(list)
    for handout in sorted(given, key=lambda each: each.heard):
        by_task[handout.task_id].append(handout)
    for of_one in by_task.values():
        for place, earlier in enumerate(of_one):
            for later in of_one[place + 1 :]:
                yield earlier, later


def no_two_leases(history: Sequence[Exchange], given: Sequence[Handout], ledger: Ledger) -> Iterator[str]:
    """I5: an attempt ends (by its own word, or since its lease has ended) before there is another of its task."""
    is_open = Counter(attempt.task_id for attempt in ledger.attempts if attempt.ended_as is None)
    for task_id, count in is_open.items():
        if count > 1:
            yield f"I5: the ledger has {count} open attempts of {task_id}"
    given_up: dict[int, float] = {}
    late: dict[int, float] = {}  # attempt -> when it last said something that counted
    for each in (*of_type(history, "task_failed"), *of_type(history, "release")):
        attempt = each.request["attempt"]
        given_up[attempt] = min(each.sent, given_up.get(attempt, each.sent))
        if counts_for(each, each.request["task_id"]):
            late[attempt] = max(each.sent, late.get(attempt, each.sent))
    renewed = renewals(history)
    for one, other in _pairs(given):
        old, new = (one, other) if one.attempt < other.attempt else (other, one)
        alive = max((old.asked, *renewed[old.attempt]))
        is_lapsed = new.heard >= alive + old.lease_s
        if not is_lapsed and given_up.get(old.attempt, new.heard) >= new.heard:
            yield (
                f"I5: {old.task_id}: attempt {new.attempt} was handed out {new.heard - alive:.3f} s after attempt "
                f"{old.attempt} was alive, whose lease is {old.lease_s} s"
            )
        if late.get(old.attempt, new.heard) > new.heard:
            yield f"I5: {old.task_id}: attempt {old.attempt} was given back while {new.attempt} was open"


def counts_add_up(history: Sequence[Exchange], ledger: Ledger) -> Iterator[str]:
    """I6: pending + assigned + complete + failed = total, for the ledger and in every answer."""
    counted = Counter(task.status for task in ledger.tasks)
    if ledger.counted is not None and counted != Counter(ledger.counted):
        yield f"I6: the ledger counts {dict(ledger.counted)} and has {dict(counted)}"
    with_result = {result.task_id for result in ledger.results}
    for task in ledger.tasks:
        if (task.status == "complete") != (task.task_id in with_result):
            yield f"I6: {task.task_id} is {task.status}, and has {'a' if task.task_id in with_result else 'no'} result"
    for each in of_type(history, "status"):
        if each.answer is not None and not each.is_refused:
            status = each.answer["status"]
            if sum(status[name] for name in ("pending", "assigned", "complete", "failed")) != status["total"]:
                yield f"I6: the status does not add up: {status}"


def failed_by_their_own_code(history: Sequence[Exchange], ledger: Ledger) -> Iterator[str]:
    """I7: a failure counts that a worker reported and no other; a task is failed once a budget is spent."""
    reported: dict[int, bool] = {}  # attempt -> whether it was told that its failure counts
    released: dict[int, bool] = {}
    for kind, said in (("task_failed", reported), ("release", released)):
        for each in of_type(history, kind):
            attempt = each.request["attempt"]
            said[attempt] = said.get(attempt, False) or counts_for(each, each.request["task_id"])
    heard = {handout.attempt for handout in handouts(history)}
    ends: dict[str, Counter[str]] = defaultdict(Counter)
    for attempt in ledger.attempts:
        is_failed, is_released = attempt.ended_as in ("failed", "forgiven"), attempt.ended_as == "released"
        ends[attempt.task_id][attempt.ended_as or "open"] += 1
        if is_failed and attempt.number not in reported:
            yield f"I7: {attempt} ended so, and no worker said it"
        if reported.get(attempt.number) and not is_failed:
            yield f"I7: {attempt}: its failure was acknowledged"
        if is_released and attempt.number in heard and attempt.number not in released:
            yield f"I7: {attempt} ended so, and its worker did not give it back"
        if released.get(attempt.number) and not is_released:
            yield f"I7: {attempt}: its release was acknowledged"
    for task in ledger.tasks:
        counted = ends[task.task_id]
        if task.failures > counted["failed"] or task.losses > counted["lost"]:
            yield f"I7: {task} has attempts that ended as {dict(counted)}"
        if task.status == "failed" and task.failures < MAX_FAILURES and task.losses < MAX_LOSSES:
            yield f"I7: {task} is failed with budgets left"
