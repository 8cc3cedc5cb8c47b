"""Clients and managers of the first scripts, written from their description with raw sockets only.

Such a client opens a connection, sends one JSON object without a newline and without closing its side, reads the
answer with a single `recv` (8,192 bytes; 1,024 for an acknowledgement) and closes. Such a manager reads until the
object is complete, answers without a newline, and closes. `tests/golden` has what they say, word for word.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedsweep.errors import ProtocolError
from fedsweep.manager.protocol import Request, RequestTask, Status, SubmitResult, TaskComplete, TaskFailed
from fedsweep.manager.server import fitted, listen, serve_connection
from fedsweep.worker.client import (
    ManagerClient,
    notify_task_complete,
    notify_task_failed,
    request_task_from_manager,
    submit_result_to_manager,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TASK_FIELDS = [
    "task_id",
    "phase",
    "config",
    "seed",
    "output_dir",
    "output_dirs",
    "status",
    "assigned_to",
    "assigned_at",
    "retry_count",
    "last_error",
]


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, as they stood on the wire, and how much of the answer the client reads."""

    what: str
    reads: int
    request: str
    answer: str


TRANSCRIPTS = {path.stem: Exchange(**json.loads(path.read_text("utf-8"))) for path in sorted(GOLDEN.glob("*.json"))}
TASK = json.loads(TRANSCRIPTS["request_task_task"].answer)["task"]
RESULT = json.loads(TRANSCRIPTS["submit_result_ack"].request)["result_data"]


# ---- the old side


def exchange(port: int, request: str, reads: int, cut: int | None = None) -> str:
    """What an old client does, with its request cut at a byte; the text that it read."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(10)
        connection.connect(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = request.encode()
        if cut:
            connection.send(data[:cut])
            time.sleep(0.0005)
        connection.send(data[cut:])
        return connection.recv(reads).decode()
    finally:
        connection.close()


class OldWorker:
    """The worker of the first scripts; `results` is what it computes for a task, and None makes the task fail."""

    def __init__(self, port: int, results: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        self.port = port
        self.results = results

    def ask(self, message: dict[str, Any], reads: int) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(exchange(self.port, json.dumps(message), reads))
        return answer

    def loop(self) -> list[str]:
        """Work until there is no task; the tasks that were done."""
        done = []
        while True:
            answer = self.ask(
                {"type": "request_task", "worker_id": "old", "gpu_id": None, "worker_type": "cpu"}, reads=8192
            )
            if answer["type"] != "task":
                return done
            who = {"task_id": answer["task"]["task_id"], "worker_id": "old"}
            result = self.results(answer["task"])
            if result is None:
                assert self.ask({"type": "task_failed", **who, "error": "out of memory"}, reads=1024)["type"] == "ack"
                continue
            brought = self.ask({"type": "submit_result", **who, "result_data": result}, reads=1024)
            assert brought["status"] == "accepted"
            assert self.ask({"type": "task_complete", **who}, reads=1024)["type"] == "ack"
            done.append(who["task_id"])


@contextmanager
def old_manager(*exchanges: Exchange, reads: int = 4096) -> Iterator[tuple[int, list[str]]]:
    """A manager of the first scripts that knows these answers; its port, and the requests as it read them."""
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[str] = []

    def serve() -> None:
        for one in exchanges:
            connection, _ = listener.accept()
            with connection:
                requests.append(read_object(connection, reads))
                connection.sendall(one.answer.encode())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], requests
        thread.join(timeout=10)
        assert not thread.is_alive(), "fewer requests came than were expected"
    finally:
        listener.close()


def read_object(connection: socket.socket, reads: int) -> str:
    data = b""
    while True:
        data += connection.recv(reads)
        try:
            json.loads(data)
        except ValueError:
            continue
        return data.decode()


# ---- our side


class Sweep:
    """An answer function over tasks in memory, with everything that new clients are told besides."""

    def __init__(self, *tasks: Mapping[str, Any]) -> None:
        self.waiting = [dict(task) for task in tasks]
        self.failed: list[str] = []
        self.results: dict[str, float | None] = {}

    def answer(self, request: Request, legacy: bool) -> dict[str, Any]:
        assert legacy
        match request:
            case RequestTask() if self.waiting:
                more = {"attempt": 17, "lease_s": 120.0, "heartbeat_s": 10.0, "signature": "mnist|cnn|4|2|0.3|…"}
                return {"type": "task", "task": {**self.waiting.pop(0), **more}, "tasks": []}
            case RequestTask():
                return {"type": "no_task", "done": True, "retry_after": 1.0}
            case SubmitResult():
                self.results[request.task_id] = request.result_data.mean_test_acc
                return {"type": "ack", "status": "accepted", "note": "x" * 5000}
            case TaskComplete() if request.task_id not in self.results:
                raise ProtocolError("no_result", f"{request.task_id} has no result")
            case TaskFailed():
                self.failed.append(request.task_id)
                return {"type": "ack", "drop": []}
            case Status():
                counts = json.loads(TRANSCRIPTS["status_status"].answer)["status"]
                workers = [{"worker_id": f"worker {number}", "label": "x" * 50} for number in range(1000)]
                return {"type": "status", "status": {**counts, "diverged": 0, "eta_s": None, "workers": workers}}
        return {"type": "ack"}


@contextmanager
def serving(answer: Callable[[Request, bool], Mapping[str, Any]], *, allow_legacy: bool = True) -> Iterator[int]:
    """Our server with this answer function, on loopback; its port."""
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve_connection(reader, writer, answer, token="a token", allow_legacy=allow_legacy)

    async def serve() -> None:
        server = await listen("127.0.0.1", 0, handle)
        stop = asyncio.Event()
        started.set_result((server.sockets[0].getsockname()[1], asyncio.get_running_loop(), stop))
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    port, loop, stop = started.result(timeout=10)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)


# ---- an old client and our manager


def test_the_transcripts_are_of_the_old_form() -> None:
    assert sorted(TRANSCRIPTS) == [
        "request_task_no_task",
        "request_task_task",
        "status_status",
        "submit_result_ack",
        "task_complete_ack",
        "task_failed_ack",
    ]
    for name, one in TRANSCRIPTS.items():
        assert "\n" not in one.request + one.answer
        assert "token" not in one.request
        assert "attempt" not in one.request
        assert one.reads == (1024 if name.endswith("_ack") else 8192)
        assert len(one.answer) <= one.reads
    assert list(TASK) == TASK_FIELDS


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_our_manager_gives_the_old_answer_however_the_request_is_cut(name: str) -> None:
    one = TRANSCRIPTS[name]
    expected = json.loads(one.answer)
    cuts = [None, *range(1, len(one.request))]
    sweep = Sweep(*[TASK] * len(cuts) if name == "request_task_task" else [])
    sweep.results = {TASK["task_id"]: 0.5} if name == "task_complete_ack" else {}
    with serving(sweep.answer) as port:
        for cut in cuts:
            answer = json.loads(exchange(port, one.request, one.reads, cut))
            if name == "request_task_no_task":  # `done` and `retry_after` are new, and mean nothing to an old client
                answer = {"type": answer["type"]}
            assert answer == expected, f"cut at byte {cut}"


def test_an_old_worker_does_a_whole_sweep() -> None:
    long_task = {
        "output_dirs": [f"./results_exp{number}_of_a_long_study" for number in range(200)],
        "last_error": "Traceback (most recent call last): " + "x" * 100_000,
    }
    tasks = [{**TASK, "task_id": f"exp1_{number}_42", **(long_task if number % 2 else {})} for number in range(6)]
    sweep = Sweep(*tasks)
    with serving(sweep.answer) as port:
        worker = OldWorker(port, lambda task: None if task["task_id"] == "exp1_2_42" else RESULT)
        done = worker.loop()
    assert done == [f"exp1_{number}_42" for number in (0, 1, 3, 4, 5)]
    assert sweep.results == dict.fromkeys(done, 0.9127)
    assert sweep.failed == ["exp1_2_42"]


def test_old_clients_at_the_same_time() -> None:
    sweep = Sweep(*[{**TASK, "task_id": f"exp1_{number}_42"} for number in range(40)])
    with serving(sweep.answer) as port:
        threads = [threading.Thread(target=OldWorker(port, lambda task: RESULT).loop) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
    assert len(sweep.results) == 40


def test_an_old_client_is_told_of_an_error_in_its_single_read() -> None:
    with serving(Sweep().answer) as port:
        assert json.loads(exchange(port, TRANSCRIPTS["task_complete_ack"].request, 1024))["code"] == "no_result"
        bad = json.dumps({"type": "request_task", "worker_id": "w" * 100_000})
        assert json.loads(exchange(port, bad, 1024))["code"] == "bad_field"
        hung_up = '{"type":"submit_result","result_data":{"mean_test_loss":NaN}}'
        assert json.loads(exchange(port, hung_up, 1024))["code"] == "bad_json"


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_old_clients_are_refused_unless_they_were_allowed(name: str) -> None:
    one = TRANSCRIPTS[name]
    with serving(Sweep(TASK).answer, allow_legacy=False) as port:
        assert json.loads(exchange(port, one.request, one.reads))["code"] == "unauthorized"


# ---- what fits into a single read


@pytest.mark.parametrize("count", [0, 1, 50, 200, 5000])
@pytest.mark.parametrize("length", [0, 500, 8000, 100_000])
def test_a_task_fits_with_every_field_that_old_clients_know(count: int, length: int) -> None:
    task = {**TASK, "output_dirs": [f"./results_{number:04}_é" for number in range(count)], "last_error": "e" * length}
    raw = fitted({"type": "task", "task": {**task, "attempt": 3, "lease_s": 1.0}, "tasks": [task] * 50})
    assert len(raw) <= 8192
    answer = json.loads(raw)
    assert list(answer) == ["type", "task"]
    assert list(answer["task"]) == TASK_FIELDS
    kept = answer["task"]
    assert {name: kept[name] for name in TASK_FIELDS if name not in ("output_dirs", "last_error")} == {
        name: task[name] for name in TASK_FIELDS if name not in ("output_dirs", "last_error")
    }
    if count <= 50 and length <= 500:
        assert kept == task
    else:
        assert kept["output_dirs"] in (task["output_dirs"], [task["output_dir"]])


def test_a_status_fits_however_many_workers_there_are() -> None:
    raw = fitted(Sweep().answer(Status(type="status"), True))
    assert json.loads(raw) == json.loads(TRANSCRIPTS["status_status"].answer)


def test_a_task_that_cannot_fit_is_an_error_that_does() -> None:
    raw = fitted({"type": "task", "task": {**TASK, "config": {"dataset": "parquet:" + "x" * 9000}}})
    assert len(raw) <= 1024
    assert json.loads(raw)["code"] == "too_large"


# ---- an old manager


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_the_old_client_and_the_old_manager_of_these_tests_understand_each_other(name: str) -> None:
    one = TRANSCRIPTS[name]
    with old_manager(one) as (port, requests):
        assert exchange(port, one.request, one.reads) == one.answer
    assert requests == [one.request]


@pytest.fixture
def make_client() -> Iterator[Callable[[int], ManagerClient]]:
    """Our client, as it talks to a manager that knows no token."""
    clients = []

    def make(port: int) -> ManagerClient:
        clients.append(ManagerClient("127.0.0.1", port, token=None, timeout=5, retries=0))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def send_with_ours(name: str, client: ManagerClient) -> object:
    """Say with our client what the transcript says; what it understood."""
    who = (client, "exp1_vary_width_7_42", "worker_gpu0_4711")
    match name:
        case "request_task_task" | "request_task_no_task":
            return request_task_from_manager(client, who[2], gpu_id=0, worker_type="gpu").kind
        case "submit_result_ack":
            return submit_result_to_manager(*who, RESULT)
        case "task_complete_ack":
            return notify_task_complete(*who)
        case "task_failed_ack":
            return notify_task_failed(*who, "CUDA out of memory")
    return client.ask({"type": "status"})


UNDERSTOOD = {
    "request_task_task": "task",
    "request_task_no_task": "done",
    "status_status": json.loads(TRANSCRIPTS["status_status"].answer),
    "submit_result_ack": True,
    "task_complete_ack": True,
    "task_failed_ack": True,
}


@pytest.mark.parametrize("reads", [1, 4096])  # one byte at a time, our newline is left unread when it closes
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_our_client_says_the_old_request_and_understands_the_old_answer(
    name: str, reads: int, make_client: Callable[[int], ManagerClient]
) -> None:
    one = TRANSCRIPTS[name]
    with old_manager(one, reads=reads) as (port, requests):
        assert send_with_ours(name, make_client(port)) == UNDERSTOOD[name]
    assert json.loads(requests[0]) == json.loads(one.request)


def test_our_client_gets_the_whole_task_of_an_old_manager(make_client: Callable[[int], ManagerClient]) -> None:
    with old_manager(TRANSCRIPTS["request_task_task"]) as (port, _):
        task = request_task_from_manager(make_client(port), "worker_gpu0_4711", 0, "gpu").task
    assert task is not None
    assert {name: getattr(task, name) for name in ("task_id", "phase", "config", "seed")} == {
        name: TASK[name] for name in ("task_id", "phase", "config", "seed")
    }
    assert task.output_dirs == tuple(TASK["output_dirs"])
    assert task.attempt is None


def test_one_client_talks_to_an_old_manager_again_and_again(make_client: Callable[[int], ManagerClient]) -> None:
    names = [*TRANSCRIPTS] * 5
    with old_manager(*(TRANSCRIPTS[name] for name in names)) as (port, requests):
        client = make_client(port)
        assert [send_with_ours(name, client) for name in names] == [UNDERSTOOD[name] for name in names]
    assert len(requests) == len(names)
