"""Tasks that train together: their rows, their failures, who joins and who leaves, and what is left of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsweep.fl.lanes import LaneInputs, Trained
from fedsweep.fl.loop import LoopTrainer
from fedsweep.manager.protocol import PROVENANCE_FIELDS
from fedsweep.plan.cohort import cohort_key
from fedsweep.plan.experiment import from_config
from fedsweep.worker import cohort_run, heartbeat, run_single_experiment
from fedsweep.worker import room as room_module
from fedsweep.worker.checkpoints import Checkpoints
from fedsweep.worker.client import ManagerClient
from fedsweep.worker.room import how_many_fit
from fedsweep.worker.station import Station
from fedsweep.worker.task import run_tasks

SHORT = {
    "dataset": "digits",
    "model_type": "lr",
    "width_factor": 2,
    "depth": 1,
    "num_clients": 2,
    "global_rounds": 2,
    "poison_ratio": 0.3,
}
LONG = SHORT | {"global_rounds": 100_000, "early_stopping_patience": None}

pytestmark = pytest.mark.usefixtures("plain_loop")


def task(name: str, seed: int = 1, **config: Any) -> dict[str, Any]:
    config = SHORT | config
    key = cohort_key(from_config(config), config.get("engine", "batched"))
    return {"task_id": name, "seed": seed, "config": config, "cohort": key}


def science(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in PROVENANCE_FIELDS}


def alone(given: dict[str, Any]) -> dict[str, Any]:
    result, history = run_single_experiment(given["config"], given["seed"])
    return science(result) | {"history": history}


def until(condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of the experiments of every cohort that a trainer was chosen for."""
    seen: list[list[int]] = []
    choose = cohort_run.choose_trainer

    def note(experiments: Any, *others: Any, **options: Any) -> Any:
        seen.append([each.seed for each in experiments])
        return choose(experiments, *others, **options)

    monkeypatch.setattr(cohort_run, "choose_trainer", note)
    return seen


def together(manager: Any) -> Any:
    manager.together = True
    return manager


# ---- rows


def test_tasks_that_train_together_have_the_rows_of_each_alone(make_manager, work, chosen):
    given = [
        task("a", 1),
        task("b", 2, aggregator="median", lr=0.01),
        task("c", 3, poison_ratio=0.0, global_rounds=4),
        task("d", 1, alpha=0.5, data_ordering="good_bad"),
    ]
    manager = together(make_manager(*given))
    assert work(manager) == 0
    assert chosen == [[1, 2, 3, 1]]
    assert manager.requests[0]["max_tasks"] == 256
    for each in given:
        found = manager.results[each["task_id"]]
        assert science(found) == alone(each)
        assert found["plan"] == "loop"
        log_text = (manager.output_dir / "logs" / f"{each['task_id']}.log").read_text()
        assert len(re.findall(r"round \d/\d: ", log_text)) == each["config"]["global_rounds"]
    assert manager.results["a"]["wall_time_s"] < manager.results["c"]["wall_time_s"]
    submitted = [request["task_id"] for request in manager.all("submit_result")]
    assert submitted == ["a", "b", "d", "c"]  # each when it ended


def test_what_cannot_train_together_does_not_and_the_reference_engine_runs_alone(make_manager, work, chosen):
    given = [
        task("a", 1),
        task("b", 2, model_type="cnn"),
        task("c", 3),
        task("d", 4, batch_size=16),
        task("e", 5, engine="reference"),
        task("f", 6, num_clients=3),
        task("g", 7, local_epochs=2),
        task("h", 8),
    ]
    manager = together(make_manager(*given))
    assert work(manager) == 0
    assert chosen == [[1, 3, 8], [2], [4], [6], [7]]
    for each in given:
        assert science(manager.results[each["task_id"]]) == alone(each)
    assert manager.results["e"]["plan"] == "reference"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_row(make_manager, work, threads):
    given = [task("a", 1), task("b", 2)]
    manager = together(make_manager(*given))
    assert work(manager, threads=threads) == 0
    assert [science(manager.results[each["task_id"]]) for each in given] == [alone(each) for each in given]


# ---- failures


def test_one_that_cannot_be_trained_fails_alone(make_manager, work, monkeypatch):
    class Picky(LoopTrainer):
        def train(self, inputs: LaneInputs, *others: Any) -> Trained:
            if (inputs.lr == 0.25).any():
                raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
            return super().train(inputs, *others)

    monkeypatch.setattr(cohort_run, "choose_trainer", lambda experiments, data, *_, **__: Picky(experiments[0], data))
    good = [task("a", 1), task("c", 3)]
    bad = [task("b", 2, lr=0.25), task("d", 4, min_client_size=1000), task("e", 5) | {"config": {"lr": "fast"}}]
    manager = together(make_manager(good[0], *bad, good[1]))
    assert work(manager) == 0
    failures = {failure["task_id"]: failure["error"] for failure in manager.all("task_failed")}
    assert failures.keys() == {"b", "d", "e"}
    assert failures["b"].startswith("CUDA out of memory: the experiment does not fit on this GPU. ")
    assert "min_client_size" in failures["d"]
    assert "lr" in failures["e"]
    assert {name: science(found) for name, found in manager.results.items()} == {
        each["task_id"]: alone(each) for each in good
    }


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_round_that_raises_is_made_again_with_fewer_at_once(make_manager, work, monkeypatch, most):
    monkeypatch.setattr(cohort_run, "REMEMBER_SHARE", 0)
    rounds: list[int] = []

    class Small(LoopTrainer):
        def train(self, *arguments: Any) -> Trained:
            rounds.append(1)
            return super().train(*arguments)

        def logits(self, weights: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            if len(weights) > most and len(rounds) > 1:
                raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
            return super().logits(weights, images)

    monkeypatch.setattr(cohort_run, "choose_trainer", lambda experiments, data, *_, **__: Small(experiments[0], data))
    given = [task(str(seed), split_seed=7, partition_seed=seed, global_rounds=3) for seed in range(5)]
    manager = together(make_manager(*given))
    assert work(manager) == 0
    assert len(rounds) > 3, "it never failed"
    assert (manager.output_dir / "logs" / "0.log").read_text().count("round 1/3") == 1
    if most == 0:
        assert len(manager.all("task_failed")) == 5
    else:
        assert manager.all("task_failed") == []
        assert all(science(manager.results[each["task_id"]]) == alone(each) for each in given)


def test_a_data_set_that_is_missing_fails_its_tasks_alone(make_manager, work):
    manager = together(make_manager(task("a", dataset="parquet:nowhere"), task("b")))
    assert work(manager) == 0
    assert [failure["task_id"] for failure in manager.all("task_failed")] == ["a"]
    assert list(manager.results) == ["b"]


# ---- heartbeats


def test_one_heartbeat_tells_of_all_and_a_dropped_task_leaves_the_others(make_manager, work):
    given = [task("gone", 1, **LONG), task("b", 2, **SHORT | {"global_rounds": 60}), task("other", model_type="cnn")]
    manager = together(make_manager(*(each | {"heartbeat_s": 0.02} for each in given)))

    def drop(message: dict[str, Any]) -> None:
        if message["type"] == "heartbeat" and message["tasks"][0].get("round", 0) >= 3:
            manager.drop = ["gone", "never held"]

    manager.before = drop
    assert work(manager) == 0
    held = [[each["task_id"] for each in beat["tasks"]] for beat in manager.all("heartbeat")]
    assert held[0] == ["gone", "b", "other"]
    both = [
        beat["tasks"] for beat in manager.all("heartbeat") if len(beat["tasks"]) == 3 and "round" in beat["tasks"][0]
    ]
    ahead = {beat[0]["round"] - beat[1].get("round", 0) for beat in both}
    assert {0} <= ahead <= {0, 1}  # a beat may come between the two words of one round
    assert all("round" not in beat[2] for beat in both)
    assert both[-1][0]["rounds"] == 100_000
    assert science(manager.results["b"]) == alone(given[1])
    assert set(manager.results) == {"b", "other"}
    assert manager.all("task_failed") == manager.all("release") == []


def test_a_task_that_is_handed_out_again_goes_on_under_its_new_attempt(make_manager, work, monkeypatch):
    monkeypatch.setattr(cohort_run, "how_many_fit", lambda *_: 2)
    given = [task("a", global_rounds=20, early_stopping_patience=None), task("b")]
    manager = together(make_manager(*given))

    def again(message: dict[str, Any]) -> None:
        if message["type"] == "request_task" and "cohort" in message:
            manager.waiting.append(given[0] | {"attempt": 9})
            manager.before = lambda _: None

    manager.before = again
    assert work(manager) == 0
    assert {request["task_id"]: request["attempt"] for request in manager.all("submit_result")} == {"a": 9, "b": 7}
    rounds = (manager.output_dir / "logs" / "a.log").read_text().count("round ")
    assert rounds == 20


# ---- others join


def test_others_join_where_experiments_have_ended(make_manager, work, monkeypatch, chosen):
    monkeypatch.setattr(cohort_run, "how_many_fit", lambda *_: 4)
    given = [task(str(seed), seed, global_rounds=1 + seed % 3) for seed in range(9)]
    stranger = task("stranger", 99, model_type="cnn")
    manager = together(make_manager(*given[:4]))

    def more(message: dict[str, Any]) -> None:
        if message["type"] == "submit_result" and len(manager.all("submit_result")) == 1:
            manager.waiting.extend([*given[4:], stranger | {"cohort": given[0]["cohort"]}])

    manager.before = more
    assert work(manager) == 0
    for each in [*given, stranger]:
        assert science(manager.results[each["task_id"]]) == alone(each)
    asked = [request for request in manager.all("request_task") if "cohort" in request]
    assert {request["cohort"] for request in asked} == {given[0]["cohort"]}
    assert asked[0].get("max_tasks", 1) == 2  # of four two ended with the first round
    assert chosen == [[0, 1, 2, 3], [99]]


def test_no_more_are_in_memory_than_fit(make_manager, work, monkeypatch):
    """The others are held, and join in the place of those that have ended; one that is dropped meanwhile does not."""
    monkeypatch.setattr(cohort_run, "how_many_fit", lambda *_: 2)
    most: list[int] = []

    class Counting(cohort_run.Cohort):
        def run_round(self) -> Any:
            most.append(len(self.names))
            time.sleep(0.03)
            return super().run_round()

    monkeypatch.setattr(cohort_run, "Cohort", Counting)
    given = [task(str(seed), seed, global_rounds=2 + seed % 2) for seed in range(7)]
    elsewhere = task("cnn", model_type="cnn")
    manager = together(make_manager(*(each | {"heartbeat_s": 0.02} for each in [*given, elsewhere])))
    manager.drop = ["6", "cnn"]
    assert work(manager) == 0
    assert max(most) == 2
    assert len(manager.all("heartbeat")[0]["tasks"]) == 8
    assert set(manager.results) == {"0", "1", "2", "3", "4", "5"}
    logs = [(manager.output_dir / "logs" / f"{name}.log").read_text() for name in ("6", "cnn")]
    assert not any(re.search(r"round \d", text) for text in logs)
    assert all(science(manager.results[each["task_id"]]) == alone(each) for each in given[:6])


def test_nobody_is_asked_to_join_while_little_room_is_free_or_by_a_manager_of_old(make_manager, work, monkeypatch):
    given = [task(str(seed), seed, global_rounds=1 if seed == 0 else 3) for seed in range(5)]
    monkeypatch.setattr(cohort_run, "how_many_fit", lambda *_: 5)
    manager = together(make_manager(*given))
    assert work(manager) == 0
    order = [request["type"] for request in manager.requests]
    assert order[:3] == ["request_task", "submit_result", "submit_result"]  # one of five rooms was free

    old = together(make_manager(*({**each, "cohort": None} for each in given)))
    assert work(old) == 0
    assert all("cohort" not in request for request in old.requests)


def test_a_manager_that_refuses_to_name_others_is_not_asked_again(make_manager, work, monkeypatch):
    monkeypatch.setattr(cohort_run, "how_many_fit", lambda *_: 2)
    manager = together(make_manager(*(task(str(seed), seed, global_rounds=1 + seed) for seed in range(2))))

    def refuse(message: dict[str, Any]) -> None:
        if "cohort" in message:
            manager.refusals = {"request_task": ["bad_field"]}

    manager.before = refuse
    assert work(manager) == 0
    assert len([request for request in manager.requests if "cohort" in request]) == 1
    assert len(manager.results) == 2


def test_as_many_fit_as_memory_allows(monkeypatch):
    from fedsweep.datasets import load_global_dataset

    data, experiment = load_global_dataset("digits"), from_config(SHORT)
    each = room_module.bytes_per_experiment(experiment, data)
    assert each > 16 * len(data.train_labels)
    fixed = room_module.fixed_bytes(None)
    assert how_many_fit(experiment, data, 0) == 1
    assert how_many_fit(experiment, data, int((10.5 * each + fixed) / room_module.SHARE)) == 10
    assert how_many_fit(experiment, data, 10**15) == room_module.MOST_TOGETHER

    class Hungry(LoopTrainer):
        def bytes_per_lane(self) -> int:
            return 10**9

    assert how_many_fit(experiment, data, 10**10, Hungry(experiment, data)) == 2
    assert room_module.bytes_per_experiment(experiment.model_copy(update={"width_factor": 64}), data) > each


# ---- a manager that is away


def test_while_the_manager_is_away_results_wait_and_training_goes_on(make_manager, work, state_dir, caplog):
    """It is not asked for each of them: every try takes seconds."""
    given = [task(str(seed), seed, global_rounds=1 + seed) for seed in range(4)]
    manager = together(make_manager(*given))
    manager.refusals = {"submit_result": ["retry_later"]}
    assert work(manager) == 0
    assert set(manager.results) == {"0", "1", "2", "3"}
    submitted = [request["task_id"] for request in manager.all("submit_result")]
    assert submitted == ["0", "0", "1", "2", "3"]  # the others were only tried when all had ended
    assert caplog.text.count("it waits in") == 4
    assert list((state_dir / "spool").iterdir()) == []


# ---- in the middle


class Clock:
    """Seconds that pass as the test says; a round takes `step`."""

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        return self.now


def test_experiments_are_saved_every_five_minutes_and_not_after_their_end(make_manager, tmp_path, monkeypatch):
    clock = Clock(100.0)
    written: list[tuple[float, int]] = []
    write = Checkpoints.write

    class Slow(LoopTrainer):
        def train(self, *arguments: Any) -> Trained:
            clock.now += clock.step
            return super().train(*arguments)

    def note(self: Checkpoints, checkpoint: Any) -> bool:
        written.append((clock.now, len(checkpoint.saved["history"])))
        return write(self, checkpoint)

    monkeypatch.setattr(cohort_run, "choose_trainer", lambda experiments, data, *_, **__: Slow(experiments[0], data))
    monkeypatch.setattr(Checkpoints, "write", note)
    manager = make_manager()
    given = task("a", global_rounds=8, early_stopping_patience=None)
    message = heartbeat.TaskMessage.model_validate(manager.as_task(given))
    with ManagerClient("127.0.0.1", manager.port, "a-token") as client:
        station = Station(client, "w", tmp_path / "spool", checkpoint_dir=tmp_path / "checkpoints", clock=clock)
        assert run_tasks([message], station)
    assert written == [(300.0, 3), (600.0, 6)]
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert manager.results["a"]["wall_time_s"] == 800.0


# A worker in a process of its own; it saves after every round.
WORKER = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from fedsweep.fl import candidates
from fedsweep.fl.loop import LoopTrainer
candidates.candidates = lambda example, data, threads, *_: {"loop": lambda: LoopTrainer(example, data, threads)}
from fedsweep.worker.worker import leave_process, worker_loop
leave_process(worker_loop(sys.argv[1], "cpu", state_dir=sys.argv[2], threads=2, checkpoint_s=float(sys.argv[3])))
"""


@pytest.fixture
def start_worker(state_dir: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(manager: Any, checkpoint_s: float = 0.0) -> subprocess.Popen[bytes]:
        with (tmp_path / "worker.log").open("ab") as log:
            arguments = [f"127.0.0.1:{manager.port}", str(state_dir), str(checkpoint_s)]
            started.append(subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stderr=log))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


MANY = {"global_rounds": 60, "early_stopping_patience": None, "depth": 2}


def is_in_the_middle(manager: Any) -> Callable[[], bool]:
    return lambda: any(each.get("round", 0) >= 10 for beat in manager.all("heartbeat") for each in beat["tasks"])


@pytest.mark.parametrize(("how", "checkpoint_s"), [(signal.SIGKILL, 0.0), (signal.SIGTERM, 300.0)])
def test_after_an_interruption_the_row_is_the_same(make_manager, work, start_worker, state_dir, how, checkpoint_s):
    """A killed worker's experiments go on from their checkpoints, each in other company, with the same bits."""
    given = [task(name, seed, **MANY) | {"heartbeat_s": 0.05} for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    expected = {each["task_id"]: alone(each) for each in given}
    first = together(make_manager(*given))
    worker = start_worker(first, checkpoint_s)
    until(is_in_the_middle(first), "ten rounds")
    worker.send_signal(how)
    assert worker.wait(timeout=10) == (-how if how == signal.SIGKILL else 0)
    assert first.results == {}
    assert len(list((state_dir / "checkpoints").glob("*.pt"))) == 3
    if how == signal.SIGTERM:
        assert {release["task_id"] for release in first.all("release")} == {"a", "b", "c"}

    second = together(make_manager(given[0], given[2], task("new", 9, **MANY)))
    assert work(second) == 0
    third = make_manager(given[1])
    assert work(third) == 0
    results = second.results | third.results
    for name in ("a", "b", "c"):
        assert science(results[name]) == expected[name]
        resumed = re.search(r"resumed after round (\d+)", (first.output_dir / "logs" / f"{name}.log").read_text())
        assert resumed is not None and int(resumed[1]) >= 9
    assert list((state_dir / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("where", ["train", "logits"])
def test_a_stop_signal_in_a_round_saves_what_was_before_it(make_manager, work, monkeypatch, where):
    """A round that has begun to change the models is not in what is saved."""
    given = [task(name, seed, global_rounds=6, early_stopping_patience=None) for name, seed in (("a", 1), ("b", 2))]
    expected = {each["task_id"]: alone(each) for each in given}
    rounds: list[int] = []

    def stop_in_the_fourth_round(now: str) -> None:
        if now == where and len(rounds) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    class Stopping(LoopTrainer):
        def train(self, *arguments: Any) -> Trained:
            rounds.append(1)
            stop_in_the_fourth_round("train")
            return super().train(*arguments)

        def logits(self, weights: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            stop_in_the_fourth_round("logits")
            return super().logits(weights, images)

    with monkeypatch.context() as patch:
        patch.setattr(cohort_run, "REMEMBER_SHARE", 0)
        patch.setattr(cohort_run, "choose_trainer", lambda experiments, data, *_, **__: Stopping(experiments[0], data))
        stopped = together(make_manager(*given))
        assert work(stopped) == 0
    assert {release["task_id"] for release in stopped.all("release")} == {"a", "b"}
    assert stopped.all("task_failed") == stopped.all("submit_result") == []
    manager = together(make_manager(*given))
    assert work(manager) == 0
    assert {name: science(found) for name, found in manager.results.items()} == expected
    assert "resumed after round 3" in (manager.output_dir / "logs" / "a.log").read_text()


def test_a_checkpoint_that_cannot_be_used_is_one_line_in_the_log(make_manager, work, state_dir, caplog):
    (state_dir / "checkpoints").mkdir()
    given = task("a")
    path = Checkpoints(state_dir / "checkpoints")._path(from_config(given["config"] | {"seed": 1}).signature)
    path.write_bytes(b"garbage")
    manager = make_manager(given)
    assert work(manager) == 0
    assert science(manager.results["a"]) == alone(given)
    assert caplog.text.count("is not used and removed: it cannot be read") == 1
