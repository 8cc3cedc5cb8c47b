"""Frames, strict JSON, and messages: what is read. With which words the rest is refused: `test_bad_requests.py`."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fedsweep.errors import ProtocolError
from fedsweep.manager.protocol import (
    ERROR_CODES,
    MAX_DEPTH,
    MAX_ERROR,
    MAX_MESSAGE,
    PROVENANCE_FIELDS,
    REQUESTS,
    SCIENCE_FIELDS,
    FrameReader,
    ResultData,
    TaskFailed,
    TaskMessage,
    decode,
    encode,
    error_message,
    parse_request,
    shown,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=5)


def read(pieces: list[bytes], **limits: int) -> tuple[list[bytes], str | None]:
    """What a reader makes of a stream in these pieces: the objects, and the code of the error that ended it."""
    reader, found = FrameReader(**limits), []
    try:
        for piece in pieces:
            for frame in reader.feed(piece):
                found.append(frame.raw)
    except ProtocolError as error:
        return found, error.code
    return found, None


def refusal(raw: bytes) -> ProtocolError:
    """The error with which the bytes are refused, as a frame or as JSON."""
    with pytest.raises(ProtocolError) as caught:
        for frame in FrameReader().feed(raw):
            decode(frame.raw)
    assert caught.value.code in ERROR_CODES
    return caught.value


# ---- frames


@pytest.mark.parametrize(
    ("stream", "objects"),
    [
        (b'{"a":1}', [b'{"a":1}']),
        (b' \r\n\t{"a":1}\r\n\n', [b'{"a":1}']),
        (b'{"a":"}{"}{"b":"\\"}"}\n{"c":["["]}', [b'{"a":"}{"}', b'{"b":"\\"}"}', b'{"c":["["]}']),
        (b'{"a":"\\\\\\""} {"b":"\\u007d"}', [b'{"a":"\\\\\\""}', b'{"b":"\\u007d"}']),
        ('{"a":"Ω{é"}'.encode(), ['{"a":"Ω{é"}'.encode()]),
    ],
)
def test_an_object_is_complete_when_its_braces_close_however_it_is_cut(stream: bytes, objects: list[bytes]) -> None:
    for cut in range(len(stream) + 1):
        assert read([stream[:cut], stream[cut:]]) == (objects, None)
    assert read([stream[at : at + 1] for at in range(len(stream))]) == (objects, None)


def test_an_object_is_given_out_with_its_last_byte_and_not_before() -> None:
    reader, raw = FrameReader(), b'{"a":[{"b":"}"}]}'
    for at in range(len(raw) - 1):
        assert not list(reader.feed(raw[at : at + 1]))
        assert reader.is_inside
    [frame] = reader.feed(raw[-1:])
    assert frame.raw == raw
    assert not reader.is_inside


@pytest.mark.parametrize(("after", "newline"), [(b"", False), (b"\n", True), (b"\r\n", True), (b" {}", False)])
def test_a_frame_says_whether_a_newline_followed(after: bytes, newline: bool) -> None:
    assert next(FrameReader().feed(b'{"a":1}' + after)).newline is newline


STREAMS = st.lists(
    st.one_of(
        OBJECTS.map(lambda message: json.dumps(message).encode()),
        OBJECTS.map(lambda message: json.dumps(message, ensure_ascii=False, indent=1).encode("utf-8")),
        st.sampled_from([b"\n", b" ", b"\r\n", b"", b"GET / HTTP/1.1", b"[1]", b"\x16\x03", b"\xef\xbb\xbf"]),
        st.text(alphabet='{}[]"\\ ,:a\n', max_size=12).map(str.encode),
    ),
    max_size=5,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(stream=STREAMS, data=st.data())
@example(stream=b'{"a":"\\\\"}{"b":1}', data=None)
def test_cuttings_make_no_difference(stream: bytes, data: Any) -> None:
    cuts = (
        range(len(stream) + 1) if data is None else sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    )
    edges = [0, *cuts, len(stream)]
    pieces = [stream[start:end] for start, end in pairwise(edges)]
    assert read(pieces) == read([stream])


@settings(deadline=None)
@given(messages=st.lists(OBJECTS, max_size=4))
def test_what_is_encoded_is_decoded_the_same(messages: list[dict[str, Any]]) -> None:
    stream = b"".join(encode(message) for message in messages)
    assert stream.count(b"\n") == len(messages)
    frames = list(FrameReader().feed(stream))
    assert [decode(frame.raw) for frame in frames] == messages
    assert all(frame.newline for frame in frames)


@pytest.mark.timeout(30)  # a reader that begins again with each piece would take many minutes
@pytest.mark.parametrize(
    ("stream", "count"),
    [
        (b'{"a":"' + b"x" * 250_000 + b'"}', 1),
        (b'{"a":"' + b"\\\\" * 125_000 + b'"}', 1),
        (b'{"a":[' + b"[],{}," * 40_000 + b"1]}", 1),
        (b" " * 250_000 + b"{}", 1),
    ],
)
def test_one_byte_at_a_time_takes_time_in_proportion(stream: bytes, count: int) -> None:
    found, error = read([stream[at : at + 1] for at in range(len(stream))])
    assert (len(found), error) == (count, None)


@pytest.mark.timeout(30)
def test_many_small_objects_at_once_take_time_in_proportion() -> None:
    found, error = read([b"{}" * 300_000])
    assert (len(found), error) == (300_000, None)


def test_a_message_may_have_max_message_bytes_and_no_more() -> None:
    fits = b'{"a":"' + b"x" * (MAX_MESSAGE - 8) + b'"}'
    assert len(fits) == MAX_MESSAGE
    assert read([fits]) == ([fits], None)
    assert read([fits[:-2] + b"xx", b'"}']) == ([], "too_large")
    assert read([fits[:-2] + b'x"}']) == ([], "too_large")
    assert read([fits, fits]) == ([fits, fits], None)  # the limit is for one message


def test_a_message_without_end_is_refused_once_it_is_too_large() -> None:
    reader = FrameReader(max_message=1000)
    with pytest.raises(ProtocolError, match="at most 1,000 bytes"):
        for _ in range(10_000):
            list(reader.feed(b'{"a":"' if not reader.is_inside else b"x" * 100))
    assert len(reader.buffer) < 1200


def test_a_message_may_nest_max_depth_levels_and_no_more() -> None:
    deepest = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
    assert read([deepest]) == ([deepest], None)
    assert refusal(b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}").code == "too_deep"
    assert read([b'{"a":' * 100_000]) == ([], "too_deep")


def test_objects_before_the_error_are_given_out() -> None:
    assert read([b'{"a":1}\n{"b":2}GET / HTTP/1.1\r\n']) == ([b'{"a":1}', b'{"b":2}'], "not_an_object")


def test_an_http_request_is_refused_at_its_first_bytes_also_where_its_body_is_json() -> None:
    request = b'POST /status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n{"type":"status"}'
    assert read([request]) == ([], "not_an_object")
    assert read([request[:1]]) == ([], "not_an_object")
    assert str(refusal(request)) == "expected a JSON object, which begins with {; found an HTTP request"


# ---- JSON


@pytest.mark.timeout(30)
def test_a_key_twice_among_very_many_is_found_in_time() -> None:
    keys = ",".join(f'"{number}":1' for number in range(60_000))
    assert "stands twice" in str(refusal(f'{{{keys},"59999":1}}'.encode()))


def test_numbers_are_read_exactly() -> None:
    value = 0.1 + 0.2
    assert decode(encode({"a": value}))["a"] == value
    assert decode(b'{"a":9007199254740993}')["a"] == 2**53 + 1
    assert decode(b'{"a":1' + b"0" * 399 + b"}")["a"] == 10**399


def test_a_number_that_json_does_not_have_is_never_sent() -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            encode({"a": value})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\n\x1b[31mb", '"a\\n\\u001b[31mb"'),
        ("x" * 200, '"' + "x" * 76 + "..."),
        (10**399, "1" + "0" * 76 + "..."),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ("\ud800", '"\\ud800"'),
    ],
)
def test_a_value_is_shown_escaped_and_cut(value: object, text: str) -> None:
    assert shown(value) == text
    assert len(shown(value)) <= 80


# ---- messages


def test_a_result_may_be_as_short_as_old_clients_send_it_and_may_echo_parameters() -> None:
    result = ResultData.model_validate({"mean_test_acc": 1, "phase": "a", "alpha": 0.1, "unheard_of": [1]})
    assert result.mean_test_acc == 1.0
    assert (result.outcome, result.std_test_acc, result.history) == ("ok", 0.0, ())
    assert result.model_dump(exclude_unset=True) == {"mean_test_acc": 1.0}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (model, name)
        for model in (*REQUESTS.values(), ResultData)
        for name, field in model.model_fields.items()
        if "tuple" in str(field.annotation)
    ],
)
def test_of_a_list_of_wrong_values_the_first_is_looked_at(model: type[BaseModel], name: str) -> None:
    """A message of 1 MB has room for half a million of them, and to note each would hold up everybody else."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate({name: [{}, {}, {}]})
    places = {problem["loc"][:2] for problem in caught.value.errors()}
    assert {place for place in places if place[0] == name and len(place) > 1} == {(name, 0)}


def test_a_diverged_result_has_no_accuracy() -> None:
    diverged = {"outcome": "diverged", "mean_test_acc": None, "history": [{"round": 1, "val_loss": None}]}
    assert ResultData.model_validate(diverged).mean_test_acc is None


def test_every_field_of_a_result_is_of_science_or_of_provenance() -> None:
    assert {*SCIENCE_FIELDS, *PROVENANCE_FIELDS} == set(ResultData.model_fields)
    assert not set(SCIENCE_FIELDS) & set(PROVENANCE_FIELDS)


def test_of_an_error_the_end_is_kept_and_does_nothing_to_a_terminal() -> None:
    message = {"type": "task_failed", "task_id": "t", "worker_id": "w", "error": "x" * 100_000 + "\x1b[2J\ttail\n"}
    request = parse_request(message)
    assert isinstance(request, TaskFailed)
    assert request.error.endswith("x\\x1b[2J\ttail\n")
    assert len(request.error) <= MAX_ERROR + 3


def test_a_token_stands_in_no_representation() -> None:
    assert "secret" not in repr(parse_request({"type": "status", "token": "secret"}))


# ---- the documentation


def examples() -> list[dict[str, Any]]:
    """The JSON blocks of docs/protocol.md, one object each."""
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)]


def test_the_error_codes_are_documented_word_for_word() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([A-Z].*\.) \|$", DOCS.read_text("utf-8"), re.MULTILINE))
    assert rows == ERROR_CODES


def test_every_documented_request_is_accepted_and_every_type_is_documented() -> None:
    requests = [message for message in examples() if message["type"] in REQUESTS and "status" not in message]
    assert {message["type"] for message in requests} == set(REQUESTS)
    for message in requests:
        assert parse_request(decode(encode(message))).type == message["type"]


def test_every_documented_answer_is_a_message() -> None:
    answers = {message["type"]: message for message in examples() if message["type"] not in ("heartbeat",)}
    assert {"task", "no_task", "ack", "status", "error"} <= set(answers)
    assert TaskMessage.model_validate(answers["task"]["task"]).attempt is not None
    error = answers["error"]
    assert error == error_message(error["code"], error["message"])
    assert error["code"] in ERROR_CODES


def test_every_field_of_a_message_is_documented() -> None:
    text = DOCS.read_text("utf-8")
    models = [*REQUESTS.values(), ResultData, TaskMessage]
    missing = {name for model in models for name in model.model_fields if f"`{name}`" not in text}
    assert not missing
