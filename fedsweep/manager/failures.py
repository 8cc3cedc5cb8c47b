"""What failed tasks raised, and putting alike failures together."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

SHOWN_CAUSE = 300  # characters of a message that tell one cause from another
LOST, CANCELLED = "lost", "cancelled"  # groups of tasks that failed without raising anything
# The last error of a cancelled task, and of no other. Ledgers have it in these words; people are shown others.
CANCELLED_ERROR = "cancelled; `fedsweep retry` brings it back"

# What may differ between two failures of one cause, and what stands for it. Paths first: they hold numbers. A worker
# sends what it likes, so none may begin again at each letter of a long word.
_VARYING = (
    (re.compile(r"\b(?:GPU-)?[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.IGNORECASE), "ID"),
    (re.compile(r"(?:~|\.{1,2})?(?:/[^\s/'\":,;()\[\]<>]+)+/?|(?<![\w.@+-])[\w.@+-]+(?:/[\w.@+-]+)+"), "PATH"),
    (re.compile(r"0x[0-9a-f]+", re.IGNORECASE), "ADDRESS"),
    (re.compile(r"\b(?=[a-f]*[0-9])(?=[0-9]*[a-f])[0-9a-f]{8,}\b"), "ID"),
    (re.compile(r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?"), "N"),
)
_LAST_LINE = re.compile(r"(?P<exception>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning)): ?(?P<message>.*)")
_FRAME = re.compile(r'File "(?:[^"]*/)?(?P<file>fedsweep/[^"]+)", line \d+, in (?P<function>\S+)')
_OUR_WORKER = re.compile(r"(?P<host>.+)-\d+-[0-9a-f]{6}")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What one attempt raised, and where."""

    exception: str  # name of the type; empty where an old client sent words alone
    message: str
    frame: str  # `file:function` of the innermost call in our own code; empty where none is known
    host: str  # empty where the worker did not say
    text: str  # for people: the end of the traceback, or the message

    @classmethod
    def of(
        cls,
        text: str,
        *,
        exception: str | None = None,
        message: str | None = None,
        frame: str | None = None,
        host: str | None = None,
    ) -> Self:
        """A failure as it was reported; what an old client, which sends `text` alone, did not say is read from that."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = _LAST_LINE.fullmatch(lines[-1]) if lines else None
        if exception is None:
            exception = last["exception"].rpartition(".")[2] if last else ""
            message = last["message"] if last else (lines[-1] if lines else "")
        if frame is None:
            frames = _FRAME.findall(text)
            frame = ":".join(frames[-1]) if frames else ""
        return cls(exception=exception, message=message or "", frame=frame, host=host or "", text=text)

    @property
    def cause(self) -> str:
        """Type and message without what differs from task to task: numbers, addresses, paths, ids."""
        message = " ".join(self.message.split())
        for varying, name in _VARYING:
            message = varying.sub(name, message)
        return shortened(": ".join(filter(None, (self.exception, message))) or "no reason was given")

    @property
    def brief(self) -> str:
        """Type and message on one line, as they came."""
        return shortened(": ".join(filter(None, (self.exception, " ".join(self.message.split())))))

    @property
    def group(self) -> str:
        """A short name for all failures with this cause, raised in the same place; the same at all times."""
        return hashlib.sha256(f"{self.cause}\0{self.frame}".encode()).hexdigest()[:6]

    def dump(self) -> str:
        """The failure as the ledger keeps it, with the group that SQL puts it into."""
        return json.dumps({"group": self.group, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def read(cls, kept: str) -> Failure:
        """What `dump` wrote; or words alone, as ledgers of before have them."""
        try:
            content = json.loads(kept)
            return cls(**{name: content[name] for name in cls.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            return cls.of(kept)


def shortened(words: str) -> str:
    """The words, cut for a table."""
    return words if len(words) <= SHOWN_CAUSE else words[: SHOWN_CAUSE - 1] + "…"


def group_of(kept: str | None) -> str:
    """The group of a failure as the ledger keeps it."""
    return Failure.read(kept or "").group


def host_of(worker_id: str) -> str:
    """The host of a worker, where its name is one that `fedsweep worker` made; else that name."""
    match = _OUR_WORKER.fullmatch(worker_id)
    return match["host"] if match else worker_id


@dataclass(frozen=True, kw_only=True)
class Group:
    """Failures of one cause, of tasks that have no result."""

    group: str
    cause: str
    frame: str
    failures: int  # attempts that failed; of a lost task those that were lost
    failed: int  # tasks that failed for good
    open: int  # tasks that are tried again
    task_ids: tuple[str, ...]  # the first of them in the order of the grid, those that failed for good before
    workers: tuple[str, ...]
    hosts: tuple[str, ...]
    first_at: str | None  # ISO 8601
    last_at: str | None
    text: str  # of the first of these tasks, the last time that it failed so

    def as_dict(self) -> dict[str, Any]:
        """The group as `fedsweep failures --json` has it."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("task_ids", "workers", "hosts")}


@dataclass(frozen=True, kw_only=True)
class SetAside:
    """A worker that failed whatever it was given, and gets nothing more."""

    worker_id: str
    host: str
    device: str | None
    reason: str  # what it failed with last
    failures: int  # that were given back
    at: str  # ISO 8601

    def as_dict(self) -> dict[str, Any]:
        """The worker as `status` has it."""
        return asdict(self)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """What `as_dict` made."""
        return cls(**content)
