"""The worker against a manager that the test controls: what it asks, keeps, delivers, gives back, and when it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedsweep.worker
from fedsweep.errors import PartitionError, Preempted, UsageError
from fedsweep.fl.lanes import Trained
from fedsweep.fl.loop import LoopTrainer
from fedsweep.worker import cohort_run, gpu, run_single_experiment, spool, stopping, worker_loop
from fedsweep.worker import held as held_module
from fedsweep.worker.absence import Absence
from fedsweep.worker.task_log import log_name

TOKEN = "a-token"
SHORT = {"dataset": "digits", "model_type": "lr", "width_factor": 2, "depth": 0, "num_clients": 2, "global_rounds": 2}
LONG = SHORT | {"global_rounds": 100_000, "early_stopping_patience": None}
PROVENANCE = {"wall_time_s", "device", "plan", "worker", "fedsweep_version", "torch_version", "finished_at"}

Request = dict[str, Any]
FakeManager = Any  # see conftest.py


def science(result: Request) -> Request:
    return {name: value for name, value in result.items() if name not in PROVENANCE}


def until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def once_it_searches(caplog: pytest.LogCaptureFixture) -> Callable[[Callable[[], object]], None]:
    """Do something as soon as the worker has found that nobody answers; its client has tried several times by then."""

    def once_it_searches(action: Callable[[], object]) -> None:
        def wait_and_act() -> None:
            until(lambda: "trying again until one does" in caplog.text, "the worker's search for its manager")
            action()

        threading.Thread(target=wait_and_act).start()

    return once_it_searches


# ---- the four answers


def test_tasks_are_run_until_all_is_done(make_manager, work, state_dir):
    manager = make_manager({"task_id": "a_0_1", "seed": 1}, {"task_id": "a_0_2", "seed": 2, "attempt": 8})
    assert work(manager, worker_id="worker-1") == 0
    assert manager.types() == ["request_task", "submit_result"] * 2 + ["request_task", "leave"]
    assert [(each["task_id"], each["attempt"]) for each in manager.all("submit_result")] == [("a_0_1", 7), ("a_0_2", 8)]
    for task_id, seed in (("a_0_1", 1), ("a_0_2", 2)):
        result, history = run_single_experiment(SHORT, seed)
        assert science(manager.results[task_id]) == science(result) | {"history": history}
        assert manager.results[task_id]["worker"] == "worker-1"
    assert {request["worker_id"] for request in manager.requests} == {"worker-1"}
    assert manager.requests[0]["worker_type"] == manager.requests[0]["device"] == "cpu"
    assert list((state_dir / "spool").iterdir()) == []


def test_wait_is_not_the_end(make_manager, work):
    manager = make_manager()
    manager.waits = [0.05, 0.05]
    asked: list[int] = []

    def task_after_two_waits(message: Request) -> None:
        asked.append(1)
        if len(asked) == 3:
            manager.waiting.append({"task_id": "late_0_1"})

    manager.before = task_after_two_waits
    assert work(manager) == 0
    assert list(manager.results) == ["late_0_1"]


def test_unreachable_is_not_the_end(make_manager, work, once_it_searches):
    manager = make_manager({"task_id": "a_0_1"})
    manager.stop()
    once_it_searches(manager.start)
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1"]


def test_a_manager_that_goes_away_while_we_wait_is_waited_for(make_manager, work, once_it_searches):
    manager = make_manager()
    manager.waits = [0.2, 0.2]

    def back() -> None:
        manager.waiting.append({"task_id": "a_0_1"})
        manager.start()

    def away(message: Request) -> None:
        if len(manager.requests) == 1:
            threading.Timer(0.05, manager.stop).start()
            once_it_searches(back)

    manager.before = away
    assert work(manager, patience_s=0) == 0  # patience is for managers that have never answered
    assert list(manager.results) == ["a_0_1"]


def test_a_manager_that_never_answers_is_given_up_in_the_end(make_manager, work, caplog):
    nobody = make_manager()
    nobody.stop()
    assert work(nobody, patience_s=0.3) == 1
    assert f"no manager has ever answered at 127.0.0.1:{nobody.port}; giving up" in caplog.text


def test_a_manager_that_is_away_is_spoken_of_less_and_less_often(caplog):
    caplog.set_level("INFO")
    now = [0.0]
    absence = Absence(lambda: now[0])
    for _ in range(2):
        for now[0] in range(0, 7201, 5):
            absence.note("no manager answers at h:1 (away)", 3600.0)
        absence.end()
    pid = os.getpid()
    first, *more, back = caplog.messages[: len(caplog.messages) // 2]
    assert first == (
        "no manager answers at h:1 (away); trying again until one does, for 60 min at most "
        f"(to end this worker: Ctrl-C, or kill {pid})"
    )
    how_long = [re.fullmatch(r"no manager .*, for (.+) now; still trying \(to end .*\)", line)[1] for line in more]
    assert how_long[:9] == ["10 s", "30 s", "70 s", "2 min", "5 min", "10 min", "20 min", "30 min", "40 min"]
    assert len(how_long) == 16
    assert back == "the manager answers, after 2 h"
    assert caplog.messages[len(caplog.messages) // 2 :] == [first, *more, back]


def test_a_manager_that_does_not_take_leave_holds_up_nobody(make_manager, work):
    manager = make_manager()
    manager.refusals = {"leave": ["unknown_type"]}
    assert work(manager) == 0
    assert manager.types() == ["request_task", "leave"]


@pytest.mark.parametrize("code", ["retry_later", "internal", "too_many_connections"])
def test_a_manager_in_trouble_is_asked_again(make_manager, work, code):
    manager = make_manager({"task_id": "a_0_1"})
    manager.refusals = {"request_task": [code]}
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1"]


# ---- the token


def test_a_token_written_after_the_worker_started_is_found(make_manager, work, state_dir, once_it_searches):
    (state_dir / "token").unlink()
    manager = make_manager({"task_id": "a_0_1"})
    manager.stop()

    def begin() -> None:
        (state_dir / "token").write_text(TOKEN)
        manager.start()

    once_it_searches(begin)
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1"]


def test_a_new_token_is_read_when_the_old_one_is_refused(make_manager, work, state_dir):
    manager = make_manager({"task_id": "a_0_1"}, {"task_id": "a_0_2"})

    def change(message: Request) -> None:
        if message["type"] == "submit_result" and message["task_id"] == "a_0_1":
            manager.token = "another"
            (state_dir / "token").write_text("another")

    manager.before = change
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1", "a_0_2"]


@pytest.mark.parametrize(("content", "found"), [("wrong", "not that in"), ("", "there is none in")])
def test_a_wrong_token_ends_the_worker_with_what_to_do(make_manager, work, state_dir, content, found):
    (state_dir / "token").write_text(content)
    with pytest.raises(UsageError) as refused:
        work(make_manager())
    assert f"asks for its token, and {found} {state_dir}/token" in str(refused.value)
    assert "name it by --token-file" in str(refused.value)


@pytest.mark.parametrize("address", ["localhost", ":5000", "host:", "host:port", "host:99999", "host:0"])
def test_a_wrong_address_is_refused(address):
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        worker_loop(address, "cpu")


# ---- the spool


def test_a_result_is_in_the_spool_before_it_is_first_sent(make_manager, work, state_dir):
    manager = make_manager({"task_id": "a_0_1"})
    kept: list[list[spool.Undelivered]] = []

    def look(message: Request) -> None:
        if message["type"] == "submit_result":
            kept.append(spool.pending(state_dir / "spool"))

    manager.before = look
    assert work(manager) == 0
    assert [each.task_id for each in kept[0]] == ["a_0_1"]
    assert kept[0][0].result_data == manager.results["a_0_1"]


def test_a_lost_acknowledgement_is_no_loss(make_manager, work, state_dir):
    manager = make_manager({"task_id": "a_0_1"})
    manager.lost_acks = 1
    assert work(manager) == 0
    assert len(manager.all("submit_result")) == 2  # the second was told "duplicate"
    assert manager.all("task_failed") == []
    assert spool.pending(state_dir / "spool") == []


def test_a_manager_away_at_the_end_of_a_task_gets_the_result_later(make_manager, work, state_dir, once_it_searches):
    manager = make_manager({"task_id": "a_0_1"}, {"task_id": "a_0_2"})
    task_log = manager.output_dir / "logs" / "a_0_1.log"

    def go_away_for_a_while() -> None:
        until(task_log.exists, "the start of the task")
        manager.stop()
        until(lambda: spool.pending(state_dir / "spool"), "the result in the spool")
        once_it_searches(manager.start)

    watcher = threading.Thread(target=go_away_for_a_while)
    manager.waiting[0]["config"] = SHORT | {"global_rounds": 40, "early_stopping_patience": None}
    watcher.start()
    assert work(manager) == 0
    watcher.join()
    kinds = [kind for kind in manager.types() if kind != "heartbeat"]
    assert kinds == ["request_task", "submit_result", "request_task", "submit_result", "request_task", "leave"]
    assert list(manager.results) == ["a_0_1", "a_0_2"]
    assert spool.pending(state_dir / "spool") == []


def test_the_next_worker_delivers_what_another_computed(make_manager, work, state_dir):
    result, history = run_single_experiment(SHORT, 1)
    spool.put(state_dir / "spool", "left_0_1", 3, result | {"history": history})
    manager = make_manager({"task_id": "a_0_1"})
    assert work(manager, worker_id="next") == 0
    assert manager.types() == ["submit_result", "request_task", "submit_result", "request_task", "leave"]
    first = manager.requests[0]
    assert (first["task_id"], first["attempt"], first["worker_id"]) == ("left_0_1", 3, "next")
    assert first["result_data"] == result | {"history": history}
    assert spool.pending(state_dir / "spool") == []


def test_a_worker_that_waits_delivers_what_another_left(make_manager, work, state_dir):
    result, history = run_single_experiment(SHORT, 1)
    manager = make_manager()
    manager.waits = [0.1]

    def leave(message: Request) -> None:
        if len(manager.requests) == 1:
            spool.put(state_dir / "spool", "left_0_1", 3, result | {"history": history})

    manager.before = leave
    assert work(manager) == 0
    assert manager.types() == ["request_task", "submit_result", "request_task", "leave"]


def test_a_result_that_is_refused_for_good_is_set_aside_and_the_worker_goes_on(make_manager, work, state_dir, caplog):
    spool.put(state_dir / "spool", "left_0_1", 3, {"mean_test_acc": 0.5})
    manager = make_manager({"task_id": "a_0_1"}, {"task_id": "a_0_2"})
    manager.refusals = {"submit_result": ["unknown_task", "bad_field"]}
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_2"]
    assert [failure["task_id"] for failure in manager.all("task_failed")] == ["a_0_1"]
    assert len([path for path in (state_dir / "spool").iterdir() if not path.name.endswith(spool.SUFFIX)]) == 2
    assert "is set aside: as the test wants it" in caplog.text


def test_without_a_spool_the_result_is_sent_until_it_arrives(make_manager, work, state_dir, monkeypatch, caplog):
    monkeypatch.setattr(held_module, "AWAY_PAUSE_S", 0.01)

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool, "put", disk_full)
    manager = make_manager({"task_id": "a_0_1"})
    manager.refusals = {"submit_result": ["retry_later", "retry_later"]}
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1"]
    assert "No space left on device" in caplog.text


# ---- failures


def test_a_task_that_cannot_be_run_fails_with_its_reason_and_the_next_one_runs(make_manager, work):
    impossible = SHORT | {"num_clients": 1000}
    manager = make_manager({"task_id": "bad_0_1", "config": impossible}, {"task_id": "a_0_1"})
    assert work(manager) == 0
    (failure,) = manager.all("task_failed")
    assert (failure["task_id"], failure["attempt"]) == ("bad_0_1", 7)
    with pytest.raises(PartitionError) as raised:
        run_single_experiment(impossible, 1)
    assert failure["error"] == str(raised.value)
    assert list(manager.results) == ["a_0_1"]


OUT_OF_MEMORY = torch.OutOfMemoryError("Tried to allocate 2 GiB")
REASONS = [
    (
        RuntimeError("mat1 and mat2 do not fit"),
        "Traceback (most recent call last):",
        "RuntimeError: mat1 and mat2 do not fit",
    ),
    (OUT_OF_MEMORY, "CUDA out of memory: the experiment does not fit on this GPU. ", "Tried to allocate 2 GiB"),
]


@pytest.mark.parametrize(("error", "first", "last"), REASONS)
def test_what_the_code_raises_is_the_reason(make_manager, work, monkeypatch, error, first, last):
    class Failing(LoopTrainer):
        def train(self, *_: object) -> Trained:
            raise error

    monkeypatch.setattr(cohort_run, "choose_trainer", lambda experiments, data, *_, **__: Failing(experiments[0], data))
    manager = make_manager({"task_id": "bad_0_1"})
    assert work(manager) == 0
    (failure,) = manager.all("task_failed")
    assert failure["error"].startswith(first)
    assert failure["error"].endswith(last)
    log_text = (manager.output_dir / "logs" / "bad_0_1.log").read_text()
    assert "Traceback" in log_text
    assert str(error) in log_text


def test_weights_that_are_not_finite_are_a_result_without_metrics(make_manager, work):
    manager = make_manager({"task_id": "nan_0_1", "config": SHORT | {"lr": 1e30, "max_grad_norm": None}})
    assert work(manager) == 0
    assert manager.all("task_failed") == []
    result = manager.results["nan_0_1"]
    assert result["outcome"] == "diverged"
    metrics = [name for name in result if name.startswith(("mean_", "std_"))]
    assert len(metrics) == 8
    assert {result[name] for name in [*metrics, "best_epoch", "attack_success_rate", "per_class_test_acc"]} == {None}
    assert result["history"] == [{"round": 1, "val_loss": None, "val_acc": None, "nonfinite_clients": 2}]


# ---- heartbeats


def test_heartbeats_tell_rounds_and_metrics_and_a_dropped_task_is_left(make_manager, work):
    manager = make_manager({"task_id": "long_0_1", "config": LONG, "heartbeat_s": 0.05}, {"task_id": "a_0_1"})

    def drop_after_some_rounds(message: Request) -> None:
        if message["type"] == "heartbeat" and message["tasks"][0].get("round", 0) >= 3:
            manager.drop = ["long_0_1"]

    manager.before = drop_after_some_rounds
    assert work(manager, worker_id="w") == 0
    beats = [beat["tasks"][0] for beat in manager.all("heartbeat")]
    rounds = [beat["round"] for beat in beats if "round" in beat]
    assert rounds == sorted(rounds)
    assert rounds[-1] >= 3
    last = beats[-1]
    assert last["task_id"], last["attempt"] == ("long_0_1", 7)
    assert last["rounds"] == 100_000
    assert 0 <= last["val_acc"] <= 1
    assert last["val_loss"] > 0
    assert {beat["worker_id"] for beat in manager.all("heartbeat")} == {"w"}
    assert list(manager.results) == ["a_0_1"]
    assert manager.all("task_failed") == manager.all("release") == []
    assert "left: The manager no longer wants" in (manager.output_dir / "logs" / "long_0_1.log").read_text()


def test_a_manager_away_or_old_does_not_disturb_the_task(make_manager, work):
    task = {"task_id": "a_0_1", "config": SHORT | {"global_rounds": 30}, "heartbeat_s": 0.02}
    manager = make_manager(task)
    manager.refusals = {"heartbeat": ["internal", "unknown_type"]}
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1"]
    assert len(manager.all("heartbeat")) == 2  # an old manager is not told a third time


# ---- the experiment's own log


def test_the_log_of_an_experiment_tells_its_story_and_a_second_attempt_appends(make_manager, work):
    bad = {"task_id": "a_0_1", "config": SHORT | {"num_clients": 1000}, "attempt": 59}
    manager = make_manager(bad, {"task_id": "a_0_1", "attempt": 71, "retry_count": 1})
    assert work(manager, worker_id="w") == 0
    text = (manager.output_dir / "logs" / "a_0_1.log").read_text()
    lines = [line[24:] for line in text.splitlines() if line.startswith("20")]
    assert [line.split(":")[0] for line in lines] == ["start", "failed", "start", "round 1/2", "round 2/2", "result"]
    assert lines[0].startswith("start: try 1 by w on cpu: {")
    assert lines[2].startswith("start: try 2 by w on cpu: {")
    assert json.loads(lines[2].split(": ", 2)[2]) == SHORT | {"seed": 1}
    _, history = run_single_experiment(SHORT, 1)
    assert lines[3] == f"round 1/2: validation loss {history[0]['val_loss']}, accuracy {history[0]['val_acc']}"
    assert lines[5].startswith(f"result: ok, test accuracy {manager.results['a_0_1']['mean_test_acc']}, ")
    assert "Traceback" in text
    assert "PartitionError" in text


def test_a_cause_is_told_in_full_once_and_reported_in_full_each_time(make_manager, work, caplog):
    caplog.set_level("INFO")
    too_many = [{"task_id": f"a_{number}_1", "config": SHORT | {"num_clients": 900 + number}} for number in range(2)]
    again = too_many[0] | {"retry_count": 1}
    other = {"task_id": "b_0_1", "config": SHORT | {"validation_split": 0.0001}}
    manager = make_manager(*too_many, again, other)
    assert work(manager) == 0
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said[0].startswith("a_0_1 failed: 1293 training samples are not enough")
    assert said[1] == "a_1_1 failed: the same PartitionError as a_0_1"
    assert said[2] == "a_0_1 failed (try 2): the same PartitionError as before"
    assert said[3].startswith("b_0_1 failed: validation_split=0.0001 of 1437 samples")
    assert sum("trains alone" in message for message in caplog.messages) == 3  # nothing of the second try
    reported = [request["error"] for request in manager.all("task_failed")]
    assert [re.search(r"num_clients=(\d+)", error)[1] for error in reported[:3]] == ["900", "901", "900"]


def test_a_log_that_cannot_be_written_costs_no_result(make_manager, work, caplog):
    manager = make_manager({"task_id": "a_0_1"})
    manager.output_dir.write_text("a file where the folder should be")
    assert work(manager) == 0
    assert list(manager.results) == ["a_0_1"]
    assert "a_0_1 has no log: " in caplog.text


@pytest.mark.parametrize(
    ("task_id", "name"),
    [
        ("attack_3_42", r"attack_3_42\.log"),
        ("größe 1_3_42", r"größe 1_3_42\.log"),
        ("../../etc_3_42", r"\.\._\.\._etc_3_42-[0-9a-f]{8}\.log"),
        ("a\0b\n_3_42", r"a_b__3_42-[0-9a-f]{8}\.log"),
        ("x" * 300, r"x{200}-[0-9a-f]{8}\.log"),
    ],
)
def test_a_log_name_stays_in_its_folder(task_id, name):
    assert re.fullmatch(name, log_name(task_id))
    assert log_name(f"{task_id}/") != log_name(task_id)


# ---- stop signals, in processes of their own

# A worker that holds a GPU (a fake one; it trains on the CPU all the same).
WORKER = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from fedsweep.worker import device
from fedsweep.worker.worker import leave_process, worker_loop
device._only_visible = lambda gpu_id: device.Device("cpu", gpu_id)
leave_process(worker_loop(sys.argv[1], sys.argv[2], state_dir=sys.argv[3], lock_dir=sys.argv[4]))
"""


class WorkerProcess(subprocess.Popen[bytes]):
    """A worker in a process of its own; `log` is what it says."""

    def __init__(self, manager: FakeManager, device: str, state_dir: Path) -> None:
        folder = state_dir.parent
        self.log = folder / f"worker-{manager.port}.log"
        arguments = [f"127.0.0.1:{manager.port}", device, str(state_dir), str(folder / "locks")]
        with self.log.open("wb") as log:
            super().__init__([sys.executable, "-c", WORKER, *arguments], stderr=log)


@pytest.fixture
def start_worker(state_dir: Path, fake_nvml: None) -> Iterator[Callable[..., WorkerProcess]]:
    started: list[WorkerProcess] = []

    def start(manager: FakeManager, device: str = "cpu") -> WorkerProcess:
        started.append(WorkerProcess(manager, device, state_dir))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


# One round of this takes minutes: the signal must be heard in the middle of it.
ONE_LONG_ROUND = SHORT | {"model_type": "cnn", "width_factor": 64, "depth": 8, "local_epochs": 1000, "global_rounds": 1}


def test_sigterm_in_a_round_gives_the_task_and_the_gpu_back_and_ends_in_order(make_manager, start_worker, tmp_path):
    manager = make_manager(
        {"task_id": "long_0_1", "config": ONE_LONG_ROUND, "heartbeat_s": 0.2}, {"task_id": "never_0_1"}
    )
    worker = start_worker(manager, "cuda:0")
    until(lambda: len(manager.all("heartbeat")) >= 2, "two heartbeats")
    lock = tmp_path / "locks" / "gpu_0.lock"
    assert lock.read_text() == str(worker.pid)
    assert manager.all("request_task")[0]["gpu_id"] == 0

    worker.terminate()
    assert worker.wait(timeout=5) == 0
    (release,) = manager.all("release")
    assert (release["task_id"], release["attempt"]) == ("long_0_1", 7)
    assert len(manager.all("request_task")) == 1
    assert manager.all("task_failed") == manager.all("submit_result") == []
    assert lock.read_text() == ""
    assert "left: the worker was asked to stop" in (manager.output_dir / "logs" / "long_0_1.log").read_text()


def test_a_second_signal_ends_a_worker_at_once_and_leaves_no_lock(make_manager, start_worker, tmp_path):
    manager = make_manager({"task_id": "long_0_1", "config": LONG, "heartbeat_s": 0.2})
    manager.before = lambda message: time.sleep(60 if message["type"] == "release" else 0)
    worker = start_worker(manager, "cuda:0")
    until(lambda: manager.all("heartbeat"), "a heartbeat")
    worker.terminate()
    until(lambda: manager.all("release"), "the release")
    worker.terminate()
    assert worker.wait(timeout=5) == 128 + signal.SIGTERM
    gpu.claim_gpu(gpu.Gpu(0, "GPU-0", 8 * 2**30), tmp_path / "locks")
    gpu.release_gpu_lock(0)


def send_when(manager: FakeManager, kind: str, number: int = signal.SIGTERM, then_s: float = 0.0) -> None:
    """Send this process one signal when the manager hears a request of that type; it answers so much later."""

    def send(message: Request) -> None:
        if message["type"] == kind and len(manager.all(kind)) == 1:
            os.kill(os.getpid(), number)
            time.sleep(then_s)

    manager.before = send


def test_sigint_ends_the_worker_as_sigterm_does(make_manager, work):
    manager = make_manager({"task_id": "long_0_1", "config": LONG, "heartbeat_s": 0.05})
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    send_when(manager, "heartbeat", signal.SIGINT)
    assert work(manager) == 0
    assert [kind for kind in manager.types() if kind != "heartbeat"] == ["request_task", "release"]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_task_that_arrives_with_the_signal_is_given_back(make_manager, work):
    manager = make_manager({"task_id": "a_0_1"})
    send_when(manager, "request_task", then_s=0.2)
    assert work(manager) == 0
    assert manager.types() == ["request_task", "release"]


def test_a_result_that_is_being_delivered_when_the_signal_comes_is_delivered(make_manager, work):
    manager = make_manager({"task_id": "a_0_1"}, {"task_id": "a_0_2"})
    send_when(manager, "submit_result", then_s=0.2)
    assert work(manager) == 0
    assert manager.types() == ["request_task", "submit_result"]


def test_a_signal_ends_a_worker_that_was_told_to_wait(make_manager, work):
    manager = make_manager()
    manager.waits = [60.0]
    send_when(manager, "request_task")
    assert work(manager) == 0
    assert manager.types() == ["request_task"]


def test_a_signal_ends_a_worker_whose_manager_is_silent(make_manager, work, monkeypatch):
    """It waits for the answer as long as the grace lasts, and no longer."""
    monkeypatch.setattr(stopping, "GRACE_S", 0.1)
    manager = make_manager()
    answered: list[Request] = []

    def answer_late(message: Request) -> None:
        assert len(manager.requests) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        answered.append(message)

    manager.before = answer_late
    assert work(manager) == 0
    assert manager.types() == ["request_task"]
    assert answered == []


def test_a_signal_ends_a_worker_whose_manager_is_away(make_manager, work, once_it_searches):
    manager = make_manager()
    manager.stop()
    once_it_searches(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert work(manager) == 0
    assert manager.requests == []


def test_a_stop_signal_that_python_swallows_is_sent_again(monkeypatch):
    """What is raised in a destructor is dropped by the interpreter."""
    monkeypatch.setattr(stopping, "GRACE_S", 0.05)
    stop = stopping.StopSignals()
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    class Swallower:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted), stop, stop.interruptible():
        Swallower()
        assert unraisable, "it was not swallowed"
        time.sleep(30)


# ---- what is loaded


def test_importing_the_package_does_not_load_torch_and_every_name_is_there():
    code = """
import sys, fedsweep.worker
assert not {"torch", "numpy", "pandas"} & set(sys.modules), "import fedsweep.worker"
fedsweep.worker.get_available_gpu, fedsweep.worker.request_task_from_manager, fedsweep.worker.submit_result_to_manager
assert not {"torch", "numpy", "pandas"} & set(sys.modules), "the client and the locks"
for name in fedsweep.worker.__all__:
    getattr(fedsweep.worker, name)
assert "pandas" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute nothing"):
        _ = fedsweep.worker.nothing
