"""Messages between manager and workers: bytes in, bytes out, no sockets. docs/protocol.md describes them.

One connection carries JSON objects one after another. A newline ends an object of ours; old clients send none, so an
object counts as complete when its braces close.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, AllowInfNan, BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from fedsweep.errors import ProtocolError

MAX_MESSAGE = 1024 * 1024  # bytes
MAX_DEPTH = 32
MAX_CONNECTIONS = 2048
REQUEST_TIMEOUT_S = 10.0
LEGACY_ANSWER = 8192  # bytes that an old client reads of an answer
LEGACY_ACK = 1024
SHOWN = 80  # characters of a wrong value that a message repeats
MAX_DIGITS = 400  # of one number

ERROR_CODES = {
    "not_an_object": "The bytes are not a JSON object.",
    "tls_on_plain_port": "A TLS handshake arrived, but this port speaks plain text.",
    "too_large": "The message has more than 1,048,576 bytes.",
    "too_deep": "The message nests more than 32 levels.",
    "bad_encoding": "The message is not UTF-8 without a byte-order mark.",
    "bad_json": "The message is not strict JSON: no NaN, no key twice, no number of more than 400 digits.",
    "timeout": "The request was not complete 10 seconds after its first byte.",
    "unknown_type": "No message has this type.",
    "bad_field": "A field is missing, unknown or of a wrong type or range; the message names it.",
    "unauthorized": "The token is missing or wrong.",
    "unknown_task": "No task has this task_id.",
    "unknown_attempt": "The task was never handed out so.",
    "no_result": "The task is said to be complete, but its result is not here.",
    "retry_later": "The manager cannot store anything at present; keep the result and try again.",
    "too_many_connections": "The manager serves 2,048 connections already.",
    "internal": "The manager failed on this request; its log has the reason.",
}

FIRST_TLS_BYTE = 0x16
_STRUCTURAL = re.compile(rb'["\\{}\[\]]')
_IN_STRING = re.compile(rb'["\\]')
_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class Frame:
    """One complete JSON object as it came over the wire."""

    raw: bytes
    newline: bool  # whether a newline followed at once, as our own clients send


class FrameReader:
    """Cuts a stream of bytes, in whatever pieces it arrives, into JSON objects. Every byte is looked at once."""

    def __init__(self, max_message: int = MAX_MESSAGE, max_depth: int = MAX_DEPTH) -> None:
        self.max_message = max_message
        self.max_depth = max_depth
        self.buffer = bytearray()
        self.position = 0  # up to here the buffer has been scanned
        self.depth = 0
        self.in_string = False

    @property
    def is_inside(self) -> bool:
        """Whether an object has begun and not ended."""
        return bool(self.buffer)

    def feed(self, data: bytes) -> list[Frame]:
        """Take in bytes; the objects that they complete.

        Raises:
            ProtocolError: what came is no JSON object, or exceeds a limit. The stream cannot be read on.
        """
        self.buffer += data
        frames = []
        while (frame := self._next()) is not None:
            frames.append(frame)
        return frames

    def _next(self) -> Frame | None:
        if self.position == 0:
            stripped = self.buffer.lstrip(_SPACE)
            del self.buffer[: len(self.buffer) - len(stripped)]
            if not self.buffer:
                return None
            self._check_start()
        end = self._scan()
        if (end or len(self.buffer)) > self.max_message:
            raise ProtocolError("too_large", f"a message may have at most {self.max_message:,} bytes")
        if end is None:
            return None
        raw = bytes(self.buffer[:end])
        newline = self.buffer[end : end + 1] == b"\n" or self.buffer[end : end + 2] == b"\r\n"
        del self.buffer[:end]
        self.position = 0
        return Frame(raw, newline)

    def _check_start(self) -> None:
        if self.buffer[0] == FIRST_TLS_BYTE:
            raise ProtocolError("tls_on_plain_port", "this port speaks plain text; connect without TLS")
        if self.buffer[:3] == b"\xef\xbb\xbf":
            raise ProtocolError("bad_encoding", "the message begins with a byte-order mark; send UTF-8 without one")
        if self.buffer[:1] != b"{":
            start = shown(bytes(self.buffer[:SHOWN]).decode("latin-1"))
            raise ProtocolError("not_an_object", f"expected a JSON object, which begins with {{; found {start}")

    def _scan(self) -> int | None:
        """Go on from where the last scan ended; the end of the object, or None where it is not complete."""
        while True:
            match = (_IN_STRING if self.in_string else _STRUCTURAL).search(self.buffer, self.position)
            if match is None:
                self.position = len(self.buffer)
                return None
            byte, self.position = match.group(), match.end()
            if byte == b"\\":
                if self.position == len(self.buffer):  # what it escapes has not arrived
                    self.position -= 1
                    return None
                self.position += 1
            elif byte == b'"':
                self.in_string = not self.in_string
            elif byte in b"{[":
                self.depth += 1
                if self.depth > self.max_depth:
                    raise ProtocolError("too_deep", f"a message may nest at most {self.max_depth} levels")
            else:
                self.depth -= 1
                if self.depth == 0:
                    return self.position


def shown(value: object) -> str:
    """A value for an error message: as JSON in ASCII, cut at 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except ValueError:
        text = json.dumps(str(value))
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def decode(raw: bytes) -> dict[str, Any]:
    """The object in `raw`, read strictly.

    Raises:
        ProtocolError: not UTF-8, not JSON, not an object, a key twice, NaN or Infinity, a number out of all bounds.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError("bad_encoding", f"byte {error.start} is not UTF-8") from None
    try:
        message = json.loads(
            text, object_pairs_hook=_without_repeats, parse_constant=_no_constant, parse_int=_int, parse_float=_float
        )
        json.dumps(message, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ProtocolError("bad_encoding", "a string has half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise ProtocolError("bad_json", f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ProtocolError("too_deep", f"a message may nest at most {MAX_DEPTH} levels") from None
    if not isinstance(message, dict):
        raise ProtocolError("not_an_object", f"expected a JSON object; found {shown(message)}")
    return message


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ProtocolError("bad_json", f"the key {shown(repeated)} stands twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ProtocolError("bad_json", f"{name} is not a JSON number; send null")


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ProtocolError("bad_json", f"a number has {len(digits):,} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if len(digits) > MAX_DIGITS or not math.isfinite(value):
        raise ProtocolError("bad_json", f"the number {shown(digits)} is out of range")
    return value


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as one line of JSON. A number that is not finite raises ValueError: JSON has none."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


# ---- messages

Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, AllowInfNan(False)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]


def _printable(text: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text):
        raise ValueError("has a control character")
    return text


Id = Annotated[Name, AfterValidator(_printable)]


class RoundRecord(BaseModel):
    """One round in the history of an experiment; a loss that is not finite is null."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    round: Count
    val_loss: Finite | None = None
    val_acc: Share | None = None
    nonfinite_clients: Count = 0


class ResultData(BaseModel):
    """What a finished experiment brings. Old clients send the metrics only, and echo parameters, which are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    outcome: Literal["ok", "diverged"] = "ok"
    mean_test_acc: Share | None
    std_test_acc: Finite | None = 0.0
    mean_test_loss: Finite | None = None
    std_test_loss: Finite | None = 0.0
    mean_val_acc: Share | None = None
    std_val_acc: Finite | None = 0.0
    mean_val_loss: Finite | None = None
    std_val_loss: Finite | None = 0.0
    num_parameters: Count | None = None
    best_epoch: Count | None = None
    attack_success_rate: Share | None = None
    poisoned_clients: Count | None = None
    poisoned_samples: Count | None = None
    nonfinite_clients: Count | None = None
    rounds_run: Count | None = None
    wall_time_s: Annotated[Finite, Field(ge=0)] | None = None
    device: Name | None = None
    worker: Name | None = None
    fedsweep_version: Name | None = None
    torch_version: Name | None = None
    finished_at: Name | None = None
    history: tuple[RoundRecord, ...] = ()
    per_class_test_acc: tuple[Share | None, ...] | None = None


PROVENANCE_FIELDS = ("wall_time_s", "device", "worker", "fedsweep_version", "torch_version", "finished_at")
SCIENCE_FIELDS = tuple(name for name in ResultData.model_fields if name not in PROVENANCE_FIELDS)


class TaskMessage(BaseModel):
    """A task as a worker gets it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task_id: str
    phase: str
    config: dict[str, Any]
    seed: int
    output_dir: str
    output_dirs: tuple[str, ...] = ()
    signature: str | None = None
    attempt: int | None = None
    retry_count: int = 0
    lease_s: float | None = None
    heartbeat_s: float = 10.0
    status: str = "assigned"
    assigned_to: str | None = None
    assigned_at: str | None = None


class _Request(BaseModel):
    """What every request may carry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: StrictStr | None = Field(default=None, repr=False)


class RequestTask(_Request):
    """A worker asks for work."""

    type: Literal["request_task"]
    worker_id: Id
    gpu_id: StrictInt | None = None
    worker_type: Literal["gpu", "cpu"] | None = None
    max_tasks: Annotated[StrictInt, Field(ge=1, le=4096)] = 1
    device: Id | None = None


class SubmitResult(_Request):
    """A worker brings a result."""

    type: Literal["submit_result"]
    task_id: Id
    worker_id: Id
    result_data: ResultData
    attempt: Count | None = None


class TaskComplete(_Request):
    """A worker asks whether the result of a task is safe."""

    type: Literal["task_complete"]
    task_id: Id
    worker_id: Id
    attempt: Count | None = None


class TaskFailed(_Request):
    """A worker could not run a task."""

    type: Literal["task_failed"]
    task_id: Id
    worker_id: Id
    error: Annotated[StrictStr, Field(max_length=65_536)]
    attempt: Count | None = None


class Release(_Request):
    """A worker gives a task back without blame."""

    type: Literal["release"]
    task_id: Id
    worker_id: Id
    attempt: Count | None = None


class Status(_Request):
    """Somebody asks how the sweep is getting on."""

    type: Literal["status"]


class TaskProgress(BaseModel):
    """A task that a worker holds, and how far it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task_id: Id
    attempt: Count | None = None
    round: Count | None = None
    rounds: Count | None = None
    val_loss: Finite | None = None
    val_acc: Share | None = None


class Heartbeat(_Request):
    """A worker says that it lives, and what it holds."""

    type: Literal["heartbeat"]
    worker_id: Id
    device: Id | None = None
    tasks: Annotated[tuple[TaskProgress, ...], Field(max_length=4096)] = ()


Request = RequestTask | SubmitResult | TaskComplete | TaskFailed | Release | Status | Heartbeat

REQUESTS: dict[str, type[Request]] = {
    "request_task": RequestTask,
    "submit_result": SubmitResult,
    "task_complete": TaskComplete,
    "task_failed": TaskFailed,
    "release": Release,
    "status": Status,
    "heartbeat": Heartbeat,
}


def parse_request(message: Mapping[str, Any]) -> Request:
    """The request that a decoded message is.

    Raises:
        ProtocolError: `unknown_type`, or `bad_field` with the field, the value and what is allowed.
    """
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in REQUESTS:
        raise ProtocolError("unknown_type", f"type is {shown(kind)}; known types: {', '.join(REQUESTS)}")
    try:
        return REQUESTS[kind].model_validate(message)
    except ValidationError as error:
        raise ProtocolError("bad_field", f"{kind}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{path} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{path} is not a field of this message"
    found = '"(hidden)"' if path == "token" else shown(problem["input"])
    return f"{path} is {found}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def error_message(code: str, message: str) -> dict[str, str]:
    """The answer to a request that cannot be served."""
    return {"type": "error", "code": code, "message": message}
