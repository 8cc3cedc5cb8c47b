"""A manager as it runs: over TCP, to its end, stopped by signals, killed, and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedsweep.errors import UsageError
from fedsweep.manager import ExperimentManager

RUN = """\
import logging, sys
from fedsweep.manager import ExperimentManager
logging.basicConfig(level=logging.INFO)
sys.exit(ExperimentManager(["sweep.yaml"], port=0, heartbeat_s=0.2, grace_s=20.0).start())
"""


class Client:
    """A worker, over a socket; finds the manager of the current folder by itself."""

    def __init__(self, name: str = "w") -> None:
        self.name = name
        self.stream = None

    def connect(self, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.stream is None:
            try:
                address = json.loads(Path(".fedsweep/manager.json").read_text())
                self.token = Path(".fedsweep/token").read_text().strip()
                with socket.create_connection((address["host"], address["port"]), timeout=20) as connection:
                    self.stream = connection.makefile("rwb")
            except OSError:
                assert time.monotonic() < deadline, "no manager listens"
                time.sleep(0.02)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def ask(self, kind: str, **fields):
        self.connect()
        self.stream.write(json.dumps({"type": kind, "token": self.token, **fields}).encode() + b"\n")
        self.stream.flush()
        return json.loads(self.stream.readline())

    def request(self):
        return self.ask("request_task", worker_id=self.name)

    def submit(self, task, result):
        fields = {"task_id": task["task_id"], "worker_id": self.name, "attempt": task["attempt"]}
        return self.ask("submit_result", result_data=result, **fields)


@pytest.fixture
def client():
    client = Client()
    yield client
    client.close()


@pytest.fixture
def start(folder, two_phases):
    """Start the manager of this folder as a process; whatever runs at the end is killed."""
    (folder / "sweep.yaml").write_text(two_phases)
    running = []

    def begin() -> subprocess.Popen:
        (folder / ".fedsweep/manager.json").unlink(missing_ok=True)
        running.append(subprocess.Popen([sys.executable, "-c", RUN], cwd=folder, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def work(client: Client, make_result, count: int = 1000) -> int:
    """Work until told that all is done, or `count` tasks are; how many were."""
    for done in range(count):
        while (answer := client.request())["type"] == "no_task":
            if answer["done"]:
                return done
            time.sleep(0.05)
        assert client.submit(answer["task"], make_result(answer["task"]))["status"] == "accepted"
    return count


@pytest.fixture
def serve(folder, two_phases):
    """Run a manager in a thread; its exit status lies in `codes` at the end."""
    (folder / "sweep.yaml").write_text(two_phases)
    managers, threads, codes = [], [], []

    def begin(**options) -> ExperimentManager:
        (folder / ".fedsweep/manager.json").unlink(missing_ok=True)
        manager = ExperimentManager(["sweep.yaml"], port=0, **{"heartbeat_s": 0.2, "refresh_s": 0.05, **options})
        managers.append(manager)
        threads.append(threading.Thread(target=lambda: codes.append(manager.start())))
        threads[-1].start()
        return manager

    begin.codes, begin.join = codes, lambda: [thread.join(20) for thread in threads]
    yield begin
    for manager, thread in zip(managers, threads, strict=True):
        while thread.is_alive():
            manager.stop()
            thread.join(0.5)
        manager.close()


# ---- processes


def test_sigterm_hands_out_nothing_more_and_takes_what_is_running(start, client, make_result, check_sound):
    process = start()
    work(client, make_result, 2)
    task = client.request()["task"]
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while (answer := client.request())["type"] == "task":
        client.ask("release", task_id=answer["task"]["task_id"], worker_id="w", attempt=answer["task"]["attempt"])
        assert time.monotonic() < deadline
    assert answer == {"type": "no_task", "done": False, "retry_after": 0.2}
    assert client.submit(task, make_result(task))["status"] == "accepted"
    assert process.wait(20) == 0
    assert sorted(os.listdir(".fedsweep")) == ["last_status.json", "ledger.sqlite3", "manager.lock", "token"]
    check_sound(".fedsweep/ledger.sqlite3")


def test_a_stopped_manager_with_nothing_running_ends_at_once(start, client):
    process = start()
    client.request()
    client.ask("release", task_id="first_0_1", worker_id="w")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_second_signal_ends_it_now(start, client):
    process = start()
    client.request()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None  # it waits for the task
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_a_killed_manager_goes_on_where_it_was(start, serve, client, make_result, check_sound):
    acknowledged = {}
    held = None
    for _ in range(2):
        process = start()
        for task in filter(None, (held, client.request()["task"], client.request()["task"])):
            result = make_result(task)
            assert client.submit(task, result)["status"] == "accepted"  # also if one before handed it out
            acknowledged[task["signature"]] = result
        held = client.request()["task"]
        process.kill()
        process.wait()
        client.close()
    serve()
    assert client.ask("status")["status"]["complete"] == len(acknowledged) == 5
    client.submit(held, make_result(held))
    work(client, make_result)
    serve.join()
    assert serve.codes == [0]
    check_sound(".fedsweep/ledger.sqlite3", acknowledged)


def test_workers_of_a_manager_that_was_killed_at_the_end_still_hear_that_all_is_done(start, serve, client, make_result):
    process = start()
    for _ in range(8):
        task = client.request()["task"]
        client.submit(task, make_result(task))
    process.kill()
    process.wait()
    client.close()
    serve()
    assert client.request()["done"]
    serve.join()
    assert serve.codes == [0]


# ---- in this process


def test_a_sweep_runs_to_its_end(serve, client, make_result, check_sound, caplog):
    serve()
    assert work(client, make_result) == 8
    serve.join()
    assert client.stream.readline() == b""  # the connection was ended in order, though this client left it open
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    check_sound(".fedsweep/ledger.sqlite3")
    assert sorted(os.listdir("out/first")) == ["final_results.csv", "history.parquet", "summary.csv"]
    assert not Path(".fedsweep/manager.json").exists()
    serve()  # and ends at once where nothing is left
    serve.join()
    assert serve.codes == [0, 0]


def test_failed_experiments_end_it_with_status_1(serve, client, make_result):
    serve()
    failing = client.request()["task"]["task_id"]
    fields = {"worker_id": "w", "error": "ValueError: no"}
    client.ask("task_failed", task_id=failing, **fields)
    while (answer := client.request())["type"] == "task":
        task = answer["task"]
        if task["task_id"] == failing:
            client.ask("task_failed", task_id=failing, attempt=task["attempt"], **fields)
        else:
            client.submit(task, make_result(task))
    assert answer["done"]
    serve.join()
    assert serve.codes == [1]


def test_rows_that_appear_while_it_runs_are_adopted_by_the_refresher(serve, client, make_result):
    serve()
    work(client, make_result, 1)
    path = Path("out/first/final_results.csv")
    header, row = path.read_text().splitlines()[:2]
    wanted = tasks_of(client)["first_3_1"]
    fields = dict(zip(header.split(","), row.split(","), strict=True)) | {
        **{"signature": wanted["signature"], "poison_ratio": "0.5", "poison_type": "random_noise", "seed": "1"}
    }
    with path.open("a") as stream:
        stream.write(",".join(fields.values()) + "\n")
    deadline = time.monotonic() + 10
    while client.ask("status")["status"]["complete"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tasks_of(client: Client):
    """Tasks by id, handed out and given back."""
    held = client.ask("request_task", worker_id="w", max_tasks=100)["tasks"]
    for task in held:
        client.ask("release", task_id=task["task_id"], worker_id="w", attempt=task["attempt"])
    return {task["task_id"]: task for task in held}


def test_a_manager_that_stays_serves_on(serve, client, make_result):
    manager = serve(stay=True)
    assert work(client, make_result) == 8
    time.sleep(0.5)
    assert client.ask("status")["status"]["done"]
    assert manager.running
    manager.stop()
    serve.join()
    assert serve.codes == [0]


def test_it_does_not_end_while_a_file_lags(serve, client, make_result, check_sound):
    Path("out").mkdir()
    Path("out/first").write_text("in the way")
    manager = serve()
    work(client, make_result)
    time.sleep(0.5)
    assert manager.running
    assert client.ask("status")["status"]["lagging"] == ["out/first"]
    Path("out/first").unlink()
    serve.join()
    assert serve.codes == [0]
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_a_dead_worker_is_noticed_without_a_request(serve, client):
    manager = serve(lease_s=0.3)
    client.request()
    deadline = time.monotonic() + 10
    while manager.assigned_tasks:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_tokens_are_required_and_old_clients_are_let_in_on_demand(serve, folder):
    manager = serve(allow_legacy=True)
    client = Client()
    client.connect()
    client.close()
    with socket.create_connection((manager.host, manager.port), timeout=10) as old:
        old.sendall(json.dumps({"type": "request_task", "worker_id": "old"}).encode())
        task = json.loads(old.recv(8192))["task"]
    assert manager.assigned_tasks[task["task_id"]]["assigned_to"] == "old"
    assert manager.sweep.ledger._lease_ends.popitem()[1] > time.monotonic() + 5 * 3600


def test_a_taken_port_is_refused(folder, two_phases):
    (folder / "sweep.yaml").write_text(two_phases)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="cannot listen on"):
            ExperimentManager(["sweep.yaml"], port=taken.getsockname()[1]).start()
    assert not Path(".fedsweep/manager.json").exists()
