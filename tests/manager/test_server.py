"""The server on a real loopback socket: who is served, who is refused, and that one client cannot harm another.

What is answered to bad input, word for word: `test_bad_requests.py`.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_client import Client

from fedsweep.errors import FedsweepError, ProtocolError, UsageError
from fedsweep.manager.protocol import ERROR_CODES, Request, RequestTask, Status, TaskFailed
from fedsweep.manager.server import is_exposed, listen, serve_connection
from fedsweep.manager.token import ensure_token, read_token
from fedsweep.worker.client import ManagerClient, request_task_from_manager

TOKEN = "t0ken-of-the-tests"
STATUS = json.dumps({"type": "status", "token": TOKEN}).encode()


def answer(request: Request, legacy: bool) -> dict[str, Any]:
    """Answers that show what was asked; a task that is reported as failed makes the manager fail in its own way."""
    if isinstance(request, TaskFailed):
        raise {
            "protocol": ProtocolError("unknown_task", "no such task"),
            "ours": FedsweepError("the disk is full"),
        }.get(request.error, RuntimeError("/secret/path and a password"))
    if isinstance(request, RequestTask):
        return {"type": "no_task", "done": False, "retry_after": float("nan") if request.worker_id == "nan" else 1.0}
    return {"type": "status", "status": {"total": 3}, "legacy": legacy}


@contextmanager
def running(
    answer: Callable[[Request, bool], dict[str, Any]] = answer, max_connections: int = 2048, **options: Any
) -> Iterator[int]:
    """A server in a thread of its own; its port."""
    started: Future[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve_connection(reader, writer, answer, token=TOKEN, **options)

    async def serve() -> None:
        server = await listen("127.0.0.1", 0, handle, max_connections=max_connections)
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


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running() as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    with Client(port) as client:
        yield client


@pytest.fixture(autouse=True)
def the_server_goes_on(port: int) -> Iterator[None]:
    yield
    with Client(port) as client:
        assert client.ask(type="status", token=TOKEN)["status"] == {"total": 3}


# ---- what is served


def test_a_connection_carries_many_requests_in_order(client: Client) -> None:
    for _ in range(3):
        assert client.ask(type="status", token=TOKEN) == {"type": "status", "status": {"total": 3}, "legacy": False}
        assert client.ask(type="request_task", worker_id="w", token=TOKEN)["type"] == "no_task"


def test_our_own_client_is_served(port: int) -> None:
    with ManagerClient("127.0.0.1", port, TOKEN) as client:
        assert client.ask({"type": "status"})["status"] == {"total": 3}
        assert request_task_from_manager(client, "w").kind == "wait"
    with ManagerClient("127.0.0.1", port, "another") as client, pytest.raises(ProtocolError, match="token is wrong"):
        request_task_from_manager(client, "w")


def test_two_objects_in_one_packet_get_two_answers(client: Client) -> None:
    client.send(STATUS + json.dumps({"type": "request_task", "worker_id": "w", "token": TOKEN}).encode() + STATUS)
    assert [client.answer()["type"] for _ in range(3)] == ["status", "no_task", "status"]


def test_a_request_needs_no_newline_and_may_come_byte_by_byte(client: Client) -> None:
    for at in range(len(STATUS)):
        client.send(STATUS[at : at + 1])
    assert client.answer()["type"] == "status"


def test_a_client_that_ends_its_side_gets_its_answer(client: Client) -> None:
    client.send(STATUS)
    client.socket.shutdown(socket.SHUT_WR)
    assert client.answer()["type"] == "status"
    assert client.is_closed()


def test_connections_are_kept_alive_and_not_delayed() -> None:
    seen: Future[tuple[int, int]] = Future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = writer.get_extra_info("socket")
        seen.set_result(
            (
                own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            )
        )
        writer.close()

    async def connect() -> None:
        server = await listen("127.0.0.1", 0, handle)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        while not seen.done():
            await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        server.close()

    asyncio.run(connect())
    assert all(seen.result())


# ---- what ends a connection


def test_a_client_that_is_still_sending_is_not_reset(client: Client) -> None:
    """A reset could destroy the answer before the client has read it."""
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    client.send(b"x" * 4_000_000)
    client.send(b"y")
    assert client.answer()["code"] == "not_an_object"
    assert client.is_closed()


def test_what_was_asked_before_is_answered(client: Client) -> None:
    client.send(STATUS + b"GET / HTTP/1.1\r\n\r\n")
    assert client.answer()["type"] == "status"
    assert client.answer()["code"] == "not_an_object"
    assert client.is_closed()


def test_a_client_that_resets_the_connection_harms_nobody(port: int, caplog: pytest.LogCaptureFixture) -> None:
    for cut in (0, 5, len(STATUS)):
        with Client(port) as client:
            client.send(STATUS[:cut])
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert not caplog.records


def test_a_client_that_leaves_in_the_middle_of_a_request_harms_nobody(
    port: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot even be told so, which is no reason for a traceback in the log."""
    for cut in range(1, len(STATUS), 5):
        with Client(port) as client:
            client.send(STATUS[:cut])
        with Client(port) as other:
            assert other.ask(type="status", token=TOKEN)["type"] == "status"
    assert not [record.exc_text for record in caplog.records if record.exc_info]


def test_a_network_that_fails_ends_the_connection_and_nothing_else() -> None:
    async def serve() -> None:
        reader, peer = asyncio.StreamReader(), Peer("127.0.0.1")
        reader.set_exception(OSError(errno.EHOSTUNREACH, "No route to host"))
        await serve_connection(reader, peer, answer, token=TOKEN)  # type: ignore[arg-type]
        assert peer.closed

    asyncio.run(serve())


# ---- what goes wrong in the manager


def test_errors_of_the_manager_cross_the_wire_as_codes_and_never_as_tracebacks(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    failed = {"type": "task_failed", "task_id": "t", "worker_id": "w", "token": TOKEN}
    assert client.ask(**failed, error="protocol") == {
        "type": "error",
        "code": "unknown_task",
        "message": "no such task",
    }
    assert client.ask(**failed, error="ours") == {"type": "error", "code": "internal", "message": "the disk is full"}
    unforeseen = {
        "type": "error",
        "code": "internal",
        "message": "the manager failed on this request; its log has the reason",
    }
    assert client.ask(**failed, error="other") == unforeseen
    assert "password" in caplog.text  # the log has it
    assert client.ask(type="request_task", worker_id="nan", token=TOKEN) == unforeseen
    assert client.ask(type="status", token=TOKEN)["type"] == "status"


# ---- time


def test_silence_from_the_start_is_ended() -> None:
    with running(request_timeout_s=0.1) as port, Client(port) as client:
        assert client.answer() == {"type": "error", "code": "timeout", "message": "no complete request in 0.1 s"}
        assert client.is_closed()


@pytest.mark.parametrize("first", [b"", STATUS])
def test_a_request_must_be_complete_in_time_even_if_bytes_keep_coming(first: bytes) -> None:
    with running(request_timeout_s=0.3) as port, Client(port) as client:
        started_at = time.monotonic()
        if first:
            client.send(first)
            assert client.answer()["type"] == "status"
        with suppress(ConnectionError):
            for at in range(len(STATUS)):
                client.send(STATUS[at : at + 1])
                time.sleep(0.05)
        assert client.answer()["code"] == "timeout"
        assert client.is_closed()
        assert time.monotonic() - started_at < 5


def test_a_client_that_was_admitted_may_be_silent_between_requests() -> None:
    with running(request_timeout_s=0.1) as port, Client(port) as client:
        for _ in range(3):
            assert client.ask(type="status", token=TOKEN)["type"] == "status"
            time.sleep(0.25)


def test_a_client_that_was_refused_may_not_be_silent() -> None:
    with running(request_timeout_s=0.1) as port, Client(port) as client:
        assert client.ask(type="status")["code"] == "unauthorized"
        assert client.answer()["code"] == "timeout"
        assert client.is_closed()


def test_each_request_has_its_own_time() -> None:
    """A client that always begins the next request with the end of the last one is not slow."""
    with running(request_timeout_s=0.3) as port, Client(port) as client:
        rotated = STATUS[-5:] + STATUS[:-5]
        client.send(STATUS[:-5])
        for _ in range(6):
            time.sleep(0.1)
            client.send(rotated)
            assert client.answer()["type"] == "status"


def test_a_client_that_does_not_take_its_answers_is_given_up() -> None:
    def long_answer(request: Request, legacy: bool) -> dict[str, Any]:
        return {"type": "status", "status": {}, "padding": "x" * 500_000}

    with running(long_answer, request_timeout_s=0.3) as port, Client(port) as client, Client(port) as other:
        with suppress(ConnectionError):
            for _ in range(100):
                client.send(STATUS)
        other.send(STATUS)
        assert other.answer()["type"] == "status"
        time.sleep(0.6)
        received = 0
        with suppress(ConnectionResetError):
            while data := client.socket.recv(1_000_000):
                received += len(data)
        assert received < 100 * 500_000


# ---- many


def test_one_client_is_served_while_300_others_say_nothing(port: int) -> None:
    with ExitStack() as idle:
        for number in range(300):
            one = idle.enter_context(Client(port))
            one.send(b"" if number % 2 else b'{"type"')
        with Client(port) as client:
            for _ in range(20):
                assert client.ask(type="status", token=TOKEN)["type"] == "status"


def test_a_flood_of_requests_does_not_keep_another_client_waiting() -> None:
    order: list[str] = []

    def note(request: Request, legacy: bool) -> dict[str, Any]:
        order.append("status" if isinstance(request, Status) else "task")
        return {"type": "no_task", "done": False, "retry_after": 1.0}

    with running(note) as port, Client(port) as flood, Client(port) as client:
        assert client.ask(type="request_task", worker_id="w", token=TOKEN)["type"] == "no_task"
        flood.send(STATUS * 800)
        client.ask(type="request_task", worker_id="w", token=TOKEN)
        for _ in range(800):
            flood.answer()
    assert order.count("status") == 800
    assert order[-1] == "status", "the second client waited for the whole flood"


def test_more_connections_than_the_limit_are_told_so_until_one_ends() -> None:
    with running(max_connections=3) as port:
        with ExitStack() as held:
            first = [held.enter_context(Client(port)) for _ in range(3)]
            assert all(client.ask(type="status", token=TOKEN)["type"] == "status" for client in first)
            with Client(port) as refused:
                assert refused.answer()["code"] == "too_many_connections"
                assert refused.is_closed()
            assert first[0].ask(type="status", token=TOKEN)["type"] == "status"
        deadline = time.monotonic() + 5
        while True:
            with Client(port) as client, suppress(ConnectionError):
                if client.ask(type="status", token=TOKEN)["type"] == "status":
                    break
            assert time.monotonic() < deadline


# ---- in process: any bytes at all, and peers from elsewhere


class Peer:
    """Stands for the writer of a connection, from an address that the test chooses."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.written = b""
        self.closed = False
        self.transport = self

    def get_extra_info(self, _: str) -> tuple[str, int]:
        return self.host, 40_000

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def write_eof(self) -> None:
        pass

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def served(data: bytes, host: str = "127.0.0.1", **options: Any) -> list[dict[str, Any]]:
    """The answers to these bytes, after which the client ends."""

    async def serve() -> bytes:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        peer = Peer(host)
        await serve_connection(reader, peer, answer, token=TOKEN, **options)  # type: ignore[arg-type]
        assert peer.closed
        return peer.written

    return [json.loads(line) for line in asyncio.run(serve()).splitlines()]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.binary(max_size=20)
        | st.text(alphabet='{}[]"\\:,tokenype1.eE-\n ', max_size=30).map(str.encode)
        | st.sampled_from([STATUS, b"{", b'{"type":', b"\n", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"])
        | st.dictionaries(st.sampled_from(["type", "token", "worker_id", "x"]), st.sampled_from([TOKEN, "status", 1]))
        .map(json.dumps)
        .map(str.encode),
        max_size=6,
    ).map(b"".join)
)
def test_whatever_arrives_the_answers_are_answers_or_known_errors(data: bytes) -> None:
    for message in served(data):
        assert message["type"] in ("status", "no_task", "error")
        assert message["type"] != "error" or message["code"] in ERROR_CODES
        assert message.get("code") != "internal"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1"])
def test_old_clients_on_loopback_are_served_where_that_is_allowed(host: str) -> None:
    request = b'{"type":"status"}'
    assert served(request, host, allow_legacy=True)[0]["type"] == "status"
    assert served(request, host, allow_legacy=False)[0]["code"] == "unauthorized"


@pytest.mark.parametrize("host", ["192.0.2.7", "10.0.0.1", "2001:db8::1", "0.0.0.0", "", "::ffff:192.0.2.7"])
def test_old_clients_from_elsewhere_are_refused_even_where_they_are_allowed(host: str) -> None:
    assert served(b'{"type":"status"}', host, allow_legacy=True)[0]["code"] == "unauthorized"
    assert served(STATUS, host, allow_legacy=True)[0]["type"] == "status"


# ---- listening


def listening(host: str, port: int = 0, **options: Any) -> list[Any]:
    """The addresses that a server listened on for a moment."""

    async def nobody(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def bind() -> list[Any]:
        server = await listen(host, port, nobody, **options)
        addresses = [each.getsockname() for each in server.sockets]
        server.close()
        await server.wait_closed()
        return addresses

    return asyncio.run(bind())


@pytest.mark.parametrize("host", ["0.0.0.0", "", "192.0.2.7", "::"])
def test_addresses_that_others_can_reach_are_told_from_loopback(host: str) -> None:
    assert asyncio.run(is_exposed(host, 0))
    assert not asyncio.run(is_exposed("127.0.0.1", 0))


def test_the_address_is_checked_after_it_was_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may mean something else a moment later; nobody is let in before what was bound is looked at."""
    connected: list[bool] = []
    listens = asyncio.Server.start_serving
    monkeypatch.setattr(asyncio.Server, "start_serving", lambda server: connected.append(True) or listens(server))
    with pytest.raises(UsageError) as caught:
        listening("0.0.0.0")
    assert str(caught.value) == (
        "--host 0.0.0.0 is 0.0.0.0, which other machines can reach; nothing would be encrypted"
    )
    assert not connected
    assert listening("0.0.0.0", exposed=True)[0][0] == "0.0.0.0"
    assert connected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.9"])
def test_loopback_needs_no_flag_and_a_free_port_is_one_port(host: str) -> None:
    [address] = listening(host)
    assert address[0].startswith("127.")
    assert address[1] > 0


def test_a_name_is_judged_by_every_address_that_it_means(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("127.0.0.1", "192.0.2.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert asyncio.run(is_exposed("innocent.example", 0))


def test_a_taken_port_says_what_to_do(port: int) -> None:
    with pytest.raises(UsageError) as caught:
        listening("127.0.0.1", port)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: Address already in use. Is a manager running there? Name another --port; "
        "0 picks a free one."
    )


@pytest.mark.parametrize(
    ("host", "number", "words"),
    [
        ("no-such-host.invalid", 0, "--host no-such-host.invalid: no such host"),
        ("192.0.2.7", 0, "cannot listen on 192.0.2.7:0: Cannot assign requested address"),
        ("127.0.0.1", 70_000, "port 70000: expected 0 to 65535"),
        ("127.0.0.1", -1, "port -1: expected 0 to 65535"),
    ],
)
def test_other_addresses_that_cannot_be_had(host: str, number: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        listening(host, number, exposed=True)
    assert str(caught.value).startswith(words)


def test_a_port_can_be_taken_again_at_once() -> None:
    with running() as port, Client(port) as client:
        assert client.ask(type="status", token=TOKEN)["type"] == "status"
        held = port
        # The server ends first, so that its side of the connection lingers.
    assert listening("127.0.0.1", held)[0][1] == held


# ---- the token file


def test_a_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "token"
    token = ensure_token(path)
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_token(path) == read_token(path) == token
    assert [each.name for each in path.parent.iterdir()] == ["token"]
    assert ensure_token(tmp_path / "other") != token


def test_a_token_file_that_others_can_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text("abc\n")
    path.chmod(0o644)
    assert read_token(path) == "abc"
    assert "chmod 600" in caplog.text
    assert "abc" not in caplog.text


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "is empty; delete it and start the manager again"),
        (lambda path: path.write_bytes(b"\n \n"), "is empty"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "it is not a text file with a token"),
        (lambda path: path.write_bytes(b"x" * 10_000), "it is not a text file with a token"),
        (lambda path: path.mkdir(), "it is not a text file with a token"),
        (make_fifo, "it is not a text file with a token"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a text file with a token"),
        (lambda path: path.symlink_to("."), "it is not a text file with a token"),
        (lambda path: path.write_text("tokén"), "it is not a text file with a token"),
        (lambda path: path.write_bytes("token".encode("utf-16")), "it is not a text file with a token"),
        (lambda path: path.write_bytes(b"\x80\x04pickle"), "it is not a text file with a token"),
        (lambda path: path.write_bytes(bytes(40)), "it is not a text file with a token"),
        (lambda path: path.write_text("two words"), "it is not a text file with a token"),
        (lambda path: path.write_text("one\ntwo\n"), "it is not a text file with a token"),
    ],
)
def test_what_is_no_token_file_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "token"
    make(path)
    before = path.lstat()
    for read in (read_token, ensure_token):
        with pytest.raises(UsageError, match=words):
            read(path)
    assert path.lstat() == before


def test_a_missing_token_file_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_token(tmp_path / "token")
    assert str(caught.value) == (
        f"no token in {tmp_path / 'token'} (No such file or directory); it lies in the manager's state directory: "
        "name it by --token-file"
    )
