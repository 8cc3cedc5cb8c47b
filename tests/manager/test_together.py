"""Changes that are made together: one wait for the disk, and all or nothing of each request, whatever happens."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from fedsweep.errors import ProtocolError
from fedsweep.manager.gathering import MOST, Gathering
from fedsweep.manager.protocol import parse_request
from fedsweep.manager.records import LedgerUnwritable

RESULTS = "out/first/final_results.csv"


def asked(kind, **fields):
    return parse_request({"type": kind, **{"worker_id": "w", **fields}}), False


def submit(task, result, **fields):
    return asked("submit_result", task_id=task["task_id"], attempt=task["attempt"], result_data=result, **fields)


def hand_out(manager, count):
    """So many tasks, each to a worker of its own, in one answer to all of them."""
    answers = manager.answer_together([asked("request_task", worker_id=f"w{number}") for number in range(count)])
    return [answer["task"] for answer in answers]


class Traced:
    """The statements that a ledger runs; its commits can be refused."""

    def __init__(self, ledger):
        self.statements = []
        self.refused_commits = 0
        self._db = ledger._transactions._db
        self._db.set_trace_callback(self.statements.append)
        ledger._transactions._db = self

    def execute(self, statement, *arguments):
        if statement == "COMMIT" and self.refused_commits:
            self.refused_commits -= 1
            raise sqlite3.OperationalError("database or disk is full")
        return self._db.execute(statement, *arguments)

    def __getattr__(self, name):
        return getattr(self._db, name)

    @property
    def commits(self):
        return self.statements.count("COMMIT")


def test_together_they_are_one_transaction_and_each_has_its_answer(managers, make_result, read_rows, check_sound):
    manager = managers()
    traced = Traced(manager.sweep.ledger)
    tasks = hand_out(manager, 5)
    assert len({task["attempt"] for task in tasks}) == 5
    assert traced.commits == 1
    answers = manager.answer_together(
        [
            *(submit(task, make_result(task)) for task in tasks[:3]),
            submit(tasks[0], make_result(tasks[0])),
            asked("task_failed", worker_id="w3", task_id=tasks[3]["task_id"], error="E", attempt=tasks[3]["attempt"]),
            asked("release", worker_id="w4", task_id=tasks[4]["task_id"], attempt=tasks[4]["attempt"]),
            asked("release", task_id="no such task"),
        ]
    )
    assert traced.commits == 2
    assert [answer.get("status") for answer in answers[:4]] == ["accepted"] * 3 + ["duplicate"]
    assert answers[4:6] == [{"type": "ack"}, {"type": "ack"}]
    assert answers[6].code == "unknown_task"
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3", {task["signature"]: make_result(task) for task in tasks[:3]})


def test_nothing_reaches_a_file_before_all_of_it_is_on_disk(managers, make_result, monkeypatch):
    manager = managers()
    first, *tasks = hand_out(manager, 4)
    manager.answer_together([submit(first, make_result(first))])  # from here on rows are appended
    order = []
    traced = Traced(manager.sweep.ledger)
    write = os.write
    monkeypatch.setattr(os, "write", lambda *arguments: order.append(traced.commits) or write(*arguments))
    manager.answer_together([submit(task, make_result(task)) for task in tasks])
    assert order
    assert set(order) == {1}


def test_a_refused_commit_leaves_each_to_itself_and_counts_nothing_twice(managers, make_result, read_rows):
    manager = managers()
    tasks = hand_out(manager, 3)
    traced = Traced(manager.sweep.ledger)
    traced.refused_commits = 2  # of all, and of the first alone
    answers = manager.answer_together([submit(task, make_result(task), worker_id="w") for task in tasks])
    assert answers[0].code == "retry_later"
    assert [answer["status"] for answer in answers[1:]] == ["accepted", "accepted"]
    status = manager.get_status()
    assert (status["complete"], status["assigned"]) == (2, 1)
    assert {worker["worker_id"]: worker["completed"] for worker in status["workers"]}["w"] == 2
    assert sorted(row["signature"] for row in read_rows(RESULTS)) == sorted(
        task["signature"] for task in tasks[1:] for _ in task["output_dirs"]
    )


def test_a_disk_that_fills_up_in_the_middle_keeps_what_was_acknowledged(managers, make_result, read_rows):
    """SQLite may undo all of a transaction then, also what was well before."""
    manager = managers()
    tasks = hand_out(manager, 4)
    db = manager.sweep.ledger._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0] + 3}")
    long = [{"round": number, "val_loss": 0.1} for number in range(9999)]
    results = [make_result(task, **({"history": long} if place == 1 else {})) for place, task in enumerate(tasks)]
    answers = manager.answer_together([submit(task, result) for task, result in zip(tasks, results, strict=True)])
    accepted = [task["signature"] for task, answer in zip(tasks, answers, strict=True) if isinstance(answer, dict)]
    assert tasks[1]["signature"] not in accepted
    assert accepted
    assert answers[1].code == "retry_later"
    assert sorted(manager.completed_tasks) == sorted(accepted)
    db.execute("PRAGMA max_page_count = 1000000")
    late = manager.answer_together([submit(tasks[1], results[1])])
    assert late == [{"type": "ack", "status": "accepted"}]
    assert {row["signature"] for row in read_rows(RESULTS)} <= set(manager.completed_tasks)


def test_one_that_breaks_takes_no_other_with_it(managers, make_result, monkeypatch, check_sound):
    manager = managers()
    tasks = hand_out(manager, 3)
    end_attempt, broken = manager.sweep.ledger._end_attempt, tasks[1]["attempt"]

    def breaks(db, attempt, *arguments):
        end_attempt(db, attempt, *arguments)
        if attempt == broken:
            raise ZeroDivisionError

    monkeypatch.setattr(manager.sweep.ledger, "_end_attempt", breaks)
    answers = manager.answer_together([submit(task, make_result(task)) for task in tasks])
    assert isinstance(answers[1], ZeroDivisionError)
    assert sorted(manager.completed_tasks) == sorted(tasks[place]["signature"] for place in (0, 2))
    assert list(manager.assigned_tasks) == [tasks[1]["task_id"]]
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_what_the_disk_refuses_halfway_is_not_kept_in_part(managers, make_result, monkeypatch, check_sound):
    """As SQLite may leave a transaction: open, with the change before in it, and half of this one."""
    manager = managers()
    tasks = hand_out(manager, 2)
    move, refused = manager.sweep.ledger._move, list(manager.tasks).index(tasks[1]["task_id"]) + 1

    def refuses(db, task, **changes):
        if task == refused:
            raise sqlite3.OperationalError("disk I/O error")
        move(db, task, **changes)

    monkeypatch.setattr(manager.sweep.ledger, "_move", refuses)
    answers = manager.answer_together([submit(task, make_result(task)) for task in tasks])
    assert answers[0] == {"type": "ack", "status": "accepted"}
    assert answers[1].code == "retry_later"
    assert list(manager.completed_tasks) == [tasks[0]["signature"]]
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3", {tasks[0]["signature"]: make_result(tasks[0])})


def test_leases_are_as_they_were_where_nothing_was_changed(managers, clock):
    manager = managers(lease_s=60)
    ledger = manager.sweep.ledger
    held, ended = hand_out(manager, 2)
    clock.advance(40)
    with pytest.raises(LedgerUnwritable), ledger.together():
        (unheard,) = ledger.hand_out("v", 60)
        ledger.release(ended["task_id"], "w1", ended["attempt"])
        raise LedgerUnwritable("as if")
    clock.advance(25)
    assert [task.task_id for task in ledger.lose_stale()] == [held["task_id"]]  # the other's runs anew
    clock.advance(40)
    assert [task.task_id for task in ledger.lose_stale()] == [ended["task_id"]]
    assert manager.tasks[unheard.task_id]["status"] == "pending"


def test_the_third_failure_in_a_row_is_forgiven_also_together(managers):
    manager = managers()
    manager.sweep.fleet.see("in good standing")
    for place in range(3):
        (answer,) = manager.answer_together([asked("request_task")])
        task = answer["task"]
        failed = {"task_id": task["task_id"], "attempt": task["attempt"], "error": f"E{place}"}
        assert manager.answer_together([asked("task_failed", **failed)]) == [{"type": "ack"}]
    assert [task["retry_count"] for task in manager.tasks.values()] == [0] * len(manager.tasks)


# ---- gathering


def gather(requests, answer_all, *, leaving=()):
    """What each of these requests is answered (or raised) when all come in one turn; some do not wait for it."""

    async def run():
        gathering = Gathering(answer_all)
        waiting = [asyncio.ensure_future(gathering.answer(request, False)) for request in requests]
        await asyncio.sleep(0)
        for place in leaving:
            waiting[place].cancel()
        return await asyncio.gather(*waiting, return_exceptions=True)

    return asyncio.run(run())


def test_all_that_come_in_one_turn_are_answered_together_up_to_a_limit():
    calls = []

    def answer_all(asked):
        calls.append(len(asked))
        return [{"type": "ack", "of": request} for request, _ in asked]

    answers = gather(range(2 * MOST + 5), answer_all)
    assert [answer["of"] for answer in answers] == list(range(2 * MOST + 5))
    assert calls == [MOST, MOST, 5]


def test_who_left_is_not_answered_and_an_error_goes_to_the_one_it_concerns():
    def answer_all(asked):
        return [ProtocolError("no_result", "x") if request == 1 else {"of": request} for request, _ in asked]

    answers = gather(range(3), answer_all, leaving=[0])
    assert isinstance(answers[0], asyncio.CancelledError)
    assert isinstance(answers[1], ProtocolError)
    assert answers[2] == {"of": 2}


def test_when_all_fails_everybody_hears():
    def answer_all(asked):
        raise ZeroDivisionError

    assert [type(answer) for answer in gather(range(3), answer_all)] == [ZeroDivisionError] * 3


def test_workers_that_ask_at_the_same_time_wait_for_the_disk_together(managers, make_result, monkeypatch):
    """Over the wire: twenty connections, each with a request, while the disk is slow."""
    manager = managers()
    traced = Traced(manager.sweep.ledger)

    async def ask_all(port):
        async def ask(number):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            token = Path(".fedsweep/token").read_text().strip()
            writer.write(f'{{"type":"request_task","worker_id":"w{number}","token":"{token}"}}\n'.encode())
            answer = await reader.readline()
            writer.close()
            return b'"type":"task"' in answer or b'"no_task"' in answer

        return await asyncio.gather(*map(ask, range(20)))

    async def run():
        server = await asyncio.start_server(manager.handle_client, "127.0.0.1", 0)
        async with server:
            return await ask_all(server.sockets[0].getsockname()[1])

    assert asyncio.run(run()) == [True] * 20
    assert traced.commits < 20
