"""A machine with GPUs that are not there."""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedsweep.fl import candidates
from fedsweep.fl.loop import LoopTrainer
from fedsweep.manager.protocol import decode, encode, parse_request
from fedsweep.worker import plans, worker_loop

TOKEN = "a-token"
SHORT = {"dataset": "digits", "model_type": "lr", "width_factor": 2, "depth": 0, "num_clients": 2, "global_rounds": 2}

Request = dict[str, Any]

FAKE_NVML = """\
import os
class NVMLError(Exception): pass
class Memory:
    def __init__(self, free): self.free, self.total, self.used = free, 80 * 2**30, 80 * 2**30 - free
def free():
    text = os.environ.get("FAKE_GPU_GB")
    if text is None: raise NVMLError("driver not loaded")
    return text.split(",")
def nvmlInit(): free()
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(free())
def nvmlDeviceGetHandleByIndex(index):
    if free()[index] == "lost": raise NVMLError("GPU is lost")
    return index
def nvmlDeviceGetUUID(index): return f"GPU-{index}{index}aa-bb"
def nvmlDeviceGetMemoryInfo(index): return Memory(int(float(free()[index]) * 2**30))
"""


@pytest.fixture
def fake_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs with 10 GB free, for this process and those that it starts; FAKE_GPU_GB says otherwise."""
    folder = tmp_path / "nvml"
    folder.mkdir()
    (folder / "pynvml.py").write_text(FAKE_NVML)
    monkeypatch.setenv("FAKE_GPU_GB", "10,10")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


@pytest.fixture
def plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other trainer than the plain loop."""

    def loop(example: Any, data: Any, threads: int, *_: object) -> dict[str, Any]:
        return {"loop": lambda: LoopTrainer(example, data, threads)}

    monkeypatch.setattr(candidates, "candidates", loop)


@pytest.fixture(autouse=True)
def own_choices(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of plans are not those of this machine's user, nor kept for it."""
    monkeypatch.setattr(plans, "default_cache_dir", lambda: tmp_path_factory.getbasetemp() / "choices")


class FakeManager:
    """Hands out the tasks given, takes results, and writes down every request. It stops and starts as a test asks."""

    def __init__(self, output_dir: Path, tasks: list[dict[str, Any]]) -> None:
        self.output_dir = output_dir
        self.waiting = deque(tasks)
        self.requests: list[Request] = []
        self.results: dict[str, Request] = {}
        self.drop: list[str] = []
        self.refusals: dict[str, list[str]] = {}  # request type -> error codes to answer, one after another
        self.lost_acks = 0  # results that are taken, but not acknowledged: the connection breaks
        self.waits: list[float] = []  # answers "wait" as often before it says that all is done
        self.before: Callable[[Request], None] = lambda _: None  # called with each request before it is answered
        self.together = False  # whether it gives many tasks at once, as managers of old do not
        self.token = TOKEN
        self.port = 0
        self.server: socketserver.ThreadingTCPServer | None = None
        self.connections: set[socket.socket] = set()

    def start(self) -> FakeManager:
        manager = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                manager.connections.add(self.request)
                try:
                    for line in self.rfile:
                        answer = manager.answer(decode(line))
                        if answer is None:
                            return
                        self.wfile.write(encode(answer))
                except OSError:
                    return
                finally:
                    manager.connections.discard(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

        self.server = Server(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Go away, with every connection."""
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
        self.server = None
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, message: Request) -> Request | None:
        parse_request(message)  # what a worker sends is always a valid request
        self.requests.append(message)
        self.before(message)
        if message.get("token") != self.token:
            return {"type": "error", "code": "unauthorized", "message": "the token is wrong"}
        if self.refusals.get(message["type"]):
            return {"type": "error", "code": self.refusals[message["type"]].pop(0), "message": "as the test wants it"}
        return getattr(self, f"on_{message['type']}")(message)

    def on_request_task(self, message: Request) -> Request:
        if self.together and (fitting := self.fitting(message)):
            return {"type": "task", "task": fitting[0], "tasks": fitting}
        if self.waiting and not self.together:
            return {"type": "task", "task": self.as_task(self.waiting.popleft())}
        if self.waits:
            return {"type": "no_task", "done": False, "retry_after": self.waits.pop(0)}
        return {"type": "no_task", "done": True, "retry_after": 0}

    def fitting(self, message: Request) -> list[Request]:
        """So many of the waiting tasks as are asked for, of the cohort that is asked for."""
        found = [task for task in self.waiting if message.get("cohort") in (None, task.get("cohort"))]
        given = found[: message.get("max_tasks", 1)]
        self.waiting = deque(task for task in self.waiting if task not in given)
        return [self.as_task(task) for task in given]

    def as_task(self, given: dict[str, Any]) -> dict[str, Any]:
        task = {
            "task_id": "phase_0_1",
            "phase": "phase",
            "seed": 1,
            "attempt": 7,
            "heartbeat_s": 60.0,
            "lease_s": 120.0,
        }
        return task | {"output_dir": str(self.output_dir), "config": SHORT} | given

    def on_submit_result(self, message: Request) -> Request | None:
        status = "duplicate" if message["task_id"] in self.results else "accepted"
        self.results.setdefault(message["task_id"], message["result_data"])
        if self.lost_acks:
            self.lost_acks -= 1
            return None
        return {"type": "ack", "status": status}

    def on_heartbeat(self, message: Request) -> Request:
        return {"type": "ack", "drop": self.drop}

    def on_task_failed(self, message: Request) -> Request:
        return {"type": "ack"}

    on_release = on_leave = on_task_failed

    def types(self) -> list[str]:
        return [request["type"] for request in self.requests]

    def all(self, kind: str) -> list[Request]:
        return [request for request in list(self.requests) if request["type"] == kind]


@pytest.fixture
def make_manager(tmp_path: Path) -> Iterator[Callable[..., FakeManager]]:
    made: list[FakeManager] = []

    def make(*tasks: dict[str, Any]) -> FakeManager:
        made.append(FakeManager(tmp_path / "out", list(tasks)))
        return made[-1].start()

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "token").write_text(TOKEN + "\n")
    return folder


@pytest.fixture
def work(state_dir: Path) -> Callable[..., int]:
    """Run a worker in this process until it ends; its exit status."""

    def work(manager: FakeManager, **options: Any) -> int:
        return worker_loop(f"127.0.0.1:{manager.port}", "cpu", state_dir=state_dir, **options)

    return work
