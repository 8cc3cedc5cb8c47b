"""Servers and managers in a thread, raw clients, and a network that can be made bad."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from bench import Bench
from raw_client import Client

from fedsweep.manager import ExperimentManager
from fedsweep.manager.protocol import Request
from fedsweep.manager.refusal_log import Seldom, refusals
from fedsweep.manager.server import listen, serve_connection
from fedsweep.worker.client import ManagerClient

TOKEN = "t0ken-of-the-tests"
STATUS = json.dumps({"type": "status", "token": TOKEN}).encode() + b"\n"
SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1, 2]
first:
  combinations:
    - poison_ratio: [0.0, 0.5]
"""


@pytest.fixture(autouse=True)
def every_refusal_is_logged() -> None:
    """The log may have a line of each kind again."""
    refusals.forget()


def answer(request: Request, legacy: bool) -> dict[str, Any]:
    return {"type": "status", "status": {"total": 3}}


@contextmanager
def run_server(
    answer: Callable[[Request, bool], Mapping[str, Any]] = answer, max_connections: int = 2048, **options: Any
) -> Iterator[int]:
    """A server in a thread of its own; its port."""
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve_connection(reader, writer, answer, token=TOKEN, **options)

    async def serve() -> None:
        speaks_tls = options.get("tls") is not None
        server = await listen("127.0.0.1", 0, handle, max_connections=max_connections, speaks_tls=speaks_tls)
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
        assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[Callable[..., int]]:
    """Start a server with these options; its port. It ends with the test."""
    with ExitStack() as stack:
        yield lambda *positional, **options: stack.enter_context(run_server(*positional, **options))


@pytest.fixture(scope="session")
def raw() -> type[Client]:
    return Client


@pytest.fixture(scope="session")
def status_request() -> bytes:
    return STATUS


@pytest.fixture(scope="session")
def token() -> str:
    return TOKEN


@pytest.fixture
def managers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ExperimentManager]]:
    """Start the manager of a YAML text in a thread, and wait until it listens. Each ends with the test."""
    monkeypatch.chdir(tmp_path)
    running: list[tuple[ExperimentManager, threading.Thread]] = []

    def begin(text: str = SWEEP, **options: Any) -> ExperimentManager:
        Path("sweep.yaml").write_text(text)
        manager = ExperimentManager(["sweep.yaml"], **{"port": 0, "stay": True, "heartbeat_s": 0.5, **options})
        thread = threading.Thread(target=manager.start)
        running.append((manager, thread))
        thread.start()
        until(lambda: manager.running or not thread.is_alive(), "the manager listens")
        return manager

    yield begin
    for manager, thread in running:
        end(manager, thread)


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object], str], None]:
    return until


def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.005)


def end(manager: ExperimentManager, thread: threading.Thread) -> None:
    while thread.is_alive():
        manager.stop()
        thread.join(0.5)


@pytest.fixture
def stop() -> Callable[[ExperimentManager], None]:
    """End a manager, with every connection, as a kill would (the ledger is closed in order)."""

    def stop(manager: ExperimentManager) -> None:
        manager.stop()
        manager.stop()
        until(lambda: not manager.running and manager._open_sweep is None, "the manager ends")

    return stop


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the server has said of those that it refused."""
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records if record.name == Seldom.__module__]


@pytest.fixture(scope="module")
def figures() -> Iterator[Counter[str]]:
    """What was hit, by all tests together."""
    hits: Counter[str] = Counter()
    yield hits
    print("figures:", json.dumps(dict(sorted(hits.items()))))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Counter[str]) -> Iterator[Callable[..., Bench]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no plug is pulled here
    monkeypatch.setattr(ManagerClient, "_exchange", ManagerClient._exchange)  # as it is, it is put back
    with ExitStack() as stack:

        def make(tasks: int, **options: Any) -> Bench:
            made = stack.enter_context(Bench(tasks, **options))
            stack.callback(lambda: figures.update(made.network.hits))
            return made

        yield make
