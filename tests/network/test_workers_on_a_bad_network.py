"""Real workers and a real manager over a network that fails all the time, or is away for a long time.

`FEDSWEEP_EXAMPLES` says how many sweeps there are: one, or eight times so many.
"""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import instant
import pytest
from bench import EXAMPLES, Bench, until
from proxy import CUTS, DELAYS, DROP, REPEATS, Fault

from fedsweep.worker import client as client_module
from fedsweep.worker import cohort_run, held, worker
from fedsweep.worker.client import ManagerClient


@pytest.fixture
def workers(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Worker]]]:
    """Start workers of a bench, on its bad line; they train in no time once there is a file `gate`."""
    replaced = {module: dict(vars(module)) for module in (cohort_run, worker, client_module, held)}
    instant.load()
    instant.install(tmp_path, together=2)
    monkeypatch.setattr(worker, "ManagerClient", lambda *given, **options: ManagerClient(*given, 0.5, **options))
    (tmp_path / "raised").mkdir()
    started: list[Worker] = []

    def start(count: int, here: Bench) -> list[Worker]:
        started.extend(Worker(here.network.port, f"worker-{number}") for number in range(count))
        for each in started:
            each.start()
        return started

    yield start
    (tmp_path / "gate").touch()
    for each in started:
        each.join(30)
        assert not each.is_alive()
    for module, names in replaced.items():
        vars(module).update(names)


class Worker(threading.Thread):
    """A worker in a thread of its own, and its exit status."""

    def __init__(self, port: int, name: str) -> None:
        super().__init__(daemon=True)
        self.address, self.worker_id = f"127.0.0.1:{port}", name
        self.status: int | None = None

    def run(self) -> None:
        self.status = worker.worker_loop(self.address, "cpu", worker_id=self.worker_id, threads=1)


def in_spool() -> list[Path]:
    return [*Path(".fedsweep/spool").glob("*.result.json")]


def test_workers_bring_what_they_hold_when_the_line_is_back_after_a_long_time(bench, workers, figures):
    """All leases have ended by then. Meanwhile they compute what they hold, take nothing more, and do not end."""
    here = bench(40, lease_s=0.5, heartbeat_s=0.1)
    started = workers(3, here)
    until(lambda: here.notes.heard_of["task"] == 3, "each worker has heard of two tasks")
    here.network.go_down()
    before = here.attempts
    Path("gate").touch()
    until(lambda: len([*in_spool(), *Path("raised").iterdir()]) == 6, "what was held lies in the spool, or has raised")
    until(lambda: not here.manager.assigned_tasks, "the leases end")
    figures["results that waited in a spool"] += len(in_spool())
    assert all(each.is_alive() for each in started)
    assert here.attempts == before
    here.network.come_up()
    for each in started:
        each.join(60)
    assert [each.status for each in started] == [0, 0, 0]
    assert in_spool() == []
    assert here.judge() == []


@pytest.mark.parametrize("fault", CUTS["answer"])
def test_workers_hear_that_all_is_done_although_the_answer_is_lost(bench, workers, fault):
    """The manager ends by itself, and no worker is left behind that would wait for another one for ever."""
    here = bench(6, stay=False)
    lost: Counter[str] = Counter()

    def choose(request: bytes) -> Fault | None:
        asked = json.loads(request)
        if asked["type"] != "request_task" or not here.manager.check_all_complete() or lost[asked["worker_id"]] == 2:
            return None
        lost[asked["worker_id"]] += 1
        return Fault(fault, 20)

    here.network.choose = choose
    Path("gate").touch()
    started = workers(3, here)
    for each in started:
        each.join(30)
    assert [each.status for each in started] == [0, 0, 0]
    assert set(lost.values()) == {2}
    here.thread.join(30)
    assert not here.thread.is_alive()
    assert here.judge() == []


def troubles(dice: random.Random) -> Callable[[bytes], Fault | None]:
    """Something happens to every second exchange; to fewer where tasks are handed out: five losses are too many."""

    def choose(request: bytes) -> Fault | None:
        kind = json.loads(request)["type"]
        if dice.random() > (0.1 if kind == "request_task" else 0.5):
            return None
        what = dice.choice([*CUTS["request"], *CUTS["answer"], *REPEATS, *DELAYS, DROP])
        if what == DROP and kind == "heartbeat":
            return None
        if what in REPEATS:
            return Fault(what, dice.randrange(20))
        length = len(request) if what.endswith("request") else dice.choice([40, 1500])
        return Fault(what, dice.randrange(length + 1), pause_s=dice.random() * 0.05)

    return choose


@pytest.mark.parametrize("seed", range(1 if EXAMPLES == 1 else 8 * EXAMPLES))
def test_workers_finish_a_sweep_over_a_bad_network(bench, workers, figures, seed):
    here = bench(80, lease_s=1.0, heartbeat_s=0.1)
    dice = random.Random(seed)
    here.network.choose = troubles(dice)
    Path("gate").touch()
    started = workers(4, here)
    for share in (0.2, 0.5, 0.8):
        until(lambda share=share: len(here.manager.completed_tasks) >= share * here.tasks, "some more are done")
        here.network.go_down()
        until(in_spool, "a result waits")
        here.network.come_up()
    for each in started:
        each.join(60)
    assert [each.status for each in started] == [0] * 4
    assert in_spool() == []
    figures["sweeps of workers"] += 1
    assert here.judge() == []
