"""Bad input on the wire of a real manager: what is answered word for word, and that nothing else comes of it.

Each case is sent to one manager that has a sweep under way. It must be answered by one error with a stable code, in
clear words; the same manager then answers a good request, and neither its ledger nor its results files have changed.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from raw_client import Client

from fedsweep.errors import ProtocolError
from fedsweep.manager import ExperimentManager
from fedsweep.manager import manager as manager_module
from fedsweep.manager.protocol import (
    ERROR_CODES,
    MAX_MESSAGE,
    MAX_REASON,
    REQUESTS,
    ResultData,
    RoundRecord,
    TaskProgress,
    parse_request,
)
from fedsweep.manager.refusal_log import refusals
from fedsweep.manager.server import serve_connection

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1]
first:
  combinations:
    - lr: [0.01, 0.02, 0.03]
"""
DONE, HELD, WAITING = "first_0_1", "first_1_1", "first_2_1"  # with a result; handed out as attempt 2; never handed out


@dataclass
class Sweep:
    """A manager that listens, and everything of it that a bad request must not change."""

    manager: ExperimentManager
    token: str

    def connect(self) -> Client:
        return Client(self.manager.port, token=self.token)

    def facts(self) -> tuple[object, ...]:
        with self.manager.lock:
            ledger = list(self.manager.sweep.ledger._db.iterdump())
            states = (self.manager.sweep.hands_out, self.manager.sweep.ending, self.manager.stops)
        return ledger, states, {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sweep"))
        Path("sweep.yaml").write_text(SWEEP)
        manager = ExperimentManager(["sweep.yaml"], port=0, stay=True)
        thread = threading.Thread(target=manager.start)
        thread.start()
        until(lambda: manager.running or not thread.is_alive(), "the manager listens")
        done, held = manager.get_next_task("w"), manager.get_next_task("w")
        assert (done["task_id"], held["task_id"], held["attempt"]) == (DONE, HELD, 2)
        manager.save_result(DONE, "w", {"mean_test_acc": 0.5}, done["attempt"])
        yield Sweep(manager, manager.sweep.token)
        while thread.is_alive():
            manager.stop()
            thread.join(0.5)


def until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.005)


def refused(
    sweep: Sweep,
    data: bytes,
    code: str,
    message: str,
    log: pytest.LogCaptureFixture,
    *,
    goes_on: bool,
    ends: bool = False,
) -> None:
    """Send the bytes; see the one error that answers them, and that nothing else has come of it."""
    log.set_level(logging.INFO)
    refusals.forget()
    before = sweep.facts()
    with sweep.connect() as connection:
        with suppress(ConnectionError):  # the server may close before all is sent
            connection.socket.sendall(data)
        if ends:
            connection.socket.shutdown(socket.SHUT_WR)
        answer = connection.answer()
        assert answer == {"type": "error", "code": code, "message": message}
        if goes_on:
            assert connection.ask(type="status")["type"] == "status"
        else:
            assert connection.is_closed()
    assert code in ERROR_CODES
    assert message.isprintable()
    assert len(message) <= MAX_REASON
    assert sweep.token not in json.dumps(answer)
    assert not [record for record in log.records if record.exc_info or record.levelno > logging.WARNING]
    assert sweep.facts() == before
    with sweep.connect() as other:
        status = other.ask(type="status")["status"]
    assert [status[name] for name in ("total", "complete", "assigned", "pending", "failed")] == [3, 1, 1, 1, 0]


# ---- bytes after which nothing can be read on

STATUS = b'{"type":"status"}'
STARTS = "expected a JSON object, which begins with {; found "
HTTP = STARTS + "an HTTP request"
NO_MARK = "expected UTF-8 without a byte-order mark"
DEEP = "a message may nest at most 32 levels"
LARGE = "a message may have at most 1,048,576 bytes"
PLAIN = "this port speaks plain text; connect without TLS"
CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(195)
PICKLE = b"\x80\x04\x95"

UNREADABLE = {
    "an array": (b"[1]", "not_an_object", STARTS + '"[1]"'),
    "an array of requests": (b'[{"type":"status"}]', "not_an_object", STARTS + r'"[{\"type\":\"status\"}]"'),
    "a string": (b'"abc"', "not_an_object", STARTS + r'"\"abc\""'),
    "a number": (b"12", "not_an_object", STARTS + '"12"'),
    "null": (b"null", "not_an_object", STARTS + '"null"'),
    "words": (b"hello\r\n", "not_an_object", STARTS + r'"hello\r\n"'),
    "a terminal's commands": (b"\x1b[2J" * 99, "not_an_object", STARTS + '"' + r"\u001b[2J" * 8 + r"\u00..."),
    "a closing brace": (b"}", "not_an_object", STARTS + '"}"'),
    "a pickle": (PICKLE, "not_an_object", STARTS + r'"\u0080\u0004\u0095"'),
    "a gzip stream": (b"\x1f\x8b\x08", "not_an_object", STARTS + r'"\u001f\u008b\b"'),
    "YAML": (b"type: status\n", "not_an_object", STARTS + r'"type: status\n"'),
    "an HTTP request": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "not_an_object", HTTP),
    "an HTTP request with a body of JSON": (b"POST /status HTTP/1.1\r\n\r\n" + STATUS, "not_an_object", HTTP),
    "an HTTP proxy request": (b"GET http://localhost/ HTTP/1.1\r\n\r\n" + STATUS, "not_an_object", HTTP),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not_an_object", HTTP),
    "an SSH client": (b"SSH-2.0-OpenSSH_9.6\r\n", "not_an_object", STARTS + r'"SSH-2.0-OpenSSH_9.6\r\n"'),
    "TLS": (CLIENT_HELLO, "tls_on_plain_port", PLAIN),
    "a byte-order mark": (b"\xef\xbb\xbf" + STATUS, "bad_encoding", NO_MARK),
    "UTF-16": (STATUS.decode().encode("utf-16"), "bad_encoding", NO_MARK),
    "UTF-16, big end first": (STATUS.decode().encode("utf-16-be"), "bad_encoding", NO_MARK),
    "UTF-32": (STATUS.decode().encode("utf-32"), "bad_encoding", NO_MARK),
    "NULs": (bytes(100), "bad_encoding", NO_MARK),
    "33 levels": (b'{"a":' + b"[" * 32 + b"]" * 32 + b"}", "too_deep", DEEP),
    "100,000 objects in one another": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too_deep", DEEP),
    "100,000 arrays without an end": (b'{"a":' + b"[" * 100_000, "too_deep", DEEP),
    "brackets that cross": (b'{"a":[1}', "bad_json", "} closes what it did not open"),
    "a byte too many": (b'{"a":"' + b"x" * (MAX_MESSAGE - 7) + b'"}', "too_large", LARGE),
    "8 MB without an end": (b'{"a":"' + b"x" * 8_000_000, "too_large", LARGE),
    "8 MB of small values": (b'{"a":[' + b"1," * 4_000_000, "too_large", LARGE),
}


@pytest.mark.parametrize(("data", "code", "message"), UNREADABLE.values(), ids=UNREADABLE.keys())
def test_bytes_that_cannot_be_read_on_get_one_error_and_the_end(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, data: bytes, code: str, message: str
) -> None:
    refused(sweep, data, code, message, caplog, goes_on=False)


@pytest.mark.parametrize("data", [b"{", b'{"type":', STATUS[:-1], b'{"a":"}', b'{"a":"\\'])
def test_a_request_that_is_cut_off_is_named_so(sweep: Sweep, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    refused(sweep, data, "truncated", "the connection ended inside a message", caplog, goes_on=False, ends=True)


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"{", STATUS[:-1], STATUS], ids=repr)
def test_silence_is_ended(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    """Also after a request without a token: only who was admitted may be silent."""
    impatient = partial(serve_connection, request_timeout_s=0.2)
    monkeypatch.setattr(manager_module, "serve_connection", impatient)
    before = sweep.facts()
    with sweep.connect() as connection:
        connection.socket.sendall(data)
        if data == STATUS:
            assert connection.answer()["code"] == "unauthorized"
        assert connection.answer() == {"type": "error", "code": "timeout", "message": "no complete request in 0.2 s"}
        assert connection.is_closed()
    assert sweep.facts() == before
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


# ---- objects that are no message: the connection goes on

TWICE = 'the key "type" stands twice'
NO_NAME = "Expecting property name enclosed in double quotes at character "
NO_COMMA = "Expecting ',' delimiter at character "
HALF = "a string has half of a surrogate pair"

NO_MESSAGE = {
    "Latin-1": ('{"a":"é"}'.encode("latin-1"), "bad_encoding", "byte 6 is not UTF-8"),
    "an overlong form": (b'{"a":"\xc0\xaf"}', "bad_encoding", "byte 6 is not UTF-8"),
    "a surrogate as bytes": (b'{"a":"\xed\xa0\x80"}', "bad_encoding", "byte 6 is not UTF-8"),
    "NUL in a string": (b'{"a":"\0"}', "bad_encoding", NO_MARK),
    "half a surrogate pair": (rb'{"a":"\ud800"}', "bad_encoding", HALF),
    "the other half": (rb'{"a":"\ude00\ud83d"}', "bad_encoding", HALF),
    "half a pair in a key": (rb'{"\udc00x":1}', "bad_encoding", HALF),
    "a control character": (b'{"a":"\x01"}', "bad_json", r'Invalid control character at character 6: "\u0001\"}"'),
    "a newline in a string": (b'{"a":"\n"}', "bad_json", r'Invalid control character at character 6: "\n\"}"'),
    "NaN": (b'{"a":NaN}', "bad_json", "NaN is not a JSON number; send null"),
    "Infinity": (b'{"a":Infinity}', "bad_json", "Infinity is not a JSON number; send null"),
    "minus Infinity": (b'{"a":-Infinity}', "bad_json", "-Infinity is not a JSON number; send null"),
    "an overflow": (b'{"a":1e999}', "bad_json", 'the number "1e999" is out of range'),
    "a huge integer": (b'{"a":1' + b"0" * 5000 + b"}", "bad_json", "a number has 5,001 digits; at most 400 are read"),
    "a huge fraction": (
        b'{"a":0.' + b"1" * 5000 + b"}",
        "bad_json",
        'the number "0.' + "1" * 74 + "... is out of range",
    ),
    "a key twice": (b'{"type":"status","a":1,"type":"stop"}', "bad_json", TWICE),
    "a key twice, spelled differently": (rb'{"type":"status","\u0074ype":"stop"}', "bad_json", TWICE),
    "a key twice, deep inside": (b'{"x":[{"a":1,"a":2}]}', "bad_json", 'the key "a" stands twice'),
    "a long key twice": (
        b'{"%b":1,"%b":2}' % (b"k" * 200, b"k" * 200),
        "bad_json",
        'the key "' + "k" * 76 + "... stands twice",
    ),
    "two commas": (b'{"a":1,,"b":2}', "bad_json", NO_NAME + r'7: ",\"b\":2}"'),
    "no comma": (b'{"a":1 "b":2}', "bad_json", NO_COMMA + r'7: "\"b\":2}"'),
    "a comment": (b'{"a":1 /* one */}', "bad_json", NO_COMMA + '7: "/* one */}"'),
    "single quotes": (b"{'a':1}", "bad_json", NO_NAME + "1: \"'a':1}\""),
    "no quotes": (b"{type: status}", "bad_json", NO_NAME + '1: "type: status}"'),
    "a hexadecimal number": (b'{"a":0x10}', "bad_json", NO_COMMA + '6: "x10}"'),
    "a leading zero": (b'{"a":01}', "bad_json", NO_COMMA + '6: "1}"'),
    "a bad escape": (b'{"a":"\\x41"}', "bad_json", r'Invalid \escape at character 6: "\\x41\"}"'),
    "no value": (b'{"a":}', "bad_json", 'Expecting value at character 5: "}"'),
    "a word": (b'{"a":undefined}', "bad_json", 'Expecting value at character 5: "undefined}"'),
}


@pytest.mark.parametrize(("data", "code", "message"), NO_MESSAGE.values(), ids=NO_MESSAGE.keys())
def test_an_object_that_is_no_message_gets_one_error_and_the_connection_goes_on(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, data: bytes, code: str, message: str
) -> None:
    refused(sweep, data, code, message, caplog, goes_on=True)


# ---- tokens


@pytest.mark.parametrize(
    "wrong",
    [
        lambda token: token[:-1],
        lambda token: token + "x",
        lambda token: token + "\0",
        lambda token: token.swapcase(),
        lambda token: "",
        lambda token: "tökén",
        lambda token: 5,
        lambda token: True,
        lambda token: [token],
        lambda token: {"token": token},
        lambda token: "x" * 1_000_000,
    ],
)
def test_a_wrong_token_is_refused_before_anything_else(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, wrong: Callable[[str], object]
) -> None:
    data = json.dumps({"type": "no such type", "token": wrong(sweep.token)}).encode()
    message = "the token is wrong; it lies in the manager's state directory"
    refused(sweep, data, "unauthorized", message, caplog, goes_on=True)


@pytest.mark.parametrize(
    "request_", [{}, {"type": "stop"}, {"type": "status", "token": None}, {"Token": "x"}], ids=repr
)
def test_an_absent_token_is_refused_before_anything_else(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, request_: dict[str, Any]
) -> None:
    message = "the token is missing; it lies in the manager's state directory"
    refused(sweep, json.dumps(request_).encode(), "unauthorized", message, caplog, goes_on=True)


# ---- messages that mean nothing

KNOWN = ", ".join(REQUESTS)
NO_TYPE = {
    "no type": ({}, f"type is null; known types: {KNOWN}"),
    "an unknown type": ({"type": "reboot"}, f'type is "reboot"; known types: {KNOWN}'),
    "a type in capitals": ({"type": "Status"}, f'type is "Status"; known types: {KNOWN}'),
    "an answer": ({"type": "ack"}, f'type is "ack"; known types: {KNOWN}'),
    "a type that is a list": ({"type": ["status"]}, f'type is ["status"]; known types: {KNOWN}'),
    "a type that is a number": ({"type": 5}, f"type is 5; known types: {KNOWN}"),
    "a type without end": ({"type": "x" * 1000}, 'type is "' + "x" * 76 + f"...; known types: {KNOWN}"),
    "a type that acts on a terminal": ({"type": "\x1b[2J"}, rf'type is "\u001b[2J"; known types: {KNOWN}'),
}
ASKS: dict[str, Any] = {"type": "request_task", "worker_id": "w"}
BRINGS: dict[str, Any] = {"type": "submit_result", "task_id": HELD, "worker_id": "w", "attempt": 2}
LIVES: dict[str, Any] = {"type": "heartbeat", "worker_id": "w"}
REQUEST_FIELDS = "type, worker_id, gpu_id, worker_type, max_tasks, cohort, device"


def result(**changes: Any) -> dict[str, Any]:
    """A result of the task that is under way, with these values."""
    return {**BRINGS, "result_data": {"mean_test_acc": 0.5, **changes}}


BAD_FIELDS = [
    ({**ASKS, "worker_id": ""}, 'worker_id is ""; expected at least 1 character'),
    ({**ASKS, "worker_id": "w" * 300}, 'worker_id is "' + "w" * 76 + "...; expected at most 256 characters"),
    ({**ASKS, "worker_id": "a\nb"}, r'worker_id is "a\nb"; it has a character that cannot be printed'),
    ({**ASKS, "worker_id": "\x1b[2J"}, r'worker_id is "\u001b[2J"; it has a character that cannot be printed'),
    ({**ASKS, "worker_id": "a\u202eb"}, r'worker_id is "a\u202eb"; it has a character that cannot be printed'),
    ({**ASKS, "max_tasks": 0}, "max_tasks is 0; expected at least 1"),
    ({**ASKS, "max_tasks": 4097}, "max_tasks is 4097; expected at most 4,096"),
    ({**ASKS, "max_tasks": True}, "max_tasks is true; expected a whole number"),
    ({**ASKS, "max_tasks": 1.0}, "max_tasks is 1.0; expected a whole number"),
    ({**ASKS, "worker_type": "tpu"}, "worker_type is \"tpu\"; expected 'gpu' or 'cpu'"),
    ({**ASKS, "gpu_id": -2}, "gpu_id is -2; expected at least -1"),
    ({**ASKS, "gpu_id": 2**31}, "gpu_id is 2147483648; expected less than 2,147,483,648"),
    ({**ASKS, "gpu_id": 10**399}, "gpu_id is 1" + "0" * 76 + "...; expected less than 2,147,483,648"),
    ({**ASKS, "cohort": ""}, 'cohort is ""; expected at least 1 character'),
    ({**ASKS, "cohort": "a\n"}, r'cohort is "a\n"; it has a character that cannot be printed'),
    (
        {**ASKS, "workerid": "w"},
        f'workerid is not a field of this message; did you mean "worker_id"? (it has {REQUEST_FIELDS})',
    ),
    ({**ASKS, "\x1b[2J": 1}, rf"\u001b[2J is not a field of this message (it has {REQUEST_FIELDS})"),
    ({"type": "status", "": 1}, '"" is not a field of this message (it has type)'),
    ({"type": "status", "x" * 500: 1}, "x" * 76 + ".. is not a field of this message (it has type)"),
    ({"type": "status", "tokn": "s3cret"}, "tokn is not a field of this message (it has type)"),
    ({**BRINGS, "result_data": {}}, "result_data.mean_test_acc is missing"),
    ({**BRINGS, "result_data": [1]}, "result_data is [1]; expected an object"),
    ({**result(), "attempt": -1}, "attempt is -1; expected at least 0"),
    ({**result(), "attempt": 2**63}, "attempt is 9223372036854775808; expected less than 9,223,372,036,854,775,808"),
    (result(mean_test_acc=1.5), "result_data.mean_test_acc is 1.5; expected at most 1"),
    (result(mean_test_acc=-0.1), "result_data.mean_test_acc is -0.1; expected at least 0"),
    (result(mean_test_acc="0.5"), 'result_data.mean_test_acc is "0.5"; expected a number'),
    (result(mean_test_acc=True), "result_data.mean_test_acc is true; expected a number"),
    (result(mean_test_acc=None), 'result_data.mean_test_acc is null; only a result with outcome "diverged" has none'),
    (result(std_test_acc=-1.0), "result_data.std_test_acc is -1.0; expected at least 0"),
    (result(wall_time_s=-1), "result_data.wall_time_s is -1; expected at least 0"),
    (result(outcome="fine"), "result_data.outcome is \"fine\"; expected 'ok' or 'diverged'"),
    (result(best_epoch=1.5), "result_data.best_epoch is 1.5; expected a whole number"),
    (result(device="=cmd\x00"), r'result_data.device is "=cmd\u0000"; it has a character that cannot be printed'),
    (result(per_class_test_acc=[0.5, 2]), "result_data.per_class_test_acc.1 is 2; expected at most 1"),
    (result(history=[{"val_acc": 0.5}]), "result_data.history.0.round is missing"),
    (result(history=[{"round": 1}, {"round": -1}]), "result_data.history.1.round is -1; expected at least 0"),
    (result(history=[{"round": 1, "val_acc": 9}]), "result_data.history.0.val_acc is 9; expected at most 1"),
    ({**LIVES, "tasks": [{}]}, "tasks.0.task_id is missing"),
    ({**LIVES, "tasks": [7]}, "tasks.0 is 7; expected an object"),
    ({**LIVES, "tasks": [{"task_id": HELD, "speed": 1}]}, "tasks.0.speed is not a field here"),
    ({**LIVES, "tasks": [{"task_id": HELD, "val_acc": 2}]}, "tasks.0.val_acc is 2; expected at most 1"),
    (
        {**LIVES, "tasks": [{"task_id": "t"}] * 4097},
        'tasks is [{"task_id": "t"}, {"task_id": "t"}, {"task_id": "t"}, {"task_id": "t"}, {"ta...; '
        "expected at most 4,096 items, found more",
    ),
    ({"type": "cancel", "names": []}, "names is []; expected at least 1 item"),
    ({"type": "cancel", "names": [""]}, 'names.0 is ""; expected at least 1 character'),
    ({"type": "retry", "names": ["a", 1]}, "names.1 is 1; expected a string"),
]
A_LIST, TEXT, WHOLE, NUMBER = "a list", "a string", "a whole number", "a number"
# What every field of every message takes.
TAKES = {
    **dict.fromkeys(("worker_id", "task_id", "cohort", "device", "error", "exception", "message", "frame"), TEXT),
    **dict.fromkeys(("host", "plan", "worker", "fedsweep_version", "torch_version", "finished_at", "token"), TEXT),
    **dict.fromkeys(("gpu_id", "max_tasks", "attempt", "round", "rounds", "best_epoch", "num_parameters"), WHOLE),
    **dict.fromkeys(("rounds_run", "nonfinite_clients", "poisoned_clients", "poisoned_samples"), WHOLE),
    **dict.fromkeys(("val_loss", "val_acc", "wall_time_s", "attack_success_rate"), NUMBER),
    **{f"{kind}_{metric}": NUMBER for kind in ("mean", "std") for metric in ("test_acc", "test_loss")},
    **{f"{kind}_{metric}": NUMBER for kind in ("mean", "std") for metric in ("val_acc", "val_loss")},
    **dict.fromkeys(("names", "tasks", "history", "per_class_test_acc"), A_LIST),
    "result_data": "an object",
    "worker_type": "'gpu' or 'cpu'",
    "outcome": "'ok' or 'diverged'",
    "earlier": "true or false",
}
SUFFICIENT: dict[str, dict[str, Any]] = {  # each request with what it must have, and nothing else
    **{kind: {} for kind in ("status", "failures", "retry", "drain", "stop")},
    **{kind: {"task_id": HELD, "worker_id": "w"} for kind in ("task_complete", "release")},
    "request_task": {"worker_id": "w"},
    "submit_result": {"task_id": HELD, "worker_id": "w", "result_data": {"mean_test_acc": 0.5}},
    "task_failed": {"task_id": HELD, "worker_id": "w", "error": "ValueError: no"},
    "heartbeat": {"worker_id": "w"},
    "leave": {"worker_id": "w"},
    "show_task": {"task_id": HELD},
    "cancel": {"names": [HELD]},
}


def of_wrong_type() -> Iterator[tuple[dict[str, Any], str]]:
    """Every field of every message with a value of another type."""
    for kind, model in REQUESTS.items():
        for name in model.model_fields.keys() - {"type", "token"}:
            value: object = 5 if TAKES[name] == "an object" else {"a": 1}
            yield (
                {"type": kind, **SUFFICIENT[kind], name: value},
                f"{name} is {json.dumps(value)}; expected {TAKES[name]}",
            )
    for name in ResultData.model_fields.keys() - {"mean_test_acc"}:
        yield result(**{name: {"a": 1}}), f'result_data.{name} is {{"a": 1}}; expected {TAKES[name]}'
    for name in RoundRecord.model_fields:
        one = {"round": 1, name: []}
        yield result(history=[one]), f"result_data.history.0.{name} is []; expected {TAKES[name]}"
    for name in TaskProgress.model_fields:
        held = {"task_id": HELD, name: []}
        yield {**LIVES, "tasks": [held]}, f"tasks.0.{name} is []; expected {TAKES[name]}"


MISSING = [
    ({"type": kind, **{other: value for other, value in fields.items() if other != name}}, f"{name} is missing")
    for kind, fields in SUFFICIENT.items()
    for name in fields
]
EXTRA = [
    ({"type": kind, **fields, "extra": 1}, f"extra is not a field of this message (it has {', '.join(known)})")
    for kind, fields in SUFFICIENT.items()
    for known in [[name for name in REQUESTS[kind].model_fields if name != "token"]]
]


@pytest.mark.parametrize(("message", "words"), NO_TYPE.values(), ids=NO_TYPE.keys())
def test_an_unknown_type_lists_the_known_ones(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, message: dict[str, Any], words: str
) -> None:
    data = json.dumps({**message, "token": sweep.token}).encode()
    refused(sweep, data, "unknown_type", words, caplog, goes_on=True)


@pytest.mark.parametrize(("message", "words"), [*BAD_FIELDS, *sorted(of_wrong_type(), key=repr), *MISSING, *EXTRA])
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, message: dict[str, Any], words: str
) -> None:
    data = json.dumps({**message, "token": sweep.token}).encode()
    refused(sweep, data, "bad_field", f"{message['type']}: {words}", caplog, goes_on=True)


def test_a_token_that_is_no_string_is_not_shown() -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_request({"type": "status", "token": 5})
    assert str(caught.value) == "status: token is not shown; expected a string"


# ---- messages that do not fit the sweep

UNFITTING = [
    ({"type": "show_task", "task_id": "nobody"}, "unknown_task", "no task has the id 'nobody'"),
    ({"type": "show_task", "task_id": "x" * 256}, "unknown_task", f"no task has the id '{'x' * 80}'"),
    (
        {"type": "show_task", "task_id": "'; DROP TABLE tasks"},
        "unknown_task",
        'no task has the id "\'; DROP TABLE tasks"',
    ),
    ({**result(), "task_id": "first_9_1"}, "unknown_task", "no task has the id 'first_9_1'"),
    ({"type": "task_failed", "task_id": "t", "worker_id": "w", "error": ""}, "unknown_task", "no task has the id 't'"),
    ({"type": "task_complete", "task_id": "t", "worker_id": "w"}, "unknown_task", "no task has the id 't'"),
    ({"type": "release", "task_id": "t", "worker_id": "w"}, "unknown_task", "no task has the id 't'"),
    ({**result(), "task_id": WAITING, "attempt": None}, "unknown_attempt", f"task '{WAITING}' was never handed out"),
    ({**result(), "task_id": WAITING, "attempt": 2}, "unknown_attempt", f"task '{WAITING}' has no attempt 2"),
    ({**result(), "attempt": 1}, "unknown_attempt", f"task '{HELD}' has no attempt 1"),
    ({**result(), "attempt": 2**63 - 1}, "unknown_attempt", f"task '{HELD}' has no attempt {2**63 - 1}"),
    (
        {"type": "task_complete", "task_id": HELD, "worker_id": "w", "attempt": 2},
        "no_result",
        f"task '{HELD}' has no result here; send submit_result first",
    ),
    (
        {"type": "cancel", "names": ["first_1_11"]},
        "unknown_name",
        f"'first_1_11' is no task, no phase and no group of failures; did you mean '{HELD}'?",
    ),
    (
        {"type": "cancel", "names": [HELD, "x" * 256]},
        "unknown_name",
        f"'{'x' * 80}' is no task, no phase and no group of failures; `fedsweep failures` names the groups",
    ),
    (
        {"type": "retry", "names": ["zzz"]},
        "unknown_name",
        "'zzz' is no task, no phase and no group of failures; `fedsweep failures` names the groups",
    ),
]


@pytest.mark.parametrize(("message", "code", "words"), UNFITTING)
def test_what_does_not_fit_the_sweep_is_refused_and_changes_nothing(
    sweep: Sweep, caplog: pytest.LogCaptureFixture, message: dict[str, Any], code: str, words: str
) -> None:
    refused(sweep, json.dumps({**message, "token": sweep.token}).encode(), code, words, caplog, goes_on=True)


@pytest.mark.parametrize("kind", ["task_failed", "release", "heartbeat"])
@pytest.mark.parametrize("claim", [(HELD, "v", None), (HELD, "w", 1), (WAITING, "w", None), (DONE, "w", 1)], ids=repr)
def test_a_claim_to_what_one_does_not_hold_is_answered_by_drop_and_changes_nothing(
    sweep: Sweep, kind: str, claim: tuple[str, str, int | None]
) -> None:
    task_id, worker_id, attempt = claim
    before = sweep.facts()
    fields: dict[str, Any] = {"task_id": task_id, "attempt": attempt}
    fields = {"tasks": [fields]} if kind == "heartbeat" else fields
    fields |= {"error": "ValueError: no"} if kind == "task_failed" else {}
    with sweep.connect() as connection:
        assert connection.ask(type=kind, worker_id=worker_id, **fields) == {"type": "ack", "drop": [task_id]}
    assert sweep.facts() == before


# ---- several at once


def test_of_two_objects_each_is_answered_for_itself(sweep: Sweep) -> None:
    before = sweep.facts()
    good = json.dumps({"type": "status", "token": sweep.token}).encode()
    with sweep.connect() as connection:
        connection.socket.sendall(good + b'{"a":NaN}' + STATUS + good + b'[{"type":"stop"}]' + good)
        answers = [connection.answer() for _ in range(5)]
        assert connection.is_closed()
    assert [answer.get("code", answer["type"]) for answer in answers] == [
        *("status", "bad_json", "unauthorized", "status", "not_an_object")
    ]
    assert sweep.facts() == before


def test_in_utf_16_without_a_mark_neither_the_object_nor_what_follows_can_be_read(sweep: Sweep) -> None:
    with sweep.connect() as connection:
        connection.socket.sendall(STATUS.decode().encode("utf-16-le"))
        for _ in range(2):
            assert connection.answer() == {"type": "error", "code": "bad_encoding", "message": NO_MARK}
        assert connection.is_closed()


def test_every_code_for_what_a_client_sends_is_met_here() -> None:
    met = {code for _, code, _ in (*UNREADABLE.values(), *NO_MESSAGE.values(), *UNFITTING)}
    met |= {"truncated", "timeout", "unauthorized", "unknown_type", "bad_field"}
    elsewhere = {"plain_on_tls_port", "too_many_connections", "retry_later", "internal"}
    assert met | elsewhere == set(ERROR_CODES)
    assert not met & elsewhere
