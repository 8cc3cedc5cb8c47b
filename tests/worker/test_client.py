"""The worker's side of the protocol, against managers that answer, stall, break off, or are none."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from fedsweep.errors import ManagerUnreachable, ProtocolError
from fedsweep.manager.protocol import MAX_ERROR, TaskFailed, parse_request
from fedsweep.worker.client import (
    ManagerClient,
    TaskReply,
    notify_task_complete,
    notify_task_failed,
    release_task,
    request_task_from_manager,
    submit_result_to_manager,
)

ACK = {"type": "ack"}
TASK = {"task_id": "a_0_1", "phase": "a", "config": {"lr": 0.1}, "seed": 1, "output_dir": "out", "attempt": 5}

Behaviour = Callable[["Connection"], None]


class Connection:
    """What a scripted manager does on one connection."""

    def __init__(self, accepted: socket.socket, requests: list[dict[str, Any]]) -> None:
        self.socket = accepted
        self.requests = requests
        self.received = b""

    def read(self) -> None:
        """Read one request, which ends with a newline."""
        while b"\n" not in self.received:
            data = self.socket.recv(65_536)
            if not data:
                raise EOFError
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        self.requests.append(json.loads(line))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)


class Manager:
    """A scripted manager: each connection gets the next behaviour, and those after the last one get the last."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.behaviours = behaviours
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                accepted, _ = self.listener.accept()
                behaviour = self.behaviours[min(self.connections, len(self.behaviours) - 1)]
                self.connections += 1
                thread = threading.Thread(target=self.serve, args=(accepted, behaviour))
                self.threads.append(thread)
                thread.start()

    def serve(self, accepted: socket.socket, behaviour: Behaviour) -> None:
        accepted.settimeout(5)
        with accepted, suppress(OSError, EOFError):
            behaviour(Connection(accepted, self.requests))

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join(timeout=10)
            assert not thread.is_alive()


def answering(*answers: dict[str, Any] | bytes) -> Behaviour:
    """Answer requests with these, one after another, then close."""

    def behave(connection: Connection) -> None:
        for answer in answers:
            connection.read()
            connection.send(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")

    return behave


def always(answer: dict[str, Any]) -> Behaviour:
    return answering(*[answer] * 1000)


def hang_up(connection: Connection) -> None:
    connection.read()


class World:
    """Managers and clients of a test, and how long the clients would have slept."""

    def __init__(self) -> None:
        self.sleeps: list[float] = []
        self.managers: list[Manager] = []
        self.clients: list[ManagerClient] = []

    def manager(self, *behaviours: Behaviour) -> Manager:
        self.managers.append(Manager(*behaviours))
        return self.managers[-1]

    def client(self, port: int, token: str | None = "a token", timeout: float = 5.0, **options: Any) -> ManagerClient:
        options = {"sleep": self.sleeps.append, "jitter": lambda: 0.5, **options}
        self.clients.append(ManagerClient("127.0.0.1", port, token, timeout, **options))
        return self.clients[-1]

    def of(self, *behaviours: Behaviour, **options: Any) -> tuple[ManagerClient, Manager]:
        manager = self.manager(*behaviours)
        return self.client(manager.port, **options), manager


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for client in world.clients:
        client.close()
    for manager in world.managers:
        manager.stop()


@pytest.fixture
def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


# ---- one connection


def test_requests_share_one_connection_and_carry_the_token(world: World) -> None:
    client, manager = world.of(always(ACK))
    for number in range(5):
        assert client.ask({"type": "status", "number": number}) == ACK
    assert manager.connections == 1
    assert manager.requests == [{"type": "status", "number": number, "token": "a token"} for number in range(5)]
    assert world.sleeps == []


def test_without_a_token_none_is_sent(world: World) -> None:
    client, manager = world.of(always(ACK), token=None)
    client.ask({"type": "status"})
    assert manager.requests == [{"type": "status"}]


def test_an_answer_may_come_in_pieces(world: World) -> None:
    def slowly(connection: Connection) -> None:
        for _ in range(2):
            connection.read()
            for byte in b'{"type":"status","status":{"a":"}\\""}}\n':
                connection.send(bytes([byte]))
                time.sleep(0.0005)

    client, _ = world.of(slowly)
    for _ in range(2):
        assert client.ask({"type": "status"}) == {"type": "status", "status": {"a": '}"'}}


def test_a_large_answer_is_read_whole(world: World) -> None:
    answer = {"type": "status", "padding": "x" * 900_000}
    client, _ = world.of(always(answer))
    assert client.ask({"type": "status"}) == answer


def test_an_old_manager_answers_without_a_newline_and_closes(world: World) -> None:
    client, manager = world.of(answering(b'{"type": "ack"}'))
    for _ in range(5):
        assert client.ask({"type": "status"}) == ACK
    assert manager.connections == 5
    assert world.sleeps == []


def test_a_connection_that_ended_while_nobody_looked_is_opened_again_without_a_pause(world: World) -> None:
    client, manager = world.of(answering(ACK), always(ACK))
    assert client.ask({"type": "status"}) == ACK
    manager.threads[1].join(timeout=5)
    assert client.ask({"type": "status"}) == ACK
    assert (manager.connections, world.sleeps) == (2, [])


def test_what_nobody_asked_for_is_not_taken_for_an_answer(world: World) -> None:
    said = threading.Event()

    def talkative(connection: Connection) -> None:
        connection.read()
        connection.send(b'{"type":"ack"}\n')
        said.wait(5)
        connection.send(b'{"type":"error","code":"timeout","message":"too late"}\n')
        said.clear()
        connection.read()

    client, manager = world.of(talkative, always({"type": "ack", "status": "accepted"}))
    assert client.ask({"type": "status"}) == ACK
    said.set()
    while said.is_set():
        time.sleep(0.001)
    assert client.ask({"type": "status"}) == {"type": "ack", "status": "accepted"}
    assert manager.connections == 2


def test_a_request_that_was_interrupted_leaves_no_answer_for_the_next(world: World) -> None:
    times = iter([0.0, 0.0])

    def clock() -> float:
        value = next(times, None)
        if value is None:
            raise KeyboardInterrupt  # as a signal would, while the answer is on its way
        return value

    client, manager = world.of(answering({"type": "first"}), answering({"type": "second"}), clock=clock)
    with pytest.raises(KeyboardInterrupt):
        client.ask({"type": "status"})
    client.clock = time.monotonic
    assert client.ask({"type": "status"}) == {"type": "second"}
    assert manager.connections == 2


# ---- a manager that is away


def test_nobody_listens(world: World, closed_port: int) -> None:
    client = world.client(closed_port)
    with pytest.raises(ManagerUnreachable) as caught:
        client.ask({"type": "status"})
    assert str(caught.value) == f"no manager answers at 127.0.0.1:{closed_port} (Connection refused)"
    assert world.sleeps == pytest.approx([0.2, 0.4, 0.8])


def test_pauses_grow_to_a_limit_and_are_never_the_same_for_two_workers(world: World, closed_port: int) -> None:
    draws = iter([0.0, 0.999, 0.25, 0.5, 0.5, 0.5, 0.5])
    client = world.client(closed_port, retries=7, jitter=lambda: next(draws))
    with pytest.raises(ManagerUnreachable):
        client.ask({"type": "status"})
    # 0.2 s doubled each time and never above 5 s, times 0.5 to 1.5
    expected = [0.2 * 0.5, 0.4 * 1.499, 0.8 * 0.75, 1.6, 3.2, 5.0, 5.0]
    assert world.sleeps == pytest.approx(expected)


def test_a_manager_that_breaks_off_is_asked_again_and_given_up_after_the_retries(world: World) -> None:
    client, manager = world.of(hang_up, hang_up, always(ACK))
    assert client.ask({"type": "status"}) == ACK
    assert (manager.connections, len(world.sleeps)) == (3, 2)

    client, manager = world.of(hang_up, retries=2)
    with pytest.raises(ManagerUnreachable, match="closed the connection without an answer"):
        client.ask({"type": "status"})
    assert manager.connections == 3


def test_an_answer_that_breaks_off_is_none(world: World) -> None:
    client, manager = world.of(answering(b'{"type":"ack"'), always(ACK))
    assert client.ask({"type": "status"}) == ACK
    assert manager.connections == 2


def test_a_manager_that_says_nothing_is_given_up_in_time(world: World) -> None:
    def silent(connection: Connection) -> None:
        connection.read()
        connection.read()

    client, manager = world.of(silent, timeout=0.1, retries=1)
    with pytest.raises(ManagerUnreachable, match=r"timed out|no answer in 0\.1 s"):
        client.ask({"type": "status"})
    assert manager.connections == 2


def test_a_manager_that_never_comes_to_an_end_is_given_up_in_time(world: World) -> None:
    def trickle(connection: Connection) -> None:
        connection.read()
        connection.send(b'{"type":"')
        while True:
            connection.send(b"x")
            time.sleep(0.01)

    client, _ = world.of(trickle, timeout=0.2, retries=0)
    started_at = time.monotonic()
    with pytest.raises(ManagerUnreachable, match=r"no answer in 0\.2 s|timed out"):
        client.ask({"type": "status"})
    assert time.monotonic() - started_at < 3


NO_MANAGERS = {
    "a web server": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}",
    "an SSH server": b"SSH-2.0-OpenSSH_9.6\r\n",
    "an array": b"[1]\n",
    "NaN": b'{"type":"ack","a":NaN}\n',
    "a key twice": b'{"type":"ack","type":"task"}\n',
    "bytes": b"\x00\xff\xfe\n",
    "no end": b'{"type":"' + b"x" * 2_000_000,
    "no bottom": b'{"type":' + b"[" * 100_000,
}


@pytest.mark.parametrize("answer", NO_MANAGERS.values(), ids=NO_MANAGERS.keys())
def test_what_is_no_manager_is_unreachable_and_not_a_refusal(world: World, answer: bytes) -> None:
    """A result must not be thrown away because a stranger did not understand it."""
    client, manager = world.of(answering(answer), always(ACK))
    with pytest.raises(ManagerUnreachable, match=rf"what answers at 127\.0\.0\.1:{manager.port} is no manager"):
        client.ask({"type": "status"})
    assert (manager.connections, world.sleeps) == (1, [])
    assert client.ask({"type": "status"}) == ACK


# ---- refusals


def test_an_error_is_raised_with_its_code_and_the_connection_is_kept(world: World) -> None:
    error = {"type": "error", "code": "unknown_task", "message": "no task has this task_id"}
    client, manager = world.of(answering(error, ACK))
    with pytest.raises(ProtocolError, match="no task has this task_id") as caught:
        client.ask({"type": "status"})
    assert caught.value.code == "unknown_task"
    assert client.ask({"type": "status"}) == ACK
    assert manager.connections == 1


def test_a_request_that_was_cut_off_on_its_way_was_not_refused(world: World) -> None:
    """A spool that took this for a refusal would set the result aside."""
    error = {"type": "error", "code": "truncated", "message": "the connection ended inside a message"}
    client, manager = world.of(answering(error), always({"type": "ack", "status": "accepted"}))
    assert submit_result_to_manager(client, "a_0_1", "w", {"mean_test_acc": 0.5}) is True
    assert [each["type"] for each in manager.requests] == ["submit_result", "submit_result"]


def test_what_is_too_large_is_not_sent(world: World, closed_port: int) -> None:
    with pytest.raises(ProtocolError, match="at most 1,048,576") as caught:
        world.client(closed_port).ask({"type": "submit_result", "result_data": {"device": "x" * 2_000_000}})
    assert caught.value.code == "too_large"


# ---- asking for a task

ERROR = {"type": "error", "message": "why"}


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ({"type": "no_task", "done": True, "retry_after": 5.0}, TaskReply("done")),
        ({"type": "no_task"}, TaskReply("done")),
        ({"type": "no_task", "done": False, "retry_after": 2.5}, TaskReply("wait", retry_after=2.5)),
        ({"type": "no_task", "done": False}, TaskReply("wait", retry_after=1.0)),
        ({"type": "no_task", "done": False, "retry_after": "soon"}, TaskReply("wait", retry_after=1.0)),
        ({"type": "no_task", "done": False, "retry_after": -3}, TaskReply("wait", retry_after=1.0)),
        ({"type": "no_task", "done": False, "retry_after": 1e9}, TaskReply("wait", retry_after=60.0)),
        *(
            (
                {**ERROR, "code": code},
                TaskReply("unreachable", message="no manager has a task for us: why"),
            )
            for code in ("retry_later", "internal", "too_many_connections")
        ),
    ],
)
def test_wait_done_and_unreachable_are_three_things(world: World, answer: dict[str, Any], reply: TaskReply) -> None:
    client, _ = world.of(always(answer))
    assert request_task_from_manager(client, "w") == reply


def test_a_task_is_the_fourth(world: World) -> None:
    client, manager = world.of(always({"type": "task", "task": TASK}))
    reply = request_task_from_manager(client, "w", gpu_id=3, worker_type="gpu", device="H200")
    assert reply.kind == "task"
    assert reply.task is not None
    assert (reply.task.task_id, reply.task.attempt, reply.task.config) == ("a_0_1", 5, {"lr": 0.1})
    asked = {"type": "request_task", "worker_id": "w", "worker_type": "gpu", "gpu_id": 3, "device": "H200"}
    assert manager.requests == [{**asked, "token": "a token"}]


def test_several_tasks_of_a_cohort_can_be_asked_for(world: World) -> None:
    others = [{**TASK, "task_id": f"a_{number}_1", "cohort": "mnist|cnn"} for number in range(3)]
    client, manager = world.of(always({"type": "task", "task": others[0], "tasks": others}))
    reply = request_task_from_manager(client, "w", max_tasks=3, cohort="mnist|cnn")
    assert [task.task_id for task in reply.tasks] == ["a_0_1", "a_1_1", "a_2_1"]
    assert reply.task == reply.tasks[0]
    assert {task.cohort for task in reply.tasks} == {"mnist|cnn"}
    assert (manager.requests[0]["max_tasks"], manager.requests[0]["cohort"]) == (3, "mnist|cnn")


def test_a_manager_of_old_gives_one_task_however_many_are_asked_for(world: World) -> None:
    client, _ = world.of(always({"type": "task", "task": TASK}))
    assert [task.task_id for task in request_task_from_manager(client, "w", max_tasks=9).tasks] == ["a_0_1"]


def test_nobody_at_all_is_unreachable_with_a_reason(world: World, closed_port: int) -> None:
    reason = f"no manager answers at 127.0.0.1:{closed_port} (Connection refused)"
    assert request_task_from_manager(world.client(closed_port), "w") == TaskReply("unreachable", message=reason)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({**ERROR, "code": "unauthorized"}, "unauthorized"),
        ({"type": "ack"}, "unknown_type"),
        ({"type": "task"}, "bad_field"),
        ({"type": "task", "task": {"task_id": 5}}, "bad_field"),
        ({"type": "task", "task": TASK, "tasks": 5}, "bad_field"),
        ({"type": "task", "task": TASK, "tasks": [TASK, {"task_id": 5}]}, "bad_field"),
    ],
)
def test_a_refusal_and_an_answer_that_is_none_are_raised(world: World, answer: dict[str, Any], code: str) -> None:
    client, _ = world.of(always(answer))
    with pytest.raises(ProtocolError) as caught:
        request_task_from_manager(client, "w")
    assert caught.value.code == code


# ---- results and notices


@pytest.mark.parametrize("status", ["accepted", "duplicate"])
def test_a_result_is_delivered_when_the_manager_says_so(world: World, status: str) -> None:
    client, manager = world.of(always({"type": "ack", "status": status}))
    assert submit_result_to_manager(client, "a_0_1", "w", {"mean_test_acc": 0.5}, attempt=5) is True
    assert submit_result_to_manager(client, "a_0_1", "w", {"mean_test_acc": 0.5}) is True
    first, second = manager.requests
    assert parse_request(first).type == "submit_result"
    assert (first["attempt"], "attempt" in second) == (5, False)


@pytest.mark.parametrize("code", ["retry_later", "internal", "timeout", "too_many_connections"])
def test_a_result_that_cannot_be_stored_now_is_not_delivered(world: World, code: str) -> None:
    client, _ = world.of(always({**ERROR, "code": code}))
    assert submit_result_to_manager(client, "a_0_1", "w", {"mean_test_acc": 0.5}) is False


def test_a_result_for_a_manager_that_is_away_is_not_delivered(world: World, closed_port: int) -> None:
    assert submit_result_to_manager(world.client(closed_port), "a_0_1", "w", {"mean_test_acc": 0.5}) is False


def test_a_result_that_is_refused_for_good_raises(world: World) -> None:
    client, _ = world.of(always({**ERROR, "code": "bad_field"}))
    with pytest.raises(ProtocolError):
        submit_result_to_manager(client, "a_0_1", "w", {"mean_test_acc": 0.5})


def test_notices_say_whether_the_manager_heard(world: World, closed_port: int) -> None:
    client, manager = world.of(always(ACK))
    assert notify_task_complete(client, "a_0_1", "w", 5)
    assert notify_task_failed(client, "a_0_1", "w", "why", 5)
    assert release_task(client, "a_0_1", "w", 5)
    assert [parse_request(each).type for each in manager.requests] == ["task_complete", "task_failed", "release"]

    refused, _ = world.of(always({**ERROR, "code": "no_result"}))
    away = world.client(closed_port, retries=0)
    for deaf in (refused, away):
        assert not notify_task_complete(deaf, "a_0_1", "w")
        assert not notify_task_failed(deaf, "a_0_1", "w", "why")
        assert not release_task(deaf, "a_0_1", "w")


def test_of_a_failure_the_end_is_sent_whatever_it_holds(world: World) -> None:
    client, manager = world.of(always(ACK))
    assert notify_task_failed(client, "a_0_1", "w", "x" * 2_000_000 + "\ud800\x00 the end")
    request = parse_request(manager.requests[0])
    assert isinstance(request, TaskFailed)
    assert request.error.endswith("?\\x00 the end")
    assert len(manager.requests[0]["error"]) == MAX_ERROR
