"""Failures put together by cause, tried again, and tasks that are not run."""

from __future__ import annotations

import json

import pytest

from fedsweep.errors import ProtocolError
from fedsweep.manager.answers import answer
from fedsweep.manager.failures import CANCELLED_ERROR, Failure, host_of
from fedsweep.manager.protocol import parse_request

GRID = "p: {combinations: [{width_factor: [1, 2]}, {seed: [1, 2, 3]}]}\nq: {combinations: [{width_factor: [2, 64]}]}"


def ask(manager, kind, legacy=False, **fields):
    return answer(manager.sweep, parse_request({"type": kind, **fields}), legacy)


def take(manager, worker="host-7-a3f0c1"):
    return ask(manager, "request_task", worker_id=worker)["task"]


def fail(manager, task, error="ValueError: no", worker="host-7-a3f0c1", **details):
    common = {"task_id": task["task_id"], "worker_id": worker, "attempt": task["attempt"]}
    return ask(manager, "task_failed", error=error, **common, **details)


def fail_for_good(manager, error="ValueError: no"):
    """Hand out and fail, until one task is `failed`; its id."""
    first = take(manager)
    fail(manager, first, error)
    while manager.tasks[first["task_id"]]["status"] != "failed":
        manager.sweep.ledger._db.execute("UPDATE tasks SET setbacks = -1 WHERE task_id = ?", (first["task_id"],))
        attempt = manager.sweep.ledger._open_attempt
        with manager.sweep.ledger._transaction() as db:
            number = manager.sweep.ledger.view.task(first["task_id"]).number
            first = first | {"attempt": attempt(db, number, "host-7-a3f0c1", 60.0)}
        fail(manager, first, error)
    return first["task_id"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("size 12 does not fit 3.5e-4", "size 7 does not fit 1"),
        ("cannot read /data/a/x.gz", "cannot read /mnt/b/y.gz"),
        ("at 0x7f9f38238710", "at 0x11"),
        ("task exp1_3_42", "task exp1_17_101"),
        ("GPU-5d6f1c2a-0b1c-4d5e-8f90-123456789abc is lost", "GPU-00000000-0b1c-4d5e-8f90-123456789abc is lost"),
    ],
)
def test_what_differs_from_task_to_task_makes_no_other_cause(first, second):
    failures = [Failure.of("", exception="ValueError", message=words, frame="a.py:f") for words in (first, second)]
    assert failures[0].cause == failures[1].cause
    assert failures[0].group == failures[1].group


@pytest.mark.timeout(30)  # one that begins again at each letter would take half an hour
@pytest.mark.parametrize("word", ["a", ".", "-a", "0", "a1", "1.", "a/", "/", "~/", "A.Error: ", 'File "', "GPU-0"])
def test_a_message_of_one_endless_word_is_read_in_time(word):
    assert Failure.of("", exception="ValueError", message=word * 100_000, frame="a.py:f").group
    assert Failure.of(word * 100_000).cause


def test_another_type_words_or_place_is_another_cause():
    one = {"exception": "ValueError", "message": "no room", "frame": "a.py:f"}
    others = [{"exception": "KeyError"}, {"message": "no time"}, {"frame": "a.py:g"}]
    groups = {Failure.of("", **(one | change)).group for change in [{}, *others]}
    assert len(groups) == 4


def test_the_words_of_an_old_client_are_understood():
    text = (
        'Traceback (most recent call last):\n  File "/x/fedsweep/fl/a.py", line 3, in f\ntorch.OutOfMemoryError: 2 GiB'
    )
    failure = Failure.of(text)
    assert (failure.exception, failure.message, failure.frame) == ("OutOfMemoryError", "2 GiB", "fedsweep/fl/a.py:f")
    assert Failure.read(failure.dump()) == failure
    assert Failure.read("ValueError: no") == Failure.of("ValueError: no")
    assert Failure.of("").cause == "no reason was given"


def test_the_host_is_read_from_the_names_of_our_workers_only():
    assert [host_of(name) for name in ("node-7-4711-a3f0c1", "gpu 3")] == ["node-7", "gpu 3"]


def test_failures_of_open_and_failed_tasks_are_grouped(managers):
    manager = managers(GRID)
    failed = fail_for_good(manager, "ValueError: size 12")
    fail(manager, take(manager, "v"), "ValueError: size 7", "v", exception="ValueError", message="size 7", host="node9")
    fail(manager, take(manager, "v"), "KeyError: 'x'", "v")
    first, second = ask(manager, "failures")["groups"]
    assert (first["cause"], first["failures"], first["failed"], first["open"]) == ("ValueError: size N", 5, 1, 1)
    assert first["task_ids"][0] == failed
    assert first["hosts"] == ["host", "node9"]
    assert (second["cause"], second["failed"], second["open"]) == ("KeyError: 'x'", 0, 1)


def test_the_text_of_a_group_is_of_the_task_that_its_command_repeats(managers):
    manager = managers(GRID)
    fail(manager, take(manager), "ValueError: size 1")
    failed = fail_for_good(manager, "ValueError: size 12")
    fail(manager, take(manager, "v"), "ValueError: size 7", "v")
    (group,) = ask(manager, "failures")["groups"]
    assert (group["task_ids"][0], group["text"]) == (failed, "ValueError: size 12")


def test_failures_of_an_earlier_configuration_are_counted_and_shown_when_asked_for(managers):
    manager = managers(GRID)
    failed = fail_for_good(manager, "ValueError: size 12")
    open_task = take(manager)
    fail(manager, open_task, "KeyError: 'x'")
    assert ask(manager, "failures")["earlier"] == 0
    manager.close()
    manager = managers("r: {combinations: [{width_factor: [128]}]}")
    present = ask(manager, "failures")
    assert (present["groups"], present["earlier"]) == ([], 2)
    earlier = ask(manager, "failures", earlier=True)["groups"]
    assert [(group["task_ids"], group["failed"], group["open"]) for group in earlier] == [
        ([failed], 1, 0),
        ([open_task["task_id"]], 0, 1),
    ]
    with pytest.raises(ProtocolError, match="no group of failures"):
        ask(manager, "retry", names=[earlier[0]["group"]])


@pytest.mark.parametrize("how", ["drain", "stop"])
def test_an_ended_sweep_says_that_nothing_is_handed_out(managers, how):
    manager = managers(GRID)
    assert ask(manager, "failures")["hands_out"]
    ask(manager, how)
    assert not ask(manager, "failures")["hands_out"]


def test_a_retry_gives_a_fresh_budget_and_attempts_count_on(managers):
    manager = managers(GRID)
    failed = fail_for_good(manager)
    last = manager.sweep.ledger.view.last_attempt()
    (group,) = ask(manager, "failures")["groups"]
    assert ask(manager, "retry", names=[group["group"]]) == {"type": "ack", "retried": 1, "cancelled": 0}
    task = manager.tasks[failed]
    assert (task["status"], task["retry_count"], task["last_error"]) == ("pending", 0, None)
    assert ask(manager, "failures")["groups"] == []
    assert take(manager)["attempt"] > last
    assert ask(manager, "retry")["retried"] == 0


def test_cancelled_tasks_are_failed_dropped_and_brought_back(managers, make_result, check_sound):
    manager = managers(GRID)
    running = take(manager)
    total = manager.get_status()["total"]
    assert ask(manager, "cancel", names=["p"]) == {"type": "ack", "cancelled": 6, "running": 0, "left": 0}
    assert ask(manager, "cancel", names=[running["task_id"]])["running"] == 1
    status = manager.get_status()
    assert (status["cancelled"], status["failed"]) == (7, 7)
    assert status["pending"] + status["assigned"] + status["complete"] + status["failed"] == total
    held = [{"task_id": running["task_id"], "attempt": running["attempt"]}]
    assert ask(manager, "heartbeat", worker_id="host-7-a3f0c1", tasks=held)["drop"] == [running["task_id"]]
    manager.close()
    check_sound(manager.state_file)
    assert ask(manager, "retry") == {"type": "ack", "retried": 0, "cancelled": 7}
    assert ask(manager, "retry", names=["cancelled"])["retried"] == 7
    assert manager.get_status()["cancelled"] == 0
    manager.close()
    check_sound(manager.state_file)


def test_a_phase_means_the_tasks_that_no_other_phase_asks_for(managers):
    manager = managers(GRID.replace("{seed: [1, 2, 3]}", "{seed: [42, 2, 3]}"))
    shared = [
        name for name, task in manager.tasks.items() if task["seed"] == 42 and task["config"]["width_factor"] == 2
    ]
    ask(manager, "cancel", names=["p"])
    assert [manager.tasks[name]["status"] for name in shared] == ["pending"]
    assert {task["last_error"] for task in manager.tasks.values()} == {None, CANCELLED_ERROR}


def test_a_name_that_means_nothing_changes_nothing(managers):
    manager = managers(GRID)
    with pytest.raises(ProtocolError, match="did you mean 'p_0_1'") as raised:
        ask(manager, "cancel", names=["q", "p_0_11"])
    assert raised.value.code == "unknown_name"
    assert manager.get_status()["failed"] == 0


@pytest.mark.parametrize("kind", ["failures", "drain", "stop", "retry"])
def test_old_clients_may_not_command(managers, kind):
    with pytest.raises(ProtocolError) as raised:
        ask(managers(GRID), kind, legacy=True)
    assert raised.value.code == "unauthorized"


def test_a_worker_that_is_set_aside_is_told_so_and_shown_over_restarts(managers):
    manager = managers(GRID)
    take(manager, "good")
    for _ in range(3):
        fail(manager, take(manager), "RuntimeError: CUDA error")
    told = ask(manager, "request_task", worker_id="host-7-a3f0c1")
    assert (told["done"], told["set_aside"]) == (False, True)
    assert "CUDA error" in told["message"]
    assert manager.get_status()["failed"] == 0
    (shown,) = managers(GRID).get_status()["set_aside"]
    assert (shown["host"], shown["reason"], shown["failures"]) == ("host", "RuntimeError: CUDA error", 3)


def test_of_a_thousand_tasks_on_eight_workers_one_of_them_broken_none_fails(managers, make_result, clock):
    """The broken one ends when it is told so, and is started again under another name, for ever."""
    manager = managers(f"p: {{combinations: [{{seed: {json.dumps(list(range(1000)))}}}]}}")
    workers = [f"w{number}" for number in range(8)]
    lives = 0
    while not manager.check_all_complete():
        clock.advance(1)
        for index, worker in enumerate(workers):
            told = ask(manager, "request_task", worker_id=worker)
            if told.get("set_aside"):
                assert index == 3
                lives += 1
                workers[index] = f"broken{lives}"
            elif told["type"] == "task" and index == 3:
                fail(manager, told["task"], "RuntimeError: CUDA error", worker)
            elif told["type"] == "task":
                common = {"task_id": told["task"]["task_id"], "worker_id": worker, "attempt": told["task"]["attempt"]}
                ask(manager, "submit_result", result_data=make_result(told["task"]), **common)
    status = manager.get_status()
    assert (status["complete"], status["failed"]) == (1000, 0)
    assert lives > 10


@pytest.mark.parametrize("how", ["drain", "stop"])
def test_a_sweep_that_is_ended_tells_its_workers(managers, how, caplog):
    caplog.set_level("INFO")
    manager = managers(GRID)
    task = take(manager)
    assert ask(manager, how) == {"type": "ack", "workers": 1, "tasks": 1, "lease_s": 120.0}
    assert "waiting for host-7-a3f0c1 (1 task); a worker without a sign is given up after 120 s" in caplog.text
    assert manager.get_status()["ending"] == how
    told = ask(manager, "request_task", worker_id="v")
    assert (told["type"], told["done"]) == ("no_task", True)
    assert f"fedsweep {how}" in told["message"]
    held = [{"task_id": task["task_id"], "attempt": task["attempt"]}]
    beat = ask(manager, "heartbeat", worker_id="host-7-a3f0c1", tasks=held)
    assert beat == {"type": "ack", "drop": []} | ({"stop": True} if how == "stop" else {})


def train_half(manager, clock, count):
    """Take so many of forty equal tasks, and do five of their ten rounds, each in half a minute; them."""
    tasks = ask(manager, "request_task", worker_id="w", max_tasks=count)["tasks"]
    manager.get_status()
    for round_number in range(1, 6):
        assert manager.get_status()["eta_s"] is None
        clock.advance(30)
        held = [
            {"task_id": task["task_id"], "attempt": task["attempt"], "round": round_number, "rounds": 10}
            for task in tasks
        ]
        ask(manager, "heartbeat", worker_id="w", tasks=held)
    return tasks


FORTY = f"p: {{combinations: [{{seed: {json.dumps(list(range(40)))}}}]}}"


def test_the_time_left_counts_experiments_that_train_together_once(managers, make_result, clock):
    manager = managers(FORTY)
    tasks = train_half(manager, clock, 20)
    # From the first round on, four rounds of 20 took 120 s; 20 halves and 20 wholes are left.
    assert manager.get_status()["eta_s"] == pytest.approx(450)
    clock.advance(150)
    for task in tasks:
        result = make_result(task, wall_time_s=100.0)
        ask(manager, "submit_result", task_id=task["task_id"], worker_id="w", result_data=result)
    assert manager.get_status()["eta_s"] == pytest.approx(300)


@pytest.mark.parametrize(("how", "seconds"), [("drain", 150), ("stop", None)])
def test_the_time_left_of_a_sweep_that_ends_is_that_of_what_still_runs(managers, clock, how, seconds):
    manager = managers(FORTY)
    train_half(manager, clock, 20)
    assert manager.get_status()["eta_s"] == pytest.approx(450)
    ask(manager, how)
    manager.sweep.look_at_pace()  # as it does all the time while it serves
    assert manager.get_status()["eta_s"] == pytest.approx(seconds)


def test_no_time_left_is_told_while_nobody_who_holds_tasks_gives_a_sign(managers, clock):
    manager = managers(FORTY)
    tasks = train_half(manager, clock, 20)
    ask(manager, "drain")
    assert manager.get_status()["eta_s"] == pytest.approx(150)
    clock.advance(26)
    assert ask(manager, "request_task", worker_id="idle")["done"]
    assert manager.get_status()["eta_s"] is None
    held = [{"task_id": task["task_id"], "attempt": task["attempt"], "round": 6, "rounds": 10} for task in tasks]
    ask(manager, "heartbeat", worker_id="w", tasks=held)
    clock.advance(2)
    assert manager.get_status()["eta_s"] is not None


def test_a_drain_waits_for_those_that_hold_tasks_by_name(managers, caplog):
    caplog.set_level("INFO")
    manager = managers(FORTY)
    for number in range(10):
        ask(manager, "request_task", worker_id=f"w{number}", max_tasks=1 + (number == 9))
    answered = ask(manager, "drain")
    assert (answered["workers"], answered["tasks"]) == (10, 11)
    assert "waiting for w9 (2 tasks), w0 (1 task), " in caplog.text
    assert "w6 (1 task), 2 more; a worker without a sign" in caplog.text


def test_attempts_that_failed_are_counted_while_their_tasks_are_tried_again(managers, make_result):
    manager = managers("p: {combinations: [{seed: [1, 2, 3]}]}")
    count = lambda: manager.get_status()["failed_attempts"]  # noqa: E731
    assert count() == 0
    tasks = [take(manager), take(manager)]
    for task in tasks:
        fail(manager, task, "PartitionError: no")
    assert count() == 2
    assert (manager.get_status()["failed"], manager.get_status()["failures"]) == (0, [])
    take(manager)  # the third of them
    again = take(manager)
    assert count() == 2, "under way again, and yet failed once"
    fail(manager, again, "PartitionError: no")
    assert count() == 3
    fail_for_good(manager, "PartitionError: no")
    other = take(manager)
    assert count() == manager.tasks[other["task_id"]]["retry_count"] > 0, "what failed for good is told elsewhere"
    ask(manager, "submit_result", task_id=other["task_id"], worker_id="host-7-a3f0c1", result_data=make_result(other))
    assert count() == 0
    ask(manager, "retry", names=[])
    assert count() == 0
