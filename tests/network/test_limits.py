"""What strangers, and those who only behave like them, can do to a manager: nothing that its workers notice."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedsweep.errors import ManagerUnreachable, ProtocolError
from fedsweep.manager import server as server_module
from fedsweep.manager.protocol import MAX_CONNECTIONS, MAX_MESSAGE, FrameReader
from fedsweep.manager.refusal_log import Seldom
from fedsweep.manager.tls import ensure_identity
from fedsweep.worker.client import ManagerClient, request_task_from_manager, submit_result_to_manager

MANY = 3000
SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 1, depth: 0, num_clients: 2, output_dir: out}
seeds: [1, 2, 3, 4]
first: {combinations: [{poison_ratio: [0.0, 0.5]}]}
"""


@dataclass(frozen=True)
class Running:
    """A manager in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    token: str
    log: Path

    def client(self, **options: Any) -> ManagerClient:
        """One of ours that tries once, and waits for five seconds at most."""
        return ManagerClient("127.0.0.1", self.port, self.token, **{"timeout": 5.0, "retries": 0, **options})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def memory(self, name: str) -> int:
        """Bytes: `VmRSS` now, `VmHWM` at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+) kB", status)
        assert found
        return 1024 * int(found[1])

    def end(self) -> list[str]:
        """Stop it in order; the lines of its log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0
        return self.log.read_text().splitlines()


def few_files() -> None:
    """What a process may open, unless it asks for more, is what it mostly is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024 if hard == resource.RLIM_INFINITY else min(1024, hard), hard))


@pytest.fixture
def running(tmp_path: Path, wait_until: Callable[..., None]) -> Iterator[Running]:
    """The real manager, started as people start it."""
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    log, word = tmp_path / "manager.log", tmp_path / ".fedsweep/manager.json"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedsweep", "manager", "sweep.yaml", "--port", "0"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=few_files,
        )
    try:
        wait_until(word.exists, "the manager listens", 60)
        token = (tmp_path / ".fedsweep/token").read_text().strip()
        yield Running(process, json.loads(word.read_text())["port"], token, log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def many_files() -> Iterator[None]:
    """So many files may be open in this process that it can hold all those connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MANY + 500
    if hard not in (resource.RLIM_INFINITY, *range(needed, hard + 1)):
        pytest.skip(f"this system lets a process open {hard:,} files, and {needed:,} are needed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def heard(connection: socket.socket) -> str:
    """What was said on a connection that sends nothing: the code of an error, `nothing`, or `its end`."""
    try:
        said = connection.recv(65_536)
    except BlockingIOError:
        return "nothing"
    except ConnectionError:
        return "its end"
    return json.loads(said)["code"] if said else "its end"


def test_of_3000_idle_connections_those_over_the_limit_are_told_so_and_a_client_is_served(
    running, many_files, wait_until
):
    with running.client() as client, running.client() as late, ExitStack() as held:
        assert client.ask({"type": "status"})["status"]["total"] == 8
        idle = []
        for _ in range(MANY):
            each = held.enter_context(socket.socket())
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", running.port))
            idle.append(each)
        assert client.ask({"type": "status"})["status"]["total"] == 8
        told: set[socket.socket] = set()

        def is_settled() -> bool:
            told.update(each for each in idle if each not in told and heard(each) == "too_many_connections")
            return len(told) == MANY - (MAX_CONNECTIONS - 1)

        wait_until(is_settled, "all those over the limit are told so")
        wait_until(lambda: {heard(each) for each in told} == {"its end"}, "their connections are closed")
        with pytest.raises(ProtocolError, match="2,048 connections are open") as caught:
            late.ask({"type": "status"})
        assert caught.value.code == "too_many_connections"
        for _ in range(20):
            assert client.ask({"type": "status"})["status"]["total"] == 8
        assert Counter(heard(each) for each in idle if each not in told) == {"nothing": MAX_CONNECTIONS - 1}
    wait_until(lambda: is_served(running), "there is room again")
    lines = running.end()
    assert len([line for line in lines if "connections are open" in line]) == 2, lines
    assert not [line for line in lines if "Traceback" in line or "socket.accept" in line]


def is_served(running: Running) -> bool:
    with running.client() as client, suppress(ManagerUnreachable, ProtocolError):
        return client.ask({"type": "status"})["type"] == "status"
    return False


def test_a_system_that_allows_few_files_gets_fewer_connections(monkeypatch, caplog, server, raw, token):
    monkeypatch.setattr(server_module, "_allow_open_files", lambda number: server_module._SPARE_FILES + 2)
    port = server()
    assert caplog.messages == ["this system allows 2 connections at once, not 2048; see `ulimit -Hn`"]
    with raw(port) as first, raw(port) as second, raw(port) as third:
        assert first.ask(type="status", token=token)["type"] == second.ask(type="status", token=token)["type"]
        assert third.answer()["code"] == "too_many_connections"


# ---- slowness and size


def hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="a").do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("speech", ["plain", "TLS"])
def test_those_who_send_a_byte_now_and_then_are_ended_together_and_one_client_is_served(
    server, raw, tmp_path, status_request, token, speech
):
    """Fifty slow ones; not one of them gets more time than the limit for a request, however slowly it goes."""
    identity = ensure_identity(tmp_path / "tls.pem") if speech == "TLS" else None
    limit_s, pause_s = 0.5, 0.05
    port = server(request_timeout_s=limit_s, tls=identity.context if identity else None)
    said = hello() if identity else status_request
    client = ManagerClient("127.0.0.1", port, token, 5.0, pin=identity.pin if identity else None, retries=0)
    with ExitStack() as stack, client:
        slow = [stack.enter_context(raw(port)) for _ in range(50)]
        began = time.monotonic()
        ended: set[Any] = set()
        for at in range(len(said)):
            for each in slow:
                with suppress(ConnectionError):
                    each.send(said[at : at + 1])
            assert client.ask({"type": "status"})["status"] == {"total": 3}
            ended |= {each for each in slow if each not in ended and has_something_to_read(each.socket)}
            if len(ended) == len(slow):
                break
            time.sleep(pause_s)
        assert len(ended) == len(slow), f"{len(slow) - len(ended)} still go on after {time.monotonic() - began:.1f} s"
        if not identity:
            assert {each.answer()["code"] for each in slow} == {"timeout"}
        assert all(each.is_closed() for each in slow)


def has_something_to_read(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        connection.settimeout(20)
    return True


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process is read from /proc")
def test_messages_without_an_end_are_refused_and_take_no_memory(running):
    """256 MiB altogether, over eight connections at once."""
    with running.client() as client:
        client.ask({"type": "status"})
        before = running.memory("VmRSS")
        answers: list[bytes] = []

        def send_without_end() -> None:
            with running.connect() as connection:
                with suppress(ConnectionError):
                    connection.sendall(b'{"type":"submit_result","task_id":"')
                    for _ in range(32):
                        connection.sendall(b"x" * 1024 * 1024)
                answers.append(connection.recv(65_536))

        senders = [threading.Thread(target=send_without_end) for _ in range(8)]
        for each in senders:
            each.start()
        for each in senders:
            each.join()
        assert client.ask({"type": "status"})["type"] == "status"
    assert [json.loads(answer)["code"] for answer in answers] == ["too_large"] * 8
    assert running.memory("VmHWM") - before < 2 * len(senders) * MAX_MESSAGE + 8 * 1024 * 1024


def test_strangers_cannot_fill_the_memory_with_unfinished_messages(monkeypatch, server, raw, token, wait_until):
    """Each may send a whole message; all together have a limit, and those who have shown the token know none of it."""
    monkeypatch.setattr(server_module, "MAX_UNPROVEN", MAX_MESSAGE // 2)
    port = server(request_timeout_s=20.0)

    def failed(size: int) -> bytes:
        message = {"type": "task_failed", "task_id": "t", "worker_id": "w", "error": "x" * size, "token": token}
        return json.dumps(message).encode()

    def has_room() -> bool:
        with raw(port) as another:
            another.send(failed(MAX_MESSAGE * 4 // 10))
            return another.answer()["type"] == "status"

    def is_taken() -> bool:
        return server_module._Unproven.total > MAX_MESSAGE * 4 // 10

    with raw(port) as worker, raw(port) as stranger:
        assert worker.ask(type="status", token=token)["type"] == "status"
        assert has_room()
        stranger.send(failed(MAX_MESSAGE * 4 // 10)[:-1])
        wait_until(is_taken, "the stranger takes the room")
        worker.send(failed(MAX_MESSAGE * 9 // 10))
        assert worker.answer()["type"] == "status"
        with raw(port) as another:
            another.send(failed(MAX_MESSAGE * 4 // 10))
            assert another.answer()["code"] == "retry_later"
            assert another.is_closed()
        stranger.send(b"}")
        assert stranger.answer()["type"] == "status"
        assert has_room(), "a client that has shown the token is no stranger"
        stranger.send(failed(MAX_MESSAGE * 4 // 10)[:-1])
        assert has_room()
    with raw(port) as first:
        first.send(b'{"a":"' + b"x" * (MAX_MESSAGE * 4 // 10))
        wait_until(is_taken, "another stranger takes it")
        assert not has_room()
    wait_until(has_room, "what it left is forgotten")


@pytest.mark.parametrize("said", [b'{"a":"' + b"x" * 2_000_000, b'{"a":"' + b"x" * 900_000], ids=["too large", "slow"])
def test_what_was_refused_is_forgotten_before_its_client_has_left(monkeypatch, server, raw, wait_until, said):
    kept: list[weakref.ref[FrameReader]] = []

    class Watched(FrameReader):
        def __init__(self) -> None:
            super().__init__()
            kept.append(weakref.ref(self))

    monkeypatch.setattr(server_module, "FrameReader", Watched)
    monkeypatch.setattr(server_module, "_LINGER_S", 30.0)
    with raw(server(request_timeout_s=0.5)) as client:
        client.send(said)
        assert client.answer()["code"] in ("too_large", "timeout")
        wait_until(lambda: kept and all(each() is None for each in kept), "nothing of it is left", 5)


def test_work_goes_on_in_a_flood_of_status(running):
    """Twenty clients that ask a hundred times each without waiting; one that works."""
    asked = json.dumps({"type": "status", "token": running.token}).encode() + b"\n"
    with ExitStack() as stack, running.client() as worker:
        flood = [stack.enter_context(running.connect()) for _ in range(20)]
        for each in flood:
            each.sendall(asked * 100)
        for _ in range(8):
            task = request_task_from_manager(worker, "w").task
            assert task is not None
            assert submit_result_to_manager(worker, task.task_id, "w", {"mean_test_acc": 0.5}, task.attempt)
        for each in flood:
            lines = each.makefile("rb")
            assert all(json.loads(lines.readline())["type"] == "status" for _ in range(100))


# ---- what the log says


def test_a_thousand_refusals_make_few_lines_and_their_number_is_told(running):
    bad = {
        b'{"type":"status","token":"wrong"}\n': "a request was refused: the token is wrong; it lies in the manager's "
        "state directory",
        b"GET / HTTP/1.1\r\n\r\n": "127.0.0.1 cannot be understood: not_an_object",
    }
    for said in bad:
        for _ in range(1000):
            with running.connect() as connection:
                connection.sendall(said)
                assert json.loads(connection.recv(65_536))["type"] == "error"
    lines = running.end()
    for text in bad.values():
        written = [line for line in lines if text in line]
        counts = [
            int(found[1].replace(",", "")) for line in written if (found := re.search(r"([\d,]+) more like", line))
        ]
        assert sum(counts) + len(written) - len(counts) == 1000, written
        assert len(written) <= 2 + 2 * 6  # one of a kind in ten seconds, should this take a minute
    assert not any(running.token in line for line in lines)


def test_of_a_kind_one_line_is_written_in_ten_seconds_and_the_others_are_counted(caplog):
    now = [0.0]
    seldom = Seldom(logging.getLogger("somebody"), pause_s=10.0, clock=lambda: now[0])
    for at in range(2500):
        now[0] = at / 100
        seldom.warn("%s says nonsense", f"10.0.0.{at % 200}")
        if at == 500:
            seldom.warn("%s leaves", "10.0.0.1")
    assert caplog.messages == [
        "10.0.0.0 says nonsense",
        "10.0.0.1 leaves",
        "999 more like this: 10.0.0.199 says nonsense",
        "1,000 more like this: 10.0.0.199 says nonsense",
    ]
    caplog.clear()
    seldom.tell()
    assert caplog.messages == []
    now[0] = 31.0
    seldom.tell()
    assert caplog.messages == ["500 more like this: 10.0.0.99 says nonsense"]
    seldom.warn("%s says nonsense", "10.0.0.7")
    seldom.tell(is_last=True)
    seldom.tell(is_last=True)
    assert caplog.messages[1:] == ["1 more like this: 10.0.0.7 says nonsense"]


# ---- the token


TOKENS = ["tökén", "t0ken-of-the-tëst", "ключ", "\U0001f511" * 20, "t0ken-of-the-tests\u0301", "\x7f", "t" * 100_000]


@pytest.mark.parametrize("spelled", ["as they are", "escaped"])
def test_tokens_are_compared_as_bytes_whatever_letters_they_have(server, raw, token, caplog, spelled):
    with raw(server()) as client:
        for wrong in TOKENS:
            said = json.dumps({"type": "status", "token": wrong}, ensure_ascii=spelled == "escaped")
            client.send(said.encode() + b"\n")
            refused = client.answer()
            assert refused["code"] == "unauthorized"
            assert refused["message"] == "the token is wrong; it lies in the manager's state directory"
        assert client.ask(type="status", token=token)["type"] == "status"
    assert not [record for record in caplog.records if record.exc_info]
