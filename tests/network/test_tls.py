"""TLS off loopback: who is served, who is told what, on both sides, and that nobody else notices."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from fedsweep.errors import ManagerNotTrusted, ManagerUnreachable, UsageError
from fedsweep.manager import tls
from fedsweep.manager.tls import Identity, ensure_identity
from fedsweep.worker import client as client_module
from fedsweep.worker.client import ManagerClient, submit_result_to_manager
from fedsweep.worker.pinned import secure, stays_here

OTHER_PIN = "ab" * 32
LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def identity(tmp_path: Path) -> Identity:
    return ensure_identity(tmp_path / "tls.pem")


@pytest.fixture
def clients(token: str) -> Iterator[Callable[..., ManagerClient]]:
    """Make clients of ours, which never wait; closed at the end."""
    with ExitStack() as stack:

        def make(port: int, pin: str | None = None, **options: Any) -> ManagerClient:
            options = {"token": token, "timeout": 10.0, "sleep": lambda _: None, "retries": 1, **options}
            return stack.enter_context(ManagerClient("127.0.0.1", port, pin=pin, **options))

        yield make


def any_tls(connection: socket.socket) -> ssl.SSLSocket:
    """A TLS client that trusts whoever answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def hello() -> bytes:
    """The first bytes of a TLS client."""
    outgoing = ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


# ---- who is served


def test_a_manager_off_loopback_prints_one_join_string_and_serves_who_uses_it(managers, clients, capsys, stop):
    manager = managers(host="0.0.0.0")
    [printed] = capsys.readouterr().out.splitlines()
    found = re.fullmatch(rf"{re.escape(socket.gethostname())}:{manager.port}#sha256:([0-9a-f]{{64}})", printed)
    assert found
    token = (manager.state_dir / "token").read_text().strip()
    assert clients(manager.port, found[1], token=token).ask({"type": "status"})["status"]["total"] == 4
    for secret in ("token", "tls.pem"):
        assert stat.S_IMODE((manager.state_dir / secret).stat().st_mode) == 0o600
    word = json.loads((manager.state_dir / "manager.json").read_text())
    assert (word["pin"], word["port"]) == (found[1], manager.port)
    stop(manager)
    managers(host="0.0.0.0")
    assert capsys.readouterr().out.splitlines()[0].endswith(found[1]), "the fingerprint stays over restarts"


def test_on_loopback_nothing_changes(managers, clients, capsys):
    manager = managers()
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in manager.state_dir.glob("t*")) == ["token"]
    token = (manager.state_dir / "token").read_text().strip()
    assert clients(manager.port, token=token).ask({"type": "status"})["type"] == "status"


def test_after_the_handshake_a_client_hears_nothing_that_it_did_not_ask_for(identity):
    """Not even session tickets: with those unread, one that leaves over the fingerprint would reset the connection,
    and the manager's log could not say why it left.
    """
    to_manager, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = context.wrap_bio(to_client, to_manager)
    manager = identity.context.wrap_bio(to_manager, to_client, server_side=True)
    for side in (client, manager, client, manager):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    assert client.version() == manager.version() == "TLSv1.3"
    assert to_client.pending == 0


def test_requests_share_one_tls_connection(server, identity, clients, monkeypatch):
    opened = []
    monkeypatch.setattr(client_module, "secure", lambda *given: opened.append(1) or secure(*given))
    client = clients(server(tls=identity.context), identity.pin)
    for _ in range(5):
        assert client.ask({"type": "status"})["status"] == {"total": 3}
    assert opened == [1]


def test_answers_and_requests_of_a_megabyte_pass(server, identity, clients):
    def long_answer(request: Any, legacy: bool) -> dict[str, Any]:
        return {"type": "status", "padding": "x" * 1_000_000}

    client = clients(server(long_answer, tls=identity.context), identity.pin)
    for _ in range(3):
        assert len(client.ask({"type": "task_failed", "task_id": "t", "worker_id": "w", "error": "e" * 1_000_000})) == 2


def test_a_request_may_come_byte_by_byte_and_many_at_once(server, identity, raw, status_request):
    port = server(tls=identity.context)
    with raw(port, secure=any_tls) as client:
        for at in range(len(status_request)):
            client.send(status_request[at : at + 1])
        assert client.answer()["type"] == "status"
        client.send(status_request * 100)
        assert all(client.answer()["type"] == "status" for _ in range(100))
        client.socket.unwrap()  # type: ignore[attr-defined]  # each side tells the other that it ends


def test_nothing_of_a_conversation_can_be_read_on_the_way(managers, clients, capsys, token):
    for host in ("127.0.0.1", "0.0.0.0"):
        manager = managers(host=host, state_dir=f"state-{host}")
        secret = (manager.state_dir / "token").read_text().strip()
        seen = bytearray()
        port = tapped(manager.port, seen)
        pin = json.loads((manager.state_dir / "manager.json").read_text())["pin"]
        assert clients(port, pin, token=secret).ask({"type": "status"})["type"] == "status"
        readable = (secret.encode() in seen, b'"status"' in seen)
        assert readable == ((True, True) if host == "127.0.0.1" else (False, False))


def tapped(port: int, seen: bytearray) -> int:
    """The port of somebody on the line, who writes down what passes on one connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                seen.extend(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def pass_on() -> None:
        with listener, listener.accept()[0] as near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=copy, args=(far, near))
            back.start()
            copy(near, far)
            back.join(10)

    threading.Thread(target=pass_on, daemon=True).start()
    return int(listener.getsockname()[1])


# ---- who is not


@pytest.fixture
def counted(server, identity) -> tuple[int, list[Any]]:
    """A TLS server, and the requests that reach it."""
    requests: list[Any] = []

    def note(request: Any, legacy: bool) -> dict[str, Any]:
        requests.append(request)
        return {"type": "status", "status": {"total": 3}}

    return server(note, tls=identity.context), requests


def test_a_wrong_fingerprint_is_one_clear_error_on_both_sides_and_sends_nothing(
    counted, identity, clients, log_lines, wait_until
):
    port, requests = counted
    bystander = clients(port, identity.pin)
    assert bystander.ask({"type": "status"})["type"] == "status"
    with pytest.raises(ManagerNotTrusted) as caught:
        clients(port, OTHER_PIN).ask({"type": "status"})
    assert str(caught.value) == (
        f"what answers at 127.0.0.1:{port} shows another certificate (sha256:{identity.pin}) than the join string "
        f"names (sha256:{OTHER_PIN}). If the manager was set up anew, use the join string that it prints now; if not, "
        "somebody else answers there. Nothing was sent to it."
    )
    assert caught.value.exit_code == 2
    wait_until(log_lines, "the server says so")
    assert log_lines() == [
        "127.0.0.1: no TLS connection came about (it left without a request; does it expect another certificate?)"
    ]
    assert len(requests) == 1
    assert bystander.ask({"type": "status"})["type"] == "status"


def test_a_plain_client_on_the_tls_port_is_told_in_plain_text(counted, identity, raw, clients, log_lines, token):
    port, requests = counted
    words = "this port speaks TLS; use the join string that the manager printed: --join HOST:PORT#sha256:…"
    with raw(port) as client:
        refused = client.ask(type="status", token=token)
        assert refused == {"type": "error", "code": "plain_on_tls_port", "message": words}
        assert client.is_closed()
    with pytest.raises(ManagerNotTrusted) as caught:
        clients(port).ask({"type": "status"})
    assert str(caught.value) == f"the manager at 127.0.0.1:{port} says: {words}"
    assert log_lines() == ["127.0.0.1 cannot be understood: plain_on_tls_port"]
    assert not requests
    assert clients(port, identity.pin).ask({"type": "status"})["type"] == "status"


def test_a_tls_client_on_the_plain_port_is_told_so(server, identity, raw, clients, log_lines, token):
    port = server()
    with pytest.raises(ManagerNotTrusted) as caught:
        clients(port, identity.pin).ask({"type": "status"})
    assert str(caught.value) == (
        f"what answers at 127.0.0.1:{port} does not speak TLS; a manager without TLS is named by "
        f"--manager 127.0.0.1:{port}"
    )
    with raw(port) as client:
        client.send(hello())
        assert client.answer()["code"] == "tls_on_plain_port"
    assert log_lines() == ["127.0.0.1 cannot be understood: tls_on_plain_port"]
    assert clients(port).ask({"type": "status"})["type"] == "status"


def expired(path: Path, monkeypatch: pytest.MonkeyPatch) -> Identity:
    """An identity that was made long ago, shown by somebody who does not look at the date."""
    monkeypatch.setattr(tls, "VALID_DAYS", 1)
    return ensure_identity(path, LONG_AGO)


def test_an_expired_certificate_is_one_clear_error_on_both_sides(server, tmp_path, clients, monkeypatch):
    old = expired(tmp_path / "old.pem", monkeypatch)
    with pytest.raises(UsageError) as at_the_manager:
        ensure_identity(tmp_path / "old.pem")
    assert str(at_the_manager.value) == (
        f"the certificate in {tmp_path / 'old.pem'} expired on 2001-01-02; delete it, start the manager again, and "
        "give the workers the new join string"
    )
    port = server(tls=old.context)
    with pytest.raises(ManagerNotTrusted) as at_the_worker:
        clients(port, old.pin).ask({"type": "status"})
    assert str(at_the_worker.value) == (
        f"the certificate of the manager at 127.0.0.1:{port} expired on 2001-01-02; delete tls.pem in its state "
        "directory, start it again, and use the join string that it prints then"
    )


def test_a_certificate_that_is_replaced_while_a_worker_runs_is_a_manager_that_is_away(
    server, identity, tmp_path, clients
):
    """Whoever takes the manager's address shall neither get a result nor end the worker that holds it."""
    client = clients(server(tls=identity.context), identity.pin)
    assert client.ask({"type": "status"})["type"] == "status"
    first = client.address
    other = ensure_identity(tmp_path / "other.pem")
    client.move_to(type(first)("127.0.0.1", server(tls=other.context), identity.pin))
    with pytest.raises(ManagerUnreachable, match="shows another certificate"):
        client.ask({"type": "status"})
    assert submit_result_to_manager(client, "a_0_1", "w", {"mean_test_acc": 0.5}) is False
    client.move_to(first)
    assert client.ask({"type": "status"})["type"] == "status"


def test_a_client_does_not_send_its_token_to_another_machine_unencrypted(counted, server, clients, monkeypatch):
    requests: list[Any] = []
    port = server(lambda request, legacy: requests.append(request) or {"type": "status"})
    monkeypatch.setattr(client_module, "stays_here", lambda connection: False)
    with pytest.raises(ManagerNotTrusted) as caught:
        clients(port).ask({"type": "status"})
    assert str(caught.value) == (
        f"127.0.0.1:{port} is another machine, and the token would cross the network unencrypted. Use the join string "
        "that the manager printed (--join), or accept the risk with --insecure-plaintext."
    )
    assert not requests
    assert clients(port, insecure_plaintext=True).ask({"type": "status"})["type"] == "status"


@pytest.mark.parametrize(
    ("here", "there", "stays"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("::1", "::1", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("10.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "10.0.0.1", False),
    ],
)
def test_what_another_machine_is(here, there, stays):
    class Line:
        def getsockname(self):
            return here, 1

        def getpeername(self):
            return there, 2

    assert stays_here(Line()) is stays  # type: ignore[arg-type]


def test_only_the_newest_tls_is_spoken(server, identity, log_lines, wait_until):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", server(tls=identity.context))) as connection,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(connection)
    wait_until(log_lines, "the server says so")
    assert log_lines() == ["127.0.0.1: no TLS connection came about (unsupported protocol)"]


# ---- who says odd things


HELLO = hello()
ODD = {
    "nothing": b"",
    "a byte": HELLO[:1],
    "half a hello": HELLO[: len(HELLO) // 2],
    "a hello and nonsense": HELLO + b"\x17\x03\x03\x00\x05hello",
    "a hello of nonsense": HELLO[:9] + os.urandom(len(HELLO) - 9),
    "a record that is too long": b"\x16\x03\x01\xff\xff" + b"x" * 70_000,
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_whatever_is_said_instead_of_a_handshake_ends_that_connection_alone(server, identity, raw, clients, data):
    port = server(tls=identity.context, request_timeout_s=0.5)
    with raw(port) as odd, raw(port, secure=any_tls) as other:
        odd.send(data)
        assert clients(port, identity.pin).ask({"type": "status"})["type"] == "status"
        while odd.socket.recv(65_536):
            pass  # an alert, or the server's part of the handshake, and then the end
        assert not other.received


def test_nonsense_after_the_handshake_ends_that_connection_alone(server, identity, raw, clients, status_request):
    port = server(tls=identity.context)
    with raw(port, secure=any_tls) as client:
        client.send(status_request)
        assert client.answer()["type"] == "status"
        socket.socket.sendall(client.socket, b"\x17\x03\x03\x00\x20" + b"x" * 32)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            client.answer()
    assert clients(port, identity.pin).ask({"type": "status"})["type"] == "status"


def test_errors_reach_a_tls_client_that_is_still_sending(server, identity, raw):
    with raw(server(tls=identity.context), secure=any_tls) as client:
        client.send(b"GET / HTTP/1.1\r\n\r\n")
        assert client.answer()["code"] == "not_an_object"
        assert client.is_closed()


def test_half_open_handshakes_count_towards_the_limit_and_end_in_time(server, identity, raw, clients):
    port = server(tls=identity.context, max_connections=3, request_timeout_s=1.0)
    with ExitStack() as stack:
        half = [stack.enter_context(raw(port)) for _ in range(3)]
        for number, each in enumerate(half):
            each.send(HELLO[: 50 * number])
        with pytest.raises(ManagerUnreachable, match=f"no manager answers at 127.0.0.1:{port}"):
            clients(port, identity.pin, retries=0).ask({"type": "status"})
        assert all(each.is_closed() for each in half)
        assert clients(port, identity.pin).ask({"type": "status"})["type"] == "status"


def test_one_client_is_served_while_200_handshakes_stand_still(server, identity, raw, clients):
    port = server(tls=identity.context)
    with ExitStack() as stack:
        for number in range(200):
            stack.enter_context(raw(port)).send(HELLO[: number % len(HELLO)])
        client = clients(port, identity.pin)
        for _ in range(20):
            assert client.ask({"type": "status"})["type"] == "status"


# ---- the certificate


def test_the_certificate_is_made_once_for_its_owner_alone(tmp_path):
    path = tmp_path / "state" / "tls.pem"
    pin = ensure_identity(path).pin
    assert re.fullmatch("[0-9a-f]{64}", pin)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_identity(path).pin == pin
    assert [each.name for each in path.parent.iterdir()] == ["tls.pem"]
    assert ensure_identity(tmp_path / "other").pin != pin


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b""), "it is not a PEM file"),
        (lambda path: path.write_bytes(b"\xff" * 100), "it is not a PEM file"),
        (lambda path: path.write_bytes(b"x" * 100_000), "it is not a PEM file"),
        (lambda path: path.mkdir(), "it is not a PEM file"),
        (os.mkfifo, "it is not a PEM file"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.write_bytes(certificate_alone(path)), "it is not a PEM file"),
    ],
)
def test_what_is_no_certificate_is_refused_and_left_alone(tmp_path, make, words):
    path = tmp_path / "tls.pem"
    make(path)
    before = path.lstat()
    with pytest.raises(UsageError, match=words) as caught:
        ensure_identity(path)
    assert "delete it, start the manager again, and give the workers the new join string" in str(caught.value)
    assert path.lstat() == before


def certificate_alone(path: Path) -> bytes:
    ensure_identity(path.with_name("whole"))
    return b"-----BEGIN CERT" + path.with_name("whole").read_bytes().partition(b"-----BEGIN CERT")[2]


def test_old_clients_are_not_served_where_others_can_reach(managers):
    from fedsweep.manager import ExperimentManager

    Path("sweep.yaml").write_text("a: {combinations: [{depth: [1]}]}\n")
    with pytest.raises(UsageError, match="--allow-legacy serves clients that send no token"):
        ExperimentManager(["sweep.yaml"], host="0.0.0.0", port=0, allow_legacy=True).start()


def test_plain_text_off_loopback_is_said_aloud(managers, clients, caplog, capsys):
    manager = managers(host="0.0.0.0", insecure_plaintext=True)
    assert "NOT ENCRYPTED: whoever can read along on the network of 0.0.0.0 gets the token" in caplog.text
    assert capsys.readouterr().out == ""
    token = (manager.state_dir / "token").read_text().strip()
    assert clients(manager.port, token=token).ask({"type": "status"})["type"] == "status"
