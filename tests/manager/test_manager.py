"""`ExperimentManager`: its names, what it answers, budgets, broken workers, status, and who holds the state."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Set

import pytest

from fedsweep.errors import ConfigError, ProtocolError, StateError, StateHeldError, UsageError
from fedsweep.manager import ExperimentManager
from fedsweep.manager.answers import ANSWERS
from fedsweep.manager.fleet import HEARING_S, SET_ASIDE_S
from fedsweep.manager.labels import label
from fedsweep.manager.manager import report_words
from fedsweep.manager.protocol import ERROR_CODES, MAX_MESSAGE, REQUESTS, TaskMessage, encode, parse_request
from fedsweep.manager.status import brief
from fedsweep.manager.sweep import MAX_HAND_OUT
from fedsweep.plan.experiment import Experiment, RunOptions

PUBLIC = [
    *("load_all_configs", "generate_experiments", "generate_all_tasks", "load_completed_tasks", "save_state"),
    *("_create_task_signature", "load_state", "check_stale_assignments", "refresh_completed", "get_next_task"),
    *("mark_complete", "save_result", "mark_failed", "check_all_complete", "get_status", "handle_client"),
    *("run_server", "start"),
]
ATTRIBUTES = ["host", "port", "tasks", "completed_tasks", "assigned_tasks", "lock", "running", "state_file"]


def ask(manager: ExperimentManager, kind: str, *, legacy: bool = False, **fields):
    """Send a message as the server would."""
    return manager.answer(parse_request({"type": kind, **fields}), legacy)


def error_code(manager: ExperimentManager, kind: str, **fields) -> str:
    with pytest.raises(ProtocolError) as caught:
        ask(manager, kind, **fields)
    assert caught.value.code in ERROR_CODES
    return caught.value.code


def request(manager: ExperimentManager, worker_id: str = "w", **fields):
    return ask(manager, "request_task", worker_id=worker_id, **fields)["task"]


# ---- names


def test_the_public_names_are_there_and_documented(managers):
    manager = managers()
    for name in PUBLIC:
        assert inspect.getdoc(getattr(ExperimentManager, name)), name
    for name in ATTRIBUTES:
        assert hasattr(manager, name), name
    assert isinstance(manager.tasks, Mapping)
    assert isinstance(manager.assigned_tasks, Mapping)
    assert isinstance(manager.completed_tasks, Set)
    assert inspect.iscoroutinefunction(manager.handle_client)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fedsweep.manager.manager", {"torch", "pandas", "pyarrow", "numpy", "scipy"}),
        ("fedsweep.manager.protocol", {"torch", "pandas", "sqlite3", "asyncio"}),  # all that a worker needs
    ],
)
def test_importing_loads_nothing_that_is_not_needed(module, unwanted):
    code = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert module in loaded
    assert not unwanted & set(loaded)


def test_every_request_has_an_answer():
    assert set(ANSWERS) == set(REQUESTS.values())


def test_the_signature_of_a_config_is_that_of_its_task(managers):
    manager = managers()
    for task in manager.tasks.values():
        assert manager._create_task_signature(task["config"]) == task["signature"]


# ---- views


def test_tasks_are_dicts_with_the_promised_fields(managers, make_result):
    manager = managers()
    assert list(manager.tasks)[:3] == ["first_0_1", "first_0_2", "first_2_1"]
    assert set(manager.tasks["first_0_1"]) >= {
        *("task_id", "phase", "config", "seed", "output_dir", "output_dirs", "status", "assigned_to", "assigned_at"),
        *("retry_count", "last_error"),
    }
    assert len(manager.tasks) == 8
    assert "nonsense" not in manager.tasks
    task = request(manager)
    assert list(manager.assigned_tasks) == [task["task_id"]]
    assert task["task_id"] not in {}.keys() | manager.completed_tasks
    ask(manager, "submit_result", task_id=task["task_id"], worker_id="w", result_data=make_result(task))
    assert dict(manager.assigned_tasks) == {}
    assert manager.completed_tasks == {task["signature"]}
    assert manager.completed_tasks | {"x"} == {task["signature"], "x"}
    assert task["signature"] in manager.completed_tasks


def test_orphans_are_not_among_the_tasks(managers, two_phases):
    managers()
    manager = managers(two_phases[: two_phases.index("second:")])
    assert len(manager.tasks) == 6
    assert "second_0_1" not in manager.tasks


# ---- messages


def test_a_task_message_is_what_the_protocol_says(managers, clock):
    manager = managers(lease_s=60)
    task = request(manager)
    assert TaskMessage.model_validate(task).model_dump(mode="json") == {
        **{name: task[name] for name in ("task_id", "phase", "config", "seed", "output_dir", "signature", "attempt")},
        **{
            "cohort": "digits|lr|2|1|32|1|2",
            "output_dirs": list(task["output_dirs"]),
            "retry_count": 0,
            "status": "assigned",
            "assigned_to": "w",
        },
        **{"assigned_at": clock.now().isoformat(), "lease_s": 60.0, "heartbeat_s": 10.0},
    }
    json.dumps(task)


def test_leases_are_twelve_heartbeats_unless_told_otherwise():
    assert ExperimentManager().lease_s == 120.0
    assert ExperimentManager(heartbeat_s=0.5).lease_s == 6.0
    assert ExperimentManager(lease_s=30.0).lease_s == 30.0


def test_several_tasks_go_out_together_where_asked_for(managers):
    manager = managers()
    assert "tasks" not in ask(manager, "request_task", worker_id="w")
    answer = ask(manager, "request_task", worker_id="w", max_tasks=3)
    assert [task["task_id"] for task in answer["tasks"]] == ["first_0_2", "first_2_2", "first_3_2"]  # one seed
    assert answer["task"] == answer["tasks"][0]
    assert len({task["attempt"] for task in answer["tasks"]}) == 3


def test_wait_and_done_are_told_apart(managers, make_result, clock):
    manager = managers("p: {combinations: [{width_factor: [1]}]}")
    task = request(manager)
    wait = ask(manager, "request_task", worker_id="v")
    assert wait == {"type": "no_task", "done": False, "retry_after": 5.0}
    ask(manager, "submit_result", task_id=task["task_id"], worker_id="w", result_data=make_result(task))
    assert ask(manager, "request_task", worker_id="v") == {"type": "no_task", "done": True, "retry_after": 5.0}
    assert not manager.sweep.has_told_everyone()
    assert ask(manager, "request_task", worker_id="w")["done"]
    clock.advance(HEARING_S)
    assert manager.sweep.has_told_everyone()


def test_a_worker_that_was_told_is_waited_for_until_it_leaves_or_must_have_heard(managers, clock):
    manager = managers("p: {combinations: [{width_factor: [1]}]}")
    ask(manager, "cancel", names=["p"])
    assert ask(manager, "request_task", worker_id="w")["done"]
    assert not manager.sweep.has_told_everyone()
    clock.advance(HEARING_S - 0.1)
    assert ask(manager, "request_task", worker_id="w")["done"]  # the answer had been lost
    clock.advance(HEARING_S - 0.1)
    assert not manager.sweep.has_told_everyone()
    assert [worker["worker_id"] for worker in manager.get_status()["workers"]] == ["w"]
    assert ask(manager, "leave", worker_id="w") == {"type": "ack"}
    assert manager.get_status()["workers"] == []
    assert manager.sweep.has_told_everyone()
    assert ask(manager, "leave", worker_id="nobody") == {"type": "ack"}
    assert ask(manager, "request_task", worker_id="old", legacy=True)["done"]
    assert manager.sweep.has_told_everyone()  # such a client asks once


@pytest.mark.parametrize("end", ["result", "failure", "cancel"])
def test_a_worker_that_was_told_while_it_trains_is_told_again(managers, make_result, clock, end):
    """It asks for more of a cohort when some have ended, and after a `drain` hears that there is none."""
    manager = managers(ONE_COHORT)
    first, second = request_many(manager, "w", max_tasks=2)
    ask(manager, "drain")
    submit(manager, make_result, first)
    assert ask(manager, "request_task", worker_id="w", cohort=first["cohort"])["done"]
    if end == "result":
        submit(manager, make_result, second)
    elif end == "failure":
        manager.mark_failed(second["task_id"], "w", "ValueError: no", second["attempt"])
    else:
        ask(manager, "cancel", names=[second["task_id"]])
        held = [{"task_id": second["task_id"], "attempt": second["attempt"]}]
        assert ask(manager, "heartbeat", worker_id="w", tasks=held)["drop"] == [second["task_id"]]
    clock.advance(HEARING_S)
    assert not manager.sweep.has_told_everyone()
    assert ask(manager, "request_task", worker_id="w")["done"]
    clock.advance(HEARING_S)
    assert manager.sweep.has_told_everyone()


def test_a_failed_task_is_an_end_too(managers):
    manager = managers("p: {combinations: [{width_factor: [1]}]}")
    for _ in range(4):
        task = request(manager)
        answer = ask(
            manager, "task_failed", task_id=task["task_id"], worker_id="w", error="no", attempt=task["attempt"]
        )
        assert answer == {"type": "ack"}
    assert ask(manager, "request_task", worker_id="w")["done"]
    assert manager.check_all_complete()


def test_task_complete_is_true_only_with_a_result(managers, make_result):
    manager = managers()
    task = request(manager)
    assert error_code(manager, "task_complete", task_id=task["task_id"], worker_id="w") == "no_result"
    ask(manager, "submit_result", task_id=task["task_id"], worker_id="w", result_data=make_result(task))
    assert ask(manager, "task_complete", task_id=task["task_id"], worker_id="w") == {"type": "ack"}
    assert error_code(manager, "task_complete", task_id="nonsense", worker_id="w") == "unknown_task"


def test_unknown_tasks_and_attempts_are_errors(managers, make_result):
    manager = managers()
    task = request(manager)
    common = {"worker_id": "w", "result_data": make_result(task)}
    assert error_code(manager, "submit_result", task_id="nonsense", **common) == "unknown_task"
    assert error_code(manager, "submit_result", task_id=task["task_id"], attempt=99, **common) == "unknown_attempt"
    assert error_code(manager, "submit_result", task_id="first_2_1", **common) == "unknown_attempt"
    assert error_code(manager, "task_failed", task_id="nonsense", worker_id="w", error="x") == "unknown_task"
    assert error_code(manager, "release", task_id="nonsense", worker_id="w") == "unknown_task"
    assert manager.get_status()["assigned"] == 1


def test_late_messages_are_acknowledged_with_the_task_to_drop(managers, clock, make_result):
    manager = managers(lease_s=60)
    old = request(manager, "slow")
    clock.advance(61)
    new = request(manager, "quick")
    while new["task_id"] != old["task_id"]:
        new = request(manager, "quick")
    drop = {"type": "ack", "drop": [old["task_id"]]}
    slow = {"task_id": old["task_id"], "worker_id": "slow", "attempt": old["attempt"]}
    assert ask(manager, "task_failed", error="late", **slow) == drop
    assert ask(manager, "release", **slow) == drop
    held = [{"task_id": old["task_id"], "attempt": old["attempt"]}, {"task_id": "nonsense", "attempt": 1}]
    assert ask(manager, "heartbeat", worker_id="slow", tasks=held)["drop"] == [old["task_id"], "nonsense"]
    assert manager.tasks[old["task_id"]]["assigned_to"] == "quick"
    assert ask(manager, "submit_result", result_data=make_result(old), **slow)["status"] == "accepted"
    held = [{"task_id": new["task_id"], "attempt": new["attempt"]}]
    assert ask(manager, "heartbeat", worker_id="quick", tasks=held)["drop"] == [new["task_id"]]


def test_silent_workers_lose_their_tasks_and_living_ones_do_not(managers, clock):
    manager = managers(lease_s=60)
    dead, alive = request(manager, "dead"), request(manager, "alive")
    clock.advance(50)
    assert ask(
        manager, "heartbeat", worker_id="alive", tasks=[{"task_id": alive["task_id"], "attempt": alive["attempt"]}]
    ) == {
        "type": "ack",
        "drop": [],
    }
    clock.advance(20)
    assert manager.check_stale_assignments() == [dead["task_id"]]
    assert list(manager.assigned_tasks) == [alive["task_id"]]


def test_old_clients_keep_their_task_for_hours(managers, clock, make_result):
    manager = managers(lease_s=60)
    task = ask(manager, "request_task", worker_id="old", legacy=True, max_tasks=5)["task"]
    assert len(manager.assigned_tasks) == 1
    clock.advance(5 * 3600)
    assert manager.check_stale_assignments() == []
    answer = ask(
        manager, "submit_result", legacy=True, task_id=task["task_id"], worker_id="old", result_data=make_result(task)
    )
    assert answer == {"type": "ack", "status": "accepted"}
    lost = ask(manager, "request_task", worker_id="old", legacy=True)["task"]
    clock.advance(6 * 3600 + 1)
    assert manager.check_stale_assignments() == [lost["task_id"]]


def test_a_worker_that_echoes_parameters_is_understood(managers, make_result):
    manager = managers()
    task = request(manager)
    echoed = {name: value for name, value in task["config"].items() if name != "device"}
    data = {**echoed, "phase": "first", "mean_test_acc": 0.5, "std_test_acc": 0.0, "mean_test_loss": 0.25}
    answer = ask(manager, "submit_result", task_id=task["task_id"], worker_id="w", result_data=data)
    assert answer["status"] == "accepted"
    assert manager.sweep.ledger.view.result(1) == {"mean_test_acc": 0.5, "std_test_acc": 0.0, "mean_test_loss": 0.25}


def test_a_ledger_that_cannot_be_written_is_retried_and_nothing_is_acknowledged(managers, make_result, read_rows):
    manager = managers()
    task = request(manager)
    db = manager.sweep.ledger._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")
    large = make_result(
        task, device="x" * 256, worker="w" * 256, history=[{"round": n, "val_loss": 0.1} for n in range(9999)]
    )
    submit = {"task_id": task["task_id"], "worker_id": "w", "result_data": large}
    assert error_code(manager, "submit_result", **submit) == "retry_later"
    assert manager.get_status()["complete"] == 0
    assert not os.path.exists("out")
    db.execute("PRAGMA max_page_count = 1000000")
    assert ask(manager, "submit_result", **submit)["status"] == "accepted"
    assert len(read_rows("out/first/final_results.csv")) == 2


# ---- workers that hold many tasks


ONE_COHORT = """\
defaults: {model_type: lr, depth: 1, num_clients: 2, output_dir: out}
p: {combinations: [{seed: [1, 2, 3, 4]}, {lr: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]}]}
"""


def request_many(manager: ExperimentManager, worker_id: str = "w", **fields):
    """The tasks that a worker is given; none where there are none for it."""
    return ask(manager, "request_task", worker_id=worker_id, **{"max_tasks": 100, **fields}).get("tasks", [])


def held(tasks):
    return [{"task_id": task["task_id"], "attempt": task["attempt"]} for task in tasks]


def submit(manager: ExperimentManager, make_result, task, worker_id: str = "w"):
    common = {"task_id": task["task_id"], "worker_id": worker_id, "attempt": task["attempt"]}
    return ask(manager, "submit_result", result_data=make_result(task), **common)["status"]


def test_one_heartbeat_renews_every_lease_while_the_tasks_complete_one_by_one(managers, clock, make_result):
    manager = managers(ONE_COHORT, lease_s=60)
    tasks = request_many(manager)
    assert len(tasks) == 40
    while tasks:
        clock.advance(50)
        assert ask(manager, "heartbeat", worker_id="w", tasks=held(tasks)) == {"type": "ack", "drop": []}
        assert manager.check_stale_assignments() == []
        assert submit(manager, make_result, tasks[0]) == "accepted"
        assert list(manager.assigned_tasks) == sorted(
            (task["task_id"] for task in tasks[1:]), key=list(manager.tasks).index
        )
        # What has just ended may still be in a heartbeat that is under way; it is named and the others are renewed.
        clock.advance(5)
        assert ask(manager, "heartbeat", worker_id="w", tasks=held(tasks))["drop"] == [tasks[0]["task_id"]]
        tasks = tasks[1:]
    assert manager.check_all_complete()
    assert {task["retry_count"] for task in manager.tasks.values()} == {0}


def test_a_task_that_a_heartbeat_leaves_out_is_lost_and_the_others_are_not(managers, clock):
    manager = managers(ONE_COHORT, lease_s=60)
    tasks = request_many(manager)
    clock.advance(50)
    ask(manager, "heartbeat", worker_id="w", tasks=held(tasks[1:]))
    clock.advance(20)
    assert manager.check_stale_assignments() == [tasks[0]["task_id"]]
    assert ask(manager, "heartbeat", worker_id="w", tasks=held(tasks))["drop"] == [tasks[0]["task_id"]]


def test_a_worker_that_dies_loses_each_of_its_tasks_once(managers, clock, make_result):
    manager = managers(ONE_COHORT, lease_s=60)
    tasks = request_many(manager)
    submit(manager, make_result, tasks[0])
    clock.advance(61)
    assert sorted(manager.check_stale_assignments()) == sorted(task["task_id"] for task in tasks[1:])
    view = manager.sweep.ledger.view
    assert [(view.task(task["task_id"]).losses, view.task(task["task_id"]).failures) for task in tasks] == [
        (0, 0),
        *[(1, 0)] * 39,
    ]
    again = request_many(manager, "v")
    assert {task["task_id"] for task in again} == {task["task_id"] for task in tasks[1:]}
    assert submit(manager, make_result, tasks[5]) == "accepted"  # it was alive after all, and had finished one
    assert ask(manager, "heartbeat", worker_id="v", tasks=held(again))["drop"] == [tasks[5]["task_id"]]
    assert ask(manager, "heartbeat", worker_id="w", tasks=held(tasks))["drop"] == [task["task_id"] for task in tasks]


def test_a_worker_that_is_stopped_gives_all_its_tasks_back_without_blame(managers, make_result, clock):
    manager = managers(ONE_COHORT)
    tasks = request_many(manager)
    submit(manager, make_result, tasks[0])
    for task in tasks:
        answer = ask(manager, "release", worker_id="w", task_id=task["task_id"], attempt=task["attempt"])
        assert answer == ({"type": "ack", "drop": [task["task_id"]]} if task is tasks[0] else {"type": "ack"})
    (worker,) = manager.get_status()["workers"]
    assert worker["task_id"] is None
    clock.advance(61)  # now it counts as gone
    assert len(request_many(manager, "v")) == 39
    assert {manager.sweep.ledger.view.task(task["task_id"]).losses for task in tasks} == {0}


def test_more_of_the_same_is_told_apart_from_all_done(managers, make_result):
    manager = managers(ONE_COHORT + "q: {combinations: [{width_factor: [64]}]}")
    (wide,) = request_many(manager, "v")
    tasks = request_many(manager, "w", max_tasks=3)
    more = request_many(manager, "w", max_tasks=2, cohort=tasks[0]["cohort"])
    assert {task["cohort"] for task in [*tasks, *more]} == {tasks[0]["cohort"]}
    assert len({task["task_id"] for task in [*tasks, *more]}) == 5
    wait = {"type": "no_task", "done": False, "retry_after": 5.0}
    assert ask(manager, "request_task", worker_id="v", max_tasks=2, cohort=wide["cohort"]) == wait
    assert ask(manager, "request_task", worker_id="v", cohort="no such key") == wait
    assert not manager.sweep.has_told_everyone()
    assert "tasks" not in ask(manager, "request_task", worker_id="w", cohort=tasks[0]["cohort"])
    while rest := request_many(manager, "x"):
        for task in rest:
            submit(manager, make_result, task, "x")
    for name in manager.assigned_tasks:
        task = manager.sweep.task_message(manager.sweep.ledger.view.task(name))
        submit(manager, make_result, task, task["assigned_to"])
    for worker_id in "vwx":
        assert not manager.sweep.has_told_everyone()
        assert ask(manager, "request_task", worker_id=worker_id, max_tasks=2, cohort=wide["cohort"])["done"]
        ask(manager, "leave", worker_id=worker_id)
    assert manager.sweep.has_told_everyone()


def test_what_is_left_is_divided_among_the_workers_that_live(managers, clock):
    manager = managers(ONE_COHORT)
    first = request_many(manager, "w", max_tasks=1)
    assert len(first) == 0  # asked for one, told one: no list
    assert len(request_many(manager, "v")) == 20
    assert len(request_many(manager, "w")) == 19
    assert request_many(manager, "v") == []


def test_silent_and_broken_workers_leave_their_share_to_the_others(managers, clock):
    manager = managers(ONE_COHORT)
    request(manager, "silent")
    clock.advance(61)
    for _ in range(3):
        fail_next(manager, "broken")
    assert len(request_many(manager, "w")) == 36  # all but the one that is held and those that failed


def test_a_manager_that_expects_workers_keeps_their_share_for_a_minute(managers, clock):
    manager = managers(ONE_COHORT, expected_workers=4)
    assert len(request_many(manager, "w")) == 10
    clock.advance(61)
    ask(manager, "heartbeat", worker_id="w")
    assert len(request_many(manager, "w")) == 30


def test_an_answer_fits_into_one_message(managers, monkeypatch):
    manager = managers(ONE_COHORT)
    whole = len(encode(ask(manager, "request_task", worker_id="w", max_tasks=100)))
    for name in list(manager.assigned_tasks):
        ask(manager, "release", worker_id="w", task_id=name)
    limit = whole // 2
    monkeypatch.setattr("fedsweep.manager.sweep.MAX_MESSAGE", limit)
    answer = ask(manager, "request_task", worker_id="w", max_tasks=100)
    one = len(encode(answer["task"]))
    assert limit - 2 * one < len(encode(answer)) <= limit
    given = [task["task_id"] for task in answer["tasks"]]
    assert sorted(manager.assigned_tasks) == sorted(given)
    assert [task["task_id"] for task in manager.get_status()["workers"]] == given[:1]
    assert len(manager.sweep.fleet.live()[0].tasks) == len(given)
    monkeypatch.setattr("fedsweep.manager.sweep.MAX_MESSAGE", 10)
    assert len(request_many(manager, "w")) == 1  # one is always handed out


def test_the_largest_answer_is_far_from_the_limit():
    config = {name: value for name, value in Experiment(dataset="parquet:" + "d" * 200).model_dump().items()}
    config |= RunOptions(output_dir="o" * 200, project_name="p" * 50).model_dump()
    common = {"task_id": "t" * 120, "phase": "p" * 100, "seed": 2**62, "output_dir": "o" * 200, "signature": "s" * 300}
    message = {**common, "config": config, "output_dirs": ["o" * 200] * 3, "cohort": "c" * 250, "worker_id": "w" * 100}
    assert len(encode(message)) * MAX_HAND_OUT < MAX_MESSAGE


# ---- broken workers


def fail_next(manager, worker):
    task = request(manager, worker)
    ask(manager, "task_failed", task_id=task["task_id"], worker_id=worker, error="CUDA error", attempt=task["attempt"])
    return task


GRID_OF_40 = "p: {combinations: [{width_factor: [1, 2, 3, 4]}, {seed: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}]}"


def test_a_broken_worker_is_set_aside_and_its_failures_given_back(managers, make_result, clock):
    manager = managers(GRID_OF_40)
    good = request(manager, "good")
    for _ in range(3):
        fail_next(manager, "broken")
    assert ask(manager, "request_task", worker_id="broken")["type"] == "no_task"
    assert sum(task["retry_count"] for task in manager.tasks.values()) == 0
    assert manager.get_status()["failed"] == 0
    status = {worker["worker_id"]: worker["set_aside"] for worker in manager.get_status()["workers"]}
    assert status == {"good": False, "broken": True}
    clock.advance(SET_ASIDE_S - 1)
    ask(manager, "heartbeat", worker_id="good", tasks=[{"task_id": good["task_id"], "attempt": good["attempt"]}])
    assert ask(manager, "request_task", worker_id="broken")["type"] == "no_task"
    clock.advance(2)  # one more chance
    fail_next(manager, "broken")
    assert ask(manager, "request_task", worker_id="broken")["type"] == "no_task"
    assert sum(task["retry_count"] for task in manager.tasks.values()) == 0


def test_one_broken_worker_of_eight_ends_no_task(managers, make_result, clock):
    manager = managers(GRID_OF_40)
    workers = [f"w{number}" for number in range(8)]
    while not manager.check_all_complete():
        clock.advance(1)
        for worker in workers:
            answer = ask(manager, "request_task", worker_id=worker)
            if answer["type"] == "no_task":
                continue
            task = answer["task"]
            common = {"task_id": task["task_id"], "worker_id": worker, "attempt": task["attempt"]}
            if worker == "w3":
                ask(manager, "task_failed", error="CUDA error", **common)
            else:
                ask(manager, "submit_result", result_data=make_result(task), **common)
    assert (manager.get_status()["complete"], manager.get_status()["failed"]) == (40, 0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_if_all_workers_fail_the_tasks_are_to_blame_and_the_sweep_ends(managers, count):
    manager = managers(GRID_OF_40)
    for _ in range(1000):
        for number in range(count):
            answer = ask(manager, "request_task", worker_id=f"w{number}")
            if answer["type"] == "task":
                task_id = answer["task"]["task_id"]
                ask(manager, "task_failed", task_id=task_id, worker_id=f"w{number}", error="ValueError: no")
        if manager.check_all_complete():
            break
    assert manager.get_status()["failed"] == 40


def test_a_success_clears_a_worker(managers, make_result):
    manager = managers(GRID_OF_40)
    request(manager, "other")
    for _ in range(3):
        for _ in range(2):
            fail_next(manager, "w")
        task = request(manager, "w")
        ask(manager, "submit_result", task_id=task["task_id"], worker_id="w", result_data=make_result(task))
    assert ask(manager, "request_task", worker_id="w")["type"] == "task"


def fail_all(manager, worker, tasks):
    for task in tasks:
        common = {"task_id": task["task_id"], "worker_id": worker, "attempt": task["attempt"]}
        ask(manager, "task_failed", error="CUDA error", **common)


def test_a_cohort_that_fails_at_once_does_not_make_its_worker_a_broken_one(managers):
    manager = managers(ONE_COHORT + "q: {combinations: [{width_factor: [64]}]}")
    request(manager, "good")
    tasks = request_many(manager, "w")
    assert len(tasks) == 20
    fail_all(manager, "w", tasks)
    status = {worker["worker_id"]: worker["set_aside"] for worker in manager.get_status()["workers"]}
    assert status == {"good": False, "w": False}
    assert {manager.tasks[task["task_id"]]["retry_count"] for task in tasks} == {1}
    assert len(request_many(manager, "w")) == 20  # the others, which did not fail


def test_a_worker_that_fails_three_hand_outs_is_broken_and_all_that_it_failed_is_given_back(managers):
    manager = managers(ONE_COHORT)
    request(manager, "good")
    for number in range(3):
        tasks = request_many(manager, "broken", max_tasks=10)
        assert len(tasks) == 10
        assert max(task["retry_count"] for task in manager.tasks.values()) == min(number, 1)
        fail_all(manager, "broken", tasks)
    assert request_many(manager, "broken") == []
    assert {task["retry_count"] for task in manager.tasks.values()} == {0}
    assert len(request_many(manager, "good")) == 9  # those that never were with the broken one
    sizes = [len(request_many(manager, "good")) for _ in range(4)]
    assert sum(sizes) == 30, sizes  # and the others, together: nothing is held against them


def test_a_failure_is_given_back_once(managers):
    manager = managers(ONE_COHORT)
    request(manager, "good")
    for _ in range(3):
        fail_next(manager, "broken")
    assert manager.sweep.fleet.see("broken").unforgiven == []
    late = request(manager, "good")
    fail_all(manager, "good", [late])
    assert manager.tasks[late["task_id"]]["retry_count"] == 1


def test_what_failed_before_the_last_success_is_not_given_back(managers, make_result):
    manager = managers(GRID_OF_40)
    request(manager, "good")
    early = fail_next(manager, "w")
    submit(manager, make_result, request(manager, "w"))
    late = [fail_next(manager, "w") for _ in range(3)]
    assert ask(manager, "request_task", worker_id="w")["type"] == "no_task"
    assert [manager.tasks[task["task_id"]]["retry_count"] for task in (early, *late)] == [1, 0, 0, 0]


def test_one_task_that_fails_again_and_again_is_no_sign_of_a_broken_worker(managers, make_result):
    manager = managers("p: {combinations: [{lr: [0.1, 0.2]}]}")
    request(manager, "good")
    for _ in range(3):
        fail_next(manager, "w")
    assert not manager.get_status()["workers"][-1]["set_aside"]
    assert sorted(task["retry_count"] for task in manager.tasks.values()) == [0, 3]


@pytest.mark.parametrize("count", [1, 3])
def test_a_shape_that_always_fails_ends_failed_and_sets_no_one_aside_for_long(managers, make_result, count, clock):
    """Forty tasks fail wherever they run; what others there are is finished."""
    manager = managers(ONE_COHORT + "q: {combinations: [{width_factor: [1, 2, 3, 64]}, {seed: [1, 2]}]}")
    for _ in range(2000):
        clock.advance(1)
        for number in range(count):
            tasks = request_many(manager, f"w{number}", max_tasks=10)
            if tasks and tasks[0]["phase"] == "p":
                fail_all(manager, f"w{number}", tasks)
            else:
                for task in tasks:
                    submit(manager, make_result, task, f"w{number}")
        if manager.check_all_complete():
            break
    assert (manager.get_status()["failed"], manager.get_status()["complete"]) == (40, 8)


# ---- status


def test_status_tells_everything(managers, clock, make_result):
    manager = managers()
    task = request(manager, "host-1", gpu_id=3, worker_type="gpu")
    progress = {
        "task_id": task["task_id"],
        "attempt": task["attempt"],
        "round": 4,
        "rounds": 10,
        "val_loss": 0.5,
        "val_acc": 0.25,
    }
    ask(manager, "heartbeat", worker_id="host-1", tasks=[progress])
    clock.advance(3)
    status = ask(manager, "status")["status"]
    assert {name: status[name] for name in ("total", "pending", "assigned", "complete", "failed")} == {
        **{"total": 8, "pending": 7, "assigned": 1, "complete": 0, "failed": 0}
    }
    assert (status["progress"], status["diverged"], status["duplicates_dropped"], status["eta_s"]) == (0.0, 0, 4, None)
    assert (status["lagging"], status["failures"], status["done"], status["orphaned"]) == ([], [], False, 0)
    assert status["config_change"] == {"added": 8, "kept": 0, "removed": 0, "restored": 0}
    assert status["workers"] == [
        {
            **{"worker_id": "host-1", "host": "host-1", "device": "cuda:3", "task_id": "first_0_1", "phase": "first"},
            **{"label": "lr w2 d1 ρ=0 fedavg s1", "round": 4, "rounds": 10, "val_acc": 0.25},
            **{"completed": 0, "failed": 0, "set_aside": False, "last_seen_s": 3.0},
        }
    ]
    ask(
        manager,
        "submit_result",
        task_id=task["task_id"],
        worker_id="host-1",
        result_data=make_result(task, wall_time_s=2.0),
    )
    fail_next(manager, "host-1")
    clock.advance(2)
    status = manager.get_status()
    assert status["progress"] == 1 / 8
    assert status["eta_s"] is None  # one result is no ground to say
    assert status["failed_attempts"] == 1
    assert (status["workers"][0]["completed"], status["workers"][0]["failed"]) == (1, 1)
    assert status["workers"][0]["task_id"] is None
    request(manager, "host-2", worker_type="cpu")
    clock.advance(61)
    assert manager.get_status()["workers"] == []
    json.dumps(status, allow_nan=False)


def test_status_names_what_failed_for_good(managers):
    manager = managers("p: {combinations: [{width_factor: [1]}]}")
    trace = "Traceback (most recent call last):\n  File x\nPartitionError: alpha is too small\n\n"
    for _ in range(4):
        task = request(manager)
        ask(manager, "task_failed", task_id=task["task_id"], worker_id="w", error=trace)
    status = manager.get_status()
    assert status["failures"] == [{"task_id": "p_0_42", "error": "PartitionError: alpha is too small"}]
    assert (status["progress"], status["done"]) == (1.0, True)
    assert manager.tasks["p_0_42"]["last_error"] == trace
    message = manager.sweep.task_message(manager.sweep.ledger.view.task("p_0_42"))
    assert message["last_error"] == "PartitionError: alpha is too small"  # 256 of them must fit into one answer
    assert brief("x" * 500) == "x" * 299 + "…"
    assert brief(" \n") == ""


@pytest.mark.parametrize(
    ("changes", "varying", "words"),
    [
        ({}, (), "cnn w4 d2 ρ=0.3 label_flip median s42"),
        ({"poison_ratio": 0.0}, (), "cnn w4 d2 ρ=0 median s42"),
        (
            {},
            ("seed", "alpha", "dataset", "target_class", "lr"),
            "cnn w4 d2 ρ=0.3 label_flip median alpha=0.1 digits lr=0.02 target_class=None s42",
        ),
        ({}, ("poison_level", "depth", "aggregator"), "cnn w4 d2 ρ=0.3 label_flip median sample s42"),
    ],
)
def test_labels_say_what_varies(changes, varying, words):
    config = {
        **{"model_type": "cnn", "width_factor": 4, "depth": 2, "poison_ratio": 0.3, "poison_type": "label_flip"},
        **{"aggregator": "median", "seed": 42, "alpha": 0.1, "dataset": "digits", "lr": 0.02, "target_class": None},
        **{"poison_level": "sample"},
    }
    assert label({**config, **changes}, varying) == words


def test_a_manager_names_the_folders_of_results_but_not_hundreds():
    assert report_words(["out/a", "my out"]).endswith(": fedsweep report out/a 'my out'")
    many = report_words([f"out/{number}" for number in range(100)])
    assert many.endswith(" out/6 out/7, and 92 folders more")


# ---- the state directory


def test_a_second_manager_ends_at_once_and_says_who_holds_the_state(managers, folder):
    manager = managers()
    code = (
        "from fedsweep.manager import ExperimentManager\n"
        "from fedsweep.errors import StateHeldError\n"
        "try: ExperimentManager(['sweep.yaml'], port=0).start()\n"
        "except StateHeldError as error: print(error, end='')\n"
    )
    before = manager.get_status()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout == (
        f".fedsweep is in use by process {os.getpid()} on {socket.gethostname()}; `fedsweep status` shows its sweep, "
        "`fedsweep stop` ends it; or name another --state-dir"
    ), done.stderr
    assert manager.get_status() == before


def test_a_manager_lets_the_state_go(managers, folder):
    manager = managers()
    with pytest.raises(StateHeldError):
        ExperimentManager(["sweep.yaml"]).load_state()
    manager.close()
    with ExperimentManager(["sweep.yaml"]) as again:
        again.load_all_configs()
        assert again.load_state()


def test_a_holder_that_died_holds_nothing(folder):
    code = "from fedsweep.manager import ExperimentManager as E; import os; E().load_state(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 9
    with ExperimentManager() as manager:
        assert not manager.load_state()


def test_a_bad_state_is_never_started_over(folder, managers):
    managers().close()
    (folder / ".fedsweep/ledger.sqlite3").write_bytes(b"")
    manager = ExperimentManager(["sweep.yaml"], port=0)
    with pytest.raises(StateError, match=r"ledger\.sqlite3 is empty"):
        manager.start()
    assert (folder / ".fedsweep/ledger.sqlite3").read_bytes() == b""
    with pytest.raises(StateError):  # and the lock is free again
        manager.start()


def test_a_state_directory_that_cannot_be_made_says_so(folder):
    (folder / "file").write_text("")
    with pytest.raises(StateError, match="file/state cannot hold the state"):
        ExperimentManager(state_dir="file/state").load_state()


def test_a_wrong_configuration_touches_nothing(folder):
    (folder / "bad.yaml").write_text("p: {combinations: [{width_factr: [1]}]}")
    with pytest.raises(ConfigError, match="width_factr"):
        ExperimentManager(["bad.yaml"], port=0).start()
    assert os.listdir(folder) == ["bad.yaml"]


def test_nothing_to_run_says_so(folder):
    manager = ExperimentManager(port=0)
    with pytest.raises(UsageError, match=r"\.fedsweep has no tasks and no configuration is named"):
        manager.start()
    manager.close()


def test_the_same_configuration_is_not_expanded_again(managers, monkeypatch):
    managers()
    monkeypatch.setattr("fedsweep.manager.manager.expand", None)
    assert len(managers().tasks) == 8


def test_overrides_make_another_sweep(managers):
    managers()
    manager = managers(overrides=["global_rounds=3"])
    assert {task["config"]["global_rounds"] for task in manager.tasks.values()} == {3}
    assert manager.get_status()["config_change"]["added"] == 8


def test_leases_are_renewed_when_a_manager_comes_back(managers, clock):
    task = request(managers(lease_s=60))
    clock.advance(10_000)
    manager = managers(lease_s=60)
    assert manager.check_stale_assignments() == []
    held = [{"task_id": task["task_id"], "attempt": task["attempt"]}]
    assert ask(manager, "heartbeat", worker_id="w", tasks=held)["drop"] == []
    clock.advance(61)
    assert manager.check_stale_assignments() == [task["task_id"]]
