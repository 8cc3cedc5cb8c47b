"""Messages between manager and workers: bytes in, bytes out, no sockets. docs/protocol.md describes them.

One connection carries JSON objects one after another. A newline ends an object of ours; old clients send none, so an
object counts as complete when its braces close.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from fedsweep.errors import ProtocolError
from fedsweep.manager.wrong_fields import SHOWN, shown, wrong_fields

MAX_MESSAGE = 1024 * 1024  # bytes
MAX_DEPTH = 32
MAX_CONNECTIONS = 2048
REQUEST_TIMEOUT_S = 10.0
LEGACY_ANSWER = 8192  # bytes that an old client reads of an answer
LEGACY_ACK = 1024
MAX_DIGITS = 400  # of one number
MAX_ERROR = 8_000  # characters that are kept of what a failed task raised
MAX_REASON = 500  # characters of the message of an error, so that old clients can read it

ERROR_CODES = {
    "not_an_object": "The bytes are not a JSON object.",
    "tls_on_plain_port": "A TLS handshake arrived, but this port speaks plain text.",
    "plain_on_tls_port": "Plain text arrived, but this port speaks TLS.",
    "too_large": "The message has more than 1,048,576 bytes.",
    "too_deep": "The message nests more than 32 levels.",
    "truncated": "The connection ended inside a message.",
    "bad_encoding": "The message is not UTF-8 without a byte-order mark.",
    "bad_json": "The message is not strict JSON: no NaN, no key twice, no number of more than 400 digits.",
    "timeout": "The request was not complete 10 seconds after its first byte.",
    "unknown_type": "No message has this type.",
    "bad_field": "A field is missing, unknown or of a wrong type or range; the message names it.",
    "unauthorized": "The token is missing or wrong.",
    "unknown_task": "No task has this task_id.",
    "unknown_attempt": "The task was never handed out so.",
    "unknown_name": "No task, phase or group of failures has this name.",
    "no_result": "The task is said to be complete, but its result is not here.",
    "retry_later": "The manager cannot take anything at present; keep the result and try again.",
    "too_many_connections": "The manager serves 2,048 connections already.",
    "internal": "The manager failed on this request; its log has the reason.",
}

_TLS_HELLO = 0x16  # the first byte of a handshake
_HTTP = re.compile(rb"[A-Z]{3,7} /|[A-Z]{3,7} http|PRI \*")
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")
# Possessive (`*+`), so that a match never goes back over what it has read.
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+([{}\[\]"]?)', re.DOTALL)
_TO_QUOTE = re.compile(rb'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_CLOSER = {b"{": b"}", b"[": b"]"}


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
        self.closers: list[bytes] = []  # the brackets that are still to come, innermost last
        self.in_string = False

    @property
    def is_inside(self) -> bool:
        """Whether an object has begun and not ended."""
        return bool(self.buffer)

    @property
    def waiting(self) -> int:
        """Bytes of the object that has begun and not ended."""
        return len(self.buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take in bytes; the objects that they complete, one by one.

        Raises:
            ProtocolError: from the iterator, after the objects before it: what came is no JSON object, or exceeds a
                limit. The stream cannot be read on.
        """
        self.buffer += data
        return iter(self._next, None)

    def _next(self) -> Frame | None:
        if self.position == 0:
            first = _NOT_SPACE.search(self.buffer)
            del self.buffer[: first.start() if first else None]
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
        start = bytes(self.buffer[:SHOWN])
        if start[0] == _TLS_HELLO:
            raise ProtocolError("tls_on_plain_port", "this port speaks plain text; connect without TLS")
        if start[0] in b"\xef\xfe\xff\x00":  # how UTF-8 with a byte-order mark, UTF-16 and UTF-32 may begin
            raise ProtocolError("bad_encoding", "expected UTF-8 without a byte-order mark")
        if start[0] != ord("{"):
            what = "an HTTP request" if _HTTP.match(start) else shown(start.decode("latin-1"))
            raise ProtocolError("not_an_object", f"expected a JSON object, which begins with {{; found {what}")

    def _scan(self) -> int | None:
        """Go on from where the last scan ended; the end of the object, or None where it is not complete."""
        if self.in_string and not self._leave_string():
            return None
        for match in _TO_BRACKET.finditer(self.buffer, self.position):
            bracket = match[1]
            if bracket in _CLOSER:
                self.closers.append(_CLOSER[bracket])
                if len(self.closers) > self.max_depth:
                    raise ProtocolError("too_deep", f"a message may nest at most {self.max_depth} levels")
            elif bracket in (b"", b'"'):  # the end of what has arrived, or a string that has not arrived to its end
                self.position = match.end()
                self.in_string = bracket == b'"'
                break
            elif self.closers.pop() != bracket:
                raise ProtocolError("bad_json", f"{bracket.decode()} closes what it did not open")
            elif not self.closers:
                self.position = match.end()
                return self.position
        if self.in_string:
            self._leave_string()
        return None

    def _leave_string(self) -> bool:
        """Move on to the end of the string, or of what has arrived of it; whether it has ended."""
        if match := _TO_QUOTE.match(self.buffer, self.position):
            self.position = match.end()
            self.in_string = not match[1]
        return not self.in_string


def decode(raw: bytes) -> dict[str, Any]:
    """The object in `raw`, read strictly.

    Raises:
        ProtocolError: not UTF-8, not JSON, not an object, a key twice, NaN or Infinity, a number out of all bounds.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError("bad_encoding", f"byte {error.start} is not UTF-8") from None
    if text[:1] == "\ufeff" or "\0" in text:
        raise ProtocolError("bad_encoding", "expected UTF-8 without a byte-order mark")
    try:
        message = json.loads(
            text, object_pairs_hook=_without_repeats, parse_constant=_no_constant, parse_int=_int, parse_float=_float
        )
        if "\\u" in text:  # half a pair can only be escaped: the bytes themselves are UTF-8
            json.dumps(message, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ProtocolError("bad_encoding", "a string has half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        found = shown(text[error.pos : error.pos + SHOWN]) if error.pos < len(text) else "the end"
        raise ProtocolError("bad_json", f"{error.msg.removesuffix(' at')} at character {error.pos}: {found}") from None
    except RecursionError:
        raise ProtocolError("too_deep", f"a message may nest at most {MAX_DEPTH} levels") from None
    if not isinstance(message, dict):
        raise ProtocolError("not_an_object", f"expected a JSON object; found {shown(message)}")
    return message


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
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

Finite = Annotated[float, Strict(), AllowInfNan(False)]
Share = Annotated[Finite, Field(ge=0, le=1)]
Spread = Annotated[Finite, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has a character that cannot be printed")
    return text


def _legible_end(text: str) -> str:
    """The end of what was raised (which says most), as text that does nothing to a terminal."""
    kept = text[-MAX_ERROR:]
    plain = (letter if letter.isprintable() or letter in "\n\t" else f"\\x{ord(letter):02x}" for letter in kept)
    return "".join(plain)[-MAX_ERROR:]


Id = Annotated[Name, AfterValidator(_printable)]
Error = Annotated[StrictStr, AfterValidator(_legible_end)]
Key = Annotated[StrictStr, Field(min_length=1), AfterValidator(_printable)]  # as long as the path of a data set may be


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
    std_test_acc: Spread | None = 0.0
    mean_test_loss: Finite | None = None
    std_test_loss: Spread | None = 0.0
    mean_val_acc: Share | None = None
    std_val_acc: Spread | None = 0.0
    mean_val_loss: Finite | None = None
    std_val_loss: Spread | None = 0.0
    num_parameters: Count | None = None
    best_epoch: Count | None = None
    attack_success_rate: Share | None = None
    poisoned_clients: Count | None = None
    poisoned_samples: Count | None = None
    nonfinite_clients: Count | None = None
    rounds_run: Count | None = None
    wall_time_s: Spread | None = None
    device: Id | None = None
    plan: Id | None = None
    worker: Id | None = None
    fedsweep_version: Id | None = None
    torch_version: Id | None = None
    finished_at: Id | None = None
    history: Annotated[tuple[RoundRecord, ...], Field(fail_fast=True)] = ()
    per_class_test_acc: Annotated[tuple[Share | None, ...], Field(fail_fast=True)] | None = None

    @field_validator("mean_test_acc")
    @classmethod
    def _is_there_unless_diverged(cls, accuracy: float | None, known: ValidationInfo) -> float | None:
        if accuracy is None and known.data.get("outcome") == "ok":
            raise ValueError('only a result with outcome "diverged" has none')
        return accuracy


PROVENANCE_FIELDS = (
    *("wall_time_s", "device", "plan", "worker"),
    *("fedsweep_version", "torch_version", "finished_at"),
)
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
    cohort: str | None = None
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
    gpu_id: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    worker_type: Literal["gpu", "cpu"] | None = None
    max_tasks: Annotated[StrictInt, Field(ge=1, le=4096)] = 1
    cohort: Key | None = None
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
    error: Error
    attempt: Count | None = None
    exception: Id | None = None
    message: Error | None = None
    frame: Id | None = None
    host: Id | None = None


class Release(_Request):
    """A worker gives a task back without blame."""

    type: Literal["release"]
    task_id: Id
    worker_id: Id
    attempt: Count | None = None


class Leave(_Request):
    """A worker ends, having heard that there is no more for it."""

    type: Literal["leave"]
    worker_id: Id


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
    tasks: Annotated[tuple[TaskProgress, ...], Field(fail_fast=True, max_length=4096)] = ()


class ShowTask(_Request):
    """Somebody asks for one task as it is."""

    type: Literal["show_task"]
    task_id: Id


class Failures(_Request):
    """Somebody asks what failed and why."""

    type: Literal["failures"]
    earlier: StrictBool = False


class Retry(_Request):
    """Failed tasks shall be tried again."""

    type: Literal["retry"]
    names: Annotated[tuple[Id, ...], Field(fail_fast=True, max_length=4096)] = ()


class Cancel(_Request):
    """Tasks shall not be run."""

    type: Literal["cancel"]
    names: Annotated[tuple[Id, ...], Field(fail_fast=True, min_length=1, max_length=4096)]


class Drain(_Request):
    """No more tasks shall be handed out, and all shall end when what runs has ended."""

    type: Literal["drain"]


class Stop(_Request):
    """Workers shall save and give back what they hold, and all shall end."""

    type: Literal["stop"]


Work = RequestTask | SubmitResult | TaskComplete | TaskFailed | Release | Heartbeat | Leave
Control = ShowTask | Failures | Retry | Cancel | Drain | Stop  # what people ask by commands; old clients may not
Request = Work | Status | Control

REQUESTS: dict[str, type[Request]] = {
    "request_task": RequestTask,
    "submit_result": SubmitResult,
    "task_complete": TaskComplete,
    "task_failed": TaskFailed,
    "release": Release,
    "status": Status,
    "heartbeat": Heartbeat,
    "leave": Leave,
    "show_task": ShowTask,
    "failures": Failures,
    "retry": Retry,
    "cancel": Cancel,
    "drain": Drain,
    "stop": Stop,
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
        path, what = next(wrong_fields(error, REQUESTS[kind]))
        raise ProtocolError("bad_field", f"{kind}: {path} {what}") from None


def error_message(code: str, message: str) -> dict[str, str]:
    """The answer to a request that cannot be served."""
    return {"type": "error", "code": code, "message": message[:MAX_REASON]}
