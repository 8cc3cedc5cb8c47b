"""The judge of sweeps: silent on good histories, and told apart by it every way to break each invariant."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from facts import Attempt, Cell, Ledger, Result, Task
from histories import Exchange, Recorder, read_history
from judge import problems

from fedsweep.manager.columns import RESULT_COLUMNS

LEASE_S = 10.0
HEADER = (*RESULT_COLUMNS, "signature", "plan", "worker")


def data(mark: str, worker: str = "v") -> dict[str, object]:
    return {"mean_test_acc": 0.5, "num_parameters": 650, "plan": mark, "worker": worker, "history": [{"round": 1}]}


def ask(at, worker, *given, client="c", done=False):
    """A request for tasks that is answered half a second later; `given` are pairs of a task and an attempt."""
    tasks = [{"task_id": task_id, "attempt": attempt, "lease_s": LEASE_S} for task_id, attempt in given]
    answer = {"type": "task", "task": tasks[0], "tasks": tasks} if tasks else {"type": "no_task", "done": done}
    return Exchange(client, at, {"type": "request_task", "worker_id": worker}, at + 0.5, answer)


def say(at, kind, task_id, attempt, drop=(), **fields):
    answer = {"type": "ack", "drop": list(drop)} if drop else {"type": "ack"}
    request = {"type": kind, "task_id": task_id, "worker_id": "v", "attempt": attempt, **fields}
    return Exchange("c", at, request, at + 0.5, answer)


def submit(at, task_id, attempt, mark, status: str | None = "accepted"):
    sent = say(at, "submit_result", task_id, attempt, result_data=data(mark))
    return (
        replace(sent, heard=None, answer=None)
        if status is None
        else replace(sent, answer={"type": "ack", "status": status})
    )


def beat(at, task_id, attempt, drop=()):
    request = {"type": "heartbeat", "worker_id": "v", "tasks": [{"task_id": task_id, "attempt": attempt}]}
    return Exchange("c", at, request, at + 0.5, {"type": "ack", "drop": list(drop)})


def status(at, complete, pending=0, assigned=0, failed=0, total=3):
    counts = {"complete": complete, "pending": pending, "assigned": assigned, "failed": failed, "total": total}
    return Exchange("c", at, {"type": "status"}, at + 0.5, {"type": "status", "status": counts})


# `a` is done at once; `b` is lost, then done by another whose acknowledgement is lost, so that it says it again; `c`
# raises, and is done.
GOOD = (
    ask(1, "v", ("a", 1), ("b", 2)),
    submit(2, "a", 1, "A"),
    status(3, complete=1, pending=1, assigned=1),
    beat(4, "b", 2),
    ask(15, "w", ("b", 3)),
    beat(16, "b", 2, drop=["b"]),
    ask(17, "v", ("c", 4)),
    say(18, "task_failed", "c", 4, error="raised"),
    submit(19, "b", 3, "B", status=None),
    submit(20, "b", 3, "B", status="duplicate"),
    ask(21, "v", ("c", 5)),
    submit(22, "c", 5, "C"),
    status(23, complete=3),
    ask(24, "v", done=True),
)
LEDGER = Ledger(
    tasks=(Task("a", "sig-a", "complete"), Task("b", "sig-b", "complete", 0, 1), Task("c", "sig-c", "complete", 1, 0)),
    attempts=(
        Attempt(1, "a", "v", "result"),
        Attempt(2, "b", "v", "lost"),
        Attempt(3, "b", "w", "result"),
        Attempt(4, "c", "v", "failed"),
        Attempt(5, "c", "v", "result"),
    ),
    results=(Result("a", data("A")), Result("b", data("B")), Result("c", data("C"))),
    cells=tuple(
        Cell(folder, "p", task, {"seed": seed})
        for folder, tasks in (("x", "abc"), ("y", "a"))
        for seed, task in enumerate(tasks)
    ),
    counted={"complete": 3},
)


def csv_of(*rows, header=HEADER):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


ROWS = [{"phase": "p", "signature": f"sig-{t}", "seed": seed, **data(t.upper())} for seed, t in enumerate("abc")]
FILES = {"x": csv_of(*ROWS), "y": csv_of(ROWS[0])}


def judged(history=GOOD, ledger=LEDGER, files=FILES):
    """The invariants that are broken."""
    return {problem[:2] for problem in problems(sorted(history, key=lambda each: each.sent), ledger, files)}


def without(*places):
    return [each for place, each in enumerate(GOOD) if place not in places]


def test_a_good_history_is_found_good():
    assert problems(GOOD, LEDGER, FILES) == []
    assert problems((), Ledger(tasks=(Task("a", "sig-a", "pending"),)), {}) == []


def test_what_a_killed_client_or_manager_leaves_unheard_is_no_breach():
    unheard = (
        replace(ask(1.1, "u"), heard=None, answer=None),
        submit(21.5, "c", 5, "C", status=None),
        replace(say(17.9, "release", "c", 4), heard=None, answer=None),
    )
    unknown_attempt = Attempt(6, "a", "u", "lost")
    ledger = replace(LEDGER, attempts=(*LEDGER.attempts, unknown_attempt))
    assert problems([*GOOD, *unheard], ledger, FILES) == []


def test_a_result_may_be_overtaken_by_another_that_was_sent_later():
    stopped = replace(submit(19.2, "c", 4, "C late"), heard=22.9, answer={"type": "ack", "status": "duplicate"})
    assert problems(sorted([*GOOD, stopped], key=lambda each: each.sent), LEDGER, FILES) == []


def test_refusals_are_no_acknowledgements():
    refused = replace(submit(1.5, "a", 1, "other"), answer={"type": "error", "code": "retry_later", "message": ""})
    assert refused.is_refused
    assert judged([*GOOD, refused]) == set()


@pytest.mark.parametrize(
    ("history", "ledger"),
    [
        ([*GOOD, submit(2.6, "a", 1, "A")], LEDGER),
        ([*without(8), submit(20, "b", 3, "B", status="duplicate")], LEDGER),
        (GOOD, replace(LEDGER, results=(*LEDGER.results, Result("a", data("A"))))),
    ],
    ids=["accepted twice", "a duplicate of nothing", "two results in the ledger"],
)
def test_i1(history, ledger):
    assert judged(history, ledger) == {"I1"}


def recomputed():
    """Attempt 1 of `a` is acknowledged, lost with the manager, and silently done again: ledger and files agree."""
    history = [*GOOD, ask(12.5, "w", ("a", 6)), submit(13.5, "a", 6, "A again", status=None)]
    ledger = replace(
        LEDGER,
        attempts=(*LEDGER.attempts, Attempt(6, "a", "w", "result")),
        results=(Result("a", data("A again")), *LEDGER.results[1:]),
    )
    rows = [ROWS[0] | data("A again"), *ROWS[1:]]
    return history, ledger, {"x": csv_of(*rows), "y": csv_of(rows[0])}


def test_i2_work_that_was_lost_and_silently_done_again():
    history, ledger, files = recomputed()
    found = problems(sorted(history, key=lambda each: each.sent), ledger, files)
    assert {problem[:2] for problem in found} == {"I2"}
    assert any("after it was acknowledged" in problem for problem in found)
    assert any("and the ledger has" in problem for problem in found)


@pytest.mark.parametrize(
    ("history", "ledger"),
    [
        (GOOD, replace(LEDGER, results=(Result("a", data("A") | {"history": []}), *LEDGER.results[1:]))),
        (GOOD, replace(LEDGER, results=(*LEDGER.results[:1], Result("b", data("of nobody")), LEDGER.results[2]))),
        ([*GOOD, status(2.9, complete=0, pending=2, assigned=1)], LEDGER),
        ([*GOOD, ask(16, "w", done=True)], LEDGER),
    ],
    ids=["another history", "made up", "status forgets", "handed out after the end"],
)
def test_i2(history, ledger):
    files = {name: content.replace(b",B,", b",of nobody,") for name, content in FILES.items()}
    assert judged(history, ledger, files if ledger.results[1].data["plan"] == "of nobody" else FILES) == {"I2"}


def test_i2_an_acknowledged_result_that_is_nowhere():
    tasks = (replace(LEDGER.tasks[0], status="pending"), *LEDGER.tasks[1:])
    ledger = replace(LEDGER, tasks=tasks, results=LEDGER.results[1:], counted={"pending": 1, "complete": 2})
    assert judged(GOOD, ledger, {"x": csv_of(*ROWS[1:]), "y": b""}) == {"I2"}


@pytest.mark.parametrize(
    "content",
    [
        FILES["x"][:-1],
        FILES["x"][:-20],
        csv_of(*ROWS[:2]),
        csv_of(*ROWS, ROWS[1]),
        csv_of(*ROWS, ROWS[1] | {"signature": "sig-z"}),
        csv_of(*ROWS[:2], ROWS[2] | {"seed": 7}),
        csv_of(*ROWS[:2], ROWS[2] | {"mean_test_acc": 0.25}),
        csv_of(*ROWS, header=HEADER[1:]),
        FILES["x"] + b"\0" * 64,
        FILES["x"] + b'"\n',
        FILES["x"].replace(b"sig-b", b"sig-\xff"),
        b"",
    ],
    ids=[
        "no line end",
        "torn",
        "missing",
        "doubled",
        "of no cell",
        "another cell's values",
        "another result",
        "no header",
        "NULs",
        "an open quote",
        "not UTF-8",
        "empty",
    ],
)
def test_i3(content):
    assert judged(files={**FILES, "x": content}) == {"I3"}


@pytest.mark.parametrize(
    ("history", "attempts"),
    [
        ([*without(4), ask(15, "w", ("b", 1))], (*LEDGER.attempts[:1], Attempt(1, "b", "w", "result"))),
        ([*without(10), ask(21, "v", ("c", 3))], LEDGER.attempts),
        (GOOD, LEDGER.attempts[:4]),
        (GOOD, (*LEDGER.attempts[:4], Attempt(5, "c", "w", "result"))),
    ],
    ids=["a number given twice", "a number that shrinks", "an attempt that is forgotten", "another worker's"],
)
def test_i4(history, attempts):
    assert "I4" in judged(history, replace(LEDGER, attempts=attempts))


@pytest.mark.parametrize(
    "history",
    [
        [*without(4), ask(13, "w", ("b", 3))],
        [*GOOD, beat(14.2, "b", 2)],
        [*GOOD, beat(16.5, "b", 2)],
        [*without(7), say(21.6, "task_failed", "c", 4, error="raised")],
        [*GOOD, say(16.5, "release", "b", 2)],
    ],
    ids=["lease cut short", "renewed just before", "renewed after", "two at once", "a late release that counts"],
)
def test_i5(history):
    assert "I5" in judged(history)


def test_i5_two_open_attempts_in_the_ledger():
    attempts = (*LEDGER.attempts, Attempt(6, "a", "v"), Attempt(7, "a", "w"))
    assert judged(ledger=replace(LEDGER, attempts=attempts)) == {"I5"}


def test_i5_a_lease_that_has_ended_is_no_breach():
    assert judged([*without(4, 5), ask(13.6, "w", ("b", 3))]) == set()


@pytest.mark.parametrize(
    ("history", "ledger"),
    [
        (GOOD, replace(LEDGER, counted={"complete": 2, "pending": 1})),
        (GOOD, replace(LEDGER, tasks=(replace(LEDGER.tasks[0], status="failed", losses=5), *LEDGER.tasks[1:]))),
        ([*GOOD, status(25, complete=3, pending=1)], LEDGER),
    ],
    ids=["the ledger miscounts", "a result of a failed task", "an answer that does not add up"],
)
def test_i6(history, ledger):
    assert "I6" in judged(history, ledger)


@pytest.mark.parametrize(
    ("history", "changes"),
    [
        (without(7), {}),
        (GOOD, {"attempts": (*LEDGER.attempts[:3], Attempt(4, "c", "v", "lost"), LEDGER.attempts[4])}),
        (GOOD, {"attempts": (LEDGER.attempts[0], Attempt(2, "b", "v", "released"), *LEDGER.attempts[2:])}),
        (GOOD, {"tasks": (LEDGER.tasks[0], replace(LEDGER.tasks[1], failures=1), LEDGER.tasks[2])}),
        (GOOD, {"tasks": (*LEDGER.tasks, Task("d", "sig-d", "failed", 3, 4)), "counted": {"complete": 3, "failed": 1}}),
    ],
    ids=["nobody said it", "said and not counted", "released unasked", "a loss is a failure", "failed too soon"],
)
def test_i7(history, changes):
    assert "I7" in judged(history, replace(LEDGER, **changes))


def test_a_failed_task_without_budgets_left_is_no_breach():
    tasks = (*LEDGER.tasks, Task("d", "sig-d", "failed", 0, 5))
    lost = tuple(Attempt(number, "d", "v", "lost") for number in range(10, 15))
    counted = {"complete": 3, "failed": 1}
    assert judged(ledger=replace(LEDGER, tasks=tasks, attempts=(*LEDGER.attempts, *lost), counted=counted)) == set()


def test_a_history_is_read_back_and_a_line_that_was_not_finished_is_none(tmp_path):
    recorder = Recorder(tmp_path, "worker-1")
    first = recorder.sent({"type": "status", "token": "secret"})
    second = recorder.sent({"type": "heartbeat", "tasks": []})
    recorder.heard(first, {"type": "status", "status": {}})
    with (tmp_path / "worker-1.jsonl").open("a") as stream:
        stream.write('{"exchange": 1, "at": 5.0, "answer": {"type": "ack"')
    one, other = read_history(tmp_path)
    assert second == 1
    assert (one.client, one.request, one.answer) == ("worker-1", {"type": "status"}, {"type": "status", "status": {}})
    assert one.heard is not None
    assert one.heard >= one.sent
    assert (other.heard, other.answer) == (None, None)
    assert "secret" not in (tmp_path / "worker-1.jsonl").read_text()
