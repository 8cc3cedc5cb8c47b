"""One fault at a time, with real managers and workers: what happens to tasks, results and processes."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import pytest
from facts import Ledger
from instant import DEADLY_SEED
from judge import is_ack, of_type
from processes import Process, RealSweep, arm, until

LEASE_S, LATE_S = 2.0, 5.0  # a task goes to another within the lease and so much more
GRACE_S = 5.0


def sweep_of(tasks: int) -> str:
    """A sweep of so many alike tasks."""
    return (
        "defaults: {dataset: digits, model_type: lr, width_factor: 1, depth: 0, num_clients: 2, output_dir: out}\n"
        f"p: {{combinations: [{{seed: {list(range(tasks))}}}]}}\n"
    )


def ends(ledger: Ledger) -> Counter[str | None]:
    """How the attempts have ended."""
    return Counter(attempt.ended_as for attempt in ledger.attempts)


def held_by(sweep: RealSweep, worker: Process, tasks: int) -> set[str]:
    """Wait until a worker holds so many tasks and has said so; which."""
    until(lambda: len(sweep.given(worker)) == tasks, f"{tasks} tasks for {worker.name}")
    until(lambda: beats(sweep, worker), f"a heartbeat of {worker.name}")
    return {handout.task_id for handout in sweep.given(worker)}


def beats(sweep: RealSweep, worker: Process) -> int:
    """How many heartbeats of a worker were answered."""
    return sum(each.answer is not None for each in of_type(sweep.history(worker), "heartbeat"))


def requests(sweep: RealSweep, worker: Process) -> int:
    """How often a worker has asked for tasks."""
    return sum(1 for _ in of_type(sweep.history(worker), "request_task"))


def test_the_tasks_of_a_killed_worker_go_to_another_within_the_lease_and_5_s(real_sweep):
    sweep = real_sweep(sweep_of(1))
    manager = sweep.manager(lease_s=LEASE_S)
    victim = sweep.worker()
    tasks = held_by(sweep, victim, 1)
    other = sweep.worker()
    until(lambda: requests(sweep, other) >= 2, "a worker that waits")
    victim.kill()
    until(lambda: {each.task_id for each in sweep.given(other)} == tasks, "its tasks elsewhere", LEASE_S + LATE_S)
    sweep.open()
    ledger = sweep.see_the_end(manager, other)
    assert ends(ledger) == {"lost": 1, "result": 1}
    assert [(task.failures, task.losses) for task in ledger.tasks] == [(0, 1)]


@pytest.mark.parametrize("is_there", [False, True], ids=["the next", "one that waits"])
def test_what_a_killed_worker_has_computed_is_delivered_and_not_computed_again(real_sweep, is_there):
    """By the next worker on that host, and by one that is there already and has nothing to do."""
    sweep = real_sweep(sweep_of(1))
    manager = sweep.manager(lease_s=LEASE_S)
    victim = sweep.worker()
    held_by(sweep, victim, 1)
    other = sweep.worker() if is_there else None
    if other is not None:
        until(lambda: requests(sweep, other) >= 2, "a worker that waits")
    arm(sweep.folder, victim.name, "after rename")  # in the spool, not sent
    sweep.open()
    assert sweep.wait_for(victim, 20) == -signal.SIGKILL
    assert not list(of_type(sweep.history(victim), "submit_result"))
    other = other or sweep.worker()
    ledger = sweep.see_the_end(manager, other)
    if not is_there:
        assert sweep.history(other)[0].request["type"] == "submit_result", "it asked for work before"
    (result,) = ledger.results
    assert result.data["worker"].startswith(f"{victim.name}-")
    assert [attempt.worker for attempt in ledger.attempts] == [result.data["worker"]], "it was handed out again"
    assert not sweep.spooled()


def are_lost(sweep: RealSweep) -> None:
    """Wait until the manager has taken back what a worker held that does not move."""
    until(lambda: sweep.status()["assigned"] == 0, "the tasks taken back", LEASE_S + LATE_S)


def test_a_worker_that_was_given_up_and_comes_back_delivers_if_its_task_is_open(real_sweep):
    """It stands still when it has computed the result and not sent it; else it may hear first that it is given up."""
    sweep = real_sweep(sweep_of(1))
    manager = sweep.manager(lease_s=LEASE_S)
    worker = sweep.worker()
    held_by(sweep, worker, 1)
    arm(sweep.folder, worker.name, "after rename", kind=signal.SIGSTOP)
    sweep.open()
    are_lost(sweep)
    assert sweep.status()["pending"] == 1
    worker.signal(signal.SIGCONT)
    ledger = sweep.see_the_end(manager, worker)
    (submitted,) = of_type(sweep.history(worker), "submit_result")
    assert is_ack(submitted, "accepted")
    assert ends(ledger) == {"lost": 1}, "it was handed out again"


def test_late_words_of_a_worker_that_was_given_up_change_nothing(real_sweep):
    """It comes back when another holds its task: it is told to drop it, and its failure counts for nothing."""
    sweep = real_sweep(sweep_of(1))
    manager = sweep.manager(lease_s=LEASE_S)
    late = sweep.worker(habit="every task fails", gate="gate of the late one")
    tasks = held_by(sweep, late, 1)
    late.signal(signal.SIGSTOP)
    are_lost(sweep)
    other = sweep.worker()
    assert held_by(sweep, other, 1) == tasks
    late.signal(signal.SIGCONT)
    until(lambda: drops(sweep, late), "a heartbeat that is told to drop its task")
    sweep.open("gate of the late one")
    until(lambda: failed(sweep, late) == 1, "a late failure")
    assert sweep.status()["assigned"] == 1
    until_each_beats_again(sweep, [other])
    sweep.open()
    ledger = sweep.see_the_end(manager, late, other)
    assert not drops(sweep, other)
    assert ends(ledger) == {"lost": 1, "result": 1}
    assert [(task.failures, task.losses) for task in ledger.tasks] == [(0, 1)]


def drops(sweep: RealSweep, worker: Process) -> int:
    """How many heartbeats of a worker were told to drop a task."""
    return sum(bool((each.answer or {}).get("drop")) for each in of_type(sweep.history(worker), "heartbeat"))


def failed(sweep: RealSweep, worker: Process) -> int:
    """How many failures of a worker were answered."""
    return sum(each.answer is not None for each in of_type(sweep.history(worker), "task_failed"))


def test_workers_outlive_a_manager_that_is_away_and_deliver_what_they_computed_meanwhile(real_sweep):
    sweep = real_sweep(sweep_of(12))
    manager = sweep.manager(lease_s=LEASE_S)
    workers = [sweep.worker(patience_s=0.5) for _ in range(3)]
    held = [held_by(sweep, worker, 2) for worker in workers]
    manager.kill()
    sweep.open()
    until(lambda: len(sweep.spooled()) == 6, "six results in the spool")
    kept = {each["task_id"]: each["result_data"]["plan"] for each in sweep.spooled()}
    began = {worker.name: len(sweep.history(worker)) for worker in workers}
    # Away for longer than leases, the patience of a worker that never had an answer, and several tries.
    wait_at_least(2 * LEASE_S)
    until(
        lambda: all(len(sweep.history(worker)) >= began[worker.name] + 10 for worker in workers),
        "ten more tries of each worker",
    )
    assert [worker.status for worker in workers] == [None] * 3
    assert [len(sweep.given(worker)) for worker in workers] == [2] * 3
    assert set(kept) == set.union(*held)
    manager = sweep.manager(lease_s=LEASE_S)
    ledger = sweep.see_the_end(manager, *workers)
    assert {result.task_id: result.data["plan"] for result in ledger.results}.items() >= kept.items()
    assert ends(ledger) == {"result": 12}
    assert not sweep.spooled()


def wait_at_least(seconds: float) -> None:
    """Let time go by: it is the fault."""
    began = time.monotonic()
    until(lambda: time.monotonic() - began >= seconds, "time", seconds + 1)


def test_a_worker_that_fails_whatever_it_gets_is_set_aside_and_ends_with_status_1(real_sweep):
    """Of 400 tasks on 8 workers, one of them broken, none ends failed."""
    sweep = real_sweep(sweep_of(400))
    manager = sweep.manager()
    broken = sweep.worker(habit="every task fails")
    held_by(sweep, broken, 2)
    workers = [sweep.worker() for _ in range(7)]
    for worker in workers:
        held_by(sweep, worker, 2)
    sweep.open()
    assert sweep.wait_for(broken, 30) == 1
    ledger = sweep.see_the_end(manager, *workers)
    (aside,) = json.loads((sweep.folder / ".fedsweep/last_status.json").read_text())["set_aside"]
    assert aside["worker_id"].startswith(f"{broken.name}-")
    assert (aside["host"], aside["failures"]) == (socket.gethostname(), failed(sweep, broken))
    assert aside["reason"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert len({handout.task_id for handout in sweep.given(broken)}) >= 3
    assert ends(ledger) == {"result": 400, "forgiven": aside["failures"]}
    assert {(task.status, task.failures) for task in ledger.tasks} == {("complete", 0)}


def test_a_task_that_kills_every_worker_fails_after_five_losses_and_the_sweep_goes_on(real_sweep, fedsweep):
    sweep = real_sweep(sweep_of(DEADLY_SEED + 3))
    manager = sweep.manager(lease_s=0.7)
    sweep.open()
    workers: list[Process] = []

    def keep_two_alive() -> bool:
        """As `fedsweep run` or a scheduler does."""
        for _ in range(2 - sum(worker.status is None for worker in workers)):
            if sweep.status().get("pending") or sweep.status().get("assigned"):
                workers.append(sweep.worker(habit="one task kills"))
        return manager.status is not None

    until(keep_two_alive, "the end of the sweep", 60)
    killed = [worker for worker in workers if worker.status == -signal.SIGKILL]
    ledger = sweep.see_the_end(manager, *(worker for worker in workers if worker not in killed), status=1)
    deadly = f"p_0_{DEADLY_SEED}"
    lost = [attempt.worker for attempt in ledger.attempts if (attempt.task_id, attempt.ended_as) == (deadly, "lost")]
    assert {worker_id.rsplit("-", 2)[0] for worker_id in lost} == {worker.name for worker in killed}
    assert len(lost) == len(killed) == 5
    (group,) = json.loads(fedsweep("failures", "--json").stdout)["groups"]
    assert (group["group"], group["task_ids"]) == ("lost", [deadly])
    assert set(group["hosts"]) == {worker.name for worker in killed}
    for task in ledger.tasks:
        if task.task_id == deadly:
            assert (task.status, task.failures, task.losses) == ("failed", 0, 5)
        else:
            assert (task.status, task.failures) == ("complete", 0)
            assert task.losses <= 2


def test_sigterm_in_a_task_ends_a_worker_in_order_and_another_has_its_tasks_at_once(real_sweep):
    sweep = real_sweep(sweep_of(1))
    manager = sweep.manager(lease_s=60.0)
    worker = sweep.worker()
    tasks = held_by(sweep, worker, 1)
    other = sweep.worker()
    until(lambda: requests(sweep, other) >= 2, "a worker that waits")
    worker.signal(signal.SIGTERM)
    assert sweep.wait_for(worker, GRACE_S) == 0
    until(lambda: {each.task_id for each in sweep.given(other)} == tasks, "its tasks elsewhere", 5)
    sweep.open()
    ledger = sweep.see_the_end(manager, other)
    assert ends(ledger) == {"released": 1, "result": 1}
    assert [(task.failures, task.losses) for task in ledger.tasks] == [(0, 0)]


def test_a_manager_whose_clock_is_set_by_a_day_ends_no_lease_early_and_none_late(real_sweep):
    sweep = real_sweep(sweep_of(2))
    manager = sweep.manager(lease_s=LEASE_S, has_settable_clock=True)
    workers = [sweep.worker(together=1), sweep.worker(together=1)]
    held = [held_by(sweep, worker, 1) for worker in workers]
    for days in (1, -1):
        (sweep.folder / "days").write_text(str(days))
        until_each_beats_again(sweep, workers)
        assert sweep.status()["assigned"] == 2
    workers[0].kill()
    third = sweep.worker(together=1)
    until(lambda: {each.task_id for each in sweep.given(third)} == held[0], "its task elsewhere", LEASE_S + LATE_S)
    sweep.open()
    ledger = sweep.see_the_end(manager, workers[1], third)
    assert ends(ledger) == {"lost": 1, "result": 2}
    first, *_, last = (datetime.fromisoformat(attempt.started_at) for attempt in ledger.attempts)
    assert last < first, "the clock of the manager was never set back"


def until_each_beats_again(sweep: RealSweep, workers: Sequence[Process], times: int = 3) -> None:
    """Wait for more heartbeats that are answered."""
    wanted = {worker.name: beats(sweep, worker) + times for worker in workers}
    until(lambda: all(beats(sweep, worker) >= wanted[worker.name] for worker in workers), f"{times} more heartbeats")
