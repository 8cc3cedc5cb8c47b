"""What `fedsweep run` shows while it runs: a live panel, plain lines, JSON lines, or nothing.

Every display takes the manager's `status` answer, as a dict, in `update`; none asks for anything itself.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_EVERY_S = 5.0
SHOWN_WORKERS = 24
ENDINGS = {
    "drain": "draining: workers finish what they hold, then all ends",
    "stop": "stopping: workers give back what they hold, then all ends",
    "signal": "the manager was told to stop: it takes results of what is running, then it ends",
}


class Display(Protocol):
    """Something that shows how a sweep is getting on."""

    def __enter__(self) -> Self:
        """Begin to show."""
        ...

    def update(self, status: Mapping[str, Any]) -> None:
        """Show this state of the sweep."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, leaving the last state on the screen."""
        ...


class _Silent:
    """Shows nothing; the frame that the others fill in."""

    def __enter__(self) -> Self:
        return self

    def update(self, status: Mapping[str, Any]) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _LivePanel(_Silent):
    """An overall bar with the time left, the counts, and one line for each worker."""

    def __init__(self, console: Console) -> None:
        self.live = Live(console=console, refresh_per_second=8, transient=False)

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def update(self, status: Mapping[str, Any]) -> None:
        self.live.update(panel(status))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()


class _PlainLines(_Silent):
    """One line whenever something was finished, at most every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO, every_s: float = PLAIN_EVERY_S) -> None:
        self.stream = stream
        self.every_s = every_s
        self.shown = ""
        self.pending = ""
        self.next_at = 0.0

    def update(self, status: Mapping[str, Any]) -> None:
        self.pending = plain_line(status)
        if _finished(status) == status["total"] or time.monotonic() >= self.next_at:
            self._show()

    def _show(self) -> None:
        counts = self.pending.split(" · time left")[0]
        if counts != self.shown:
            print(self.pending, file=self.stream, flush=True)
            self.shown, self.next_at = counts, time.monotonic() + self.every_s

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pending:
            self._show()


class _JsonLines(_Silent):
    """One JSON object for each change of the counts."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.shown: dict[str, Any] = {}

    def update(self, status: Mapping[str, Any]) -> None:
        counts = {name: status[name] for name in ("total", "complete", "assigned", "pending", "failed")}
        counts["failed_attempts"] = status.get("failed_attempts", 0)
        if counts != self.shown:
            line = {"event": "progress", **counts, "eta_s": status.get("eta_s")}
            print(json.dumps(line), file=self.stream, flush=True)
            self.shown = counts


DISPLAYS: dict[str, Callable[[], Display]] = {
    "live": lambda: _LivePanel(Console()),
    "plain": lambda: _PlainLines(sys.stdout),
    "json": lambda: _JsonLines(sys.stdout),
    "quiet": _Silent,
}


def choose(*, quiet: bool = False, as_json: bool = False) -> Display:
    """The display that fits the flags and the terminal."""
    if as_json:
        return DISPLAYS["json"]()
    if quiet:
        return DISPLAYS["quiet"]()
    return DISPLAYS["live" if Console().is_terminal else "plain"]()


def panel(status: Mapping[str, Any]) -> Group:
    """The live panel of one state of the sweep."""
    total, finished = max(status["total"], 1), _finished(status)
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    bar.add_row(
        ProgressBar(total=total, completed=finished, complete_style="cyan", finished_style="green"),
        Text(f"{finished}/{status['total']} experiments  {100 * finished / total:3.0f} %{_time_left(status)}"),
    )
    return Group(bar, _counts(status), *_workers(status))


def _counts(status: Mapping[str, Any]) -> Text:
    text = Text()
    text.append(f"complete {status['complete']}", "green")
    if status.get("diverged"):
        text.append(f" ({status['diverged']} diverged)", "yellow")
    text.append(f" · running {status['assigned']} · pending {status['pending']} · ")
    failed, cancelled = _failed_and_cancelled(status)
    text.append(f"failed {failed}", "bold red" if failed else "")
    if cancelled:
        text.append(f" · cancelled {cancelled}", "yellow")
    if words := _tried_again(status):
        text.append(f"\n{words}", "yellow")
    if ending := ENDINGS.get(status.get("ending") or ""):
        text.append(f"\n{ending}", "yellow")
    for worker in status.get("set_aside", ()):
        text.append(f"\nset aside: {worker['worker_id']} on {worker['host']}: {worker['reason']}", "red")
    for folder in status.get("lagging", ()):
        text.append(f"\n{folder}: results are safe, but its CSV cannot be written; see the manager's log", "red")
    return text


def _workers(status: Mapping[str, Any]) -> list[Table | Text]:
    workers = sorted(status.get("workers", ()), key=lambda worker: str(worker["worker_id"]))
    if not workers:
        return [] if status.get("done") or status.get("ending") else [Text("waiting for workers …", "dim")]
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)  # what gives way in a narrow terminal
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for number, worker in enumerate(workers[:SHOWN_WORKERS]):
        table.add_row(f"worker {number} {worker.get('device') or ''}", *_activity(worker))
    hidden = len(workers) - SHOWN_WORKERS
    return [table, Text(f"and {hidden} more workers", "dim")] if hidden > 0 else [table]


def _activity(worker: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    if (worker.get("last_seen_s") or 0) > 30:
        return Text(worker.get("label") or "", "dim"), Text(f"no sign for {worker['last_seen_s']:.0f} s", "red"), Text()
    if not worker.get("task_id"):
        return Text("waiting for a task", "dim"), Text(), Text()
    rounds = f"round {worker['round']}/{worker['rounds']}" if worker.get("round") else "starting"
    accuracy = worker.get("val_acc")
    shown = Text(f"val. accuracy {accuracy:.3f}" if accuracy is not None else "")
    return Text(f"{worker.get('phase') or ''}: {worker.get('label') or worker['task_id']}"), Text(rounds), shown


def plain_line(status: Mapping[str, Any]) -> str:
    """One state of the sweep on one line."""
    counts = (
        f"{_finished(status)}/{status['total']} done · complete {status['complete']} · running {status['assigned']}"
    )
    failed, cancelled = _failed_and_cancelled(status)
    counts += f" · pending {status['pending']} · failed {failed}{f' · cancelled {cancelled}' if cancelled else ''}"
    words = " · ".join(filter(None, (counts, _tried_again(status))))
    return f"{words}{_time_left(status, ' · time left ')}"


def _failed_and_cancelled(status: Mapping[str, Any]) -> tuple[int, int]:
    """How many failed by themselves, and how many were cancelled; the status counts both as failed."""
    cancelled = status.get("cancelled") or 0
    return status["failed"] - cancelled, cancelled


def _tried_again(status: Mapping[str, Any]) -> str:
    count = status.get("failed_attempts", 0)
    return f"{count} attempt{'s' * (count != 1)} failed, tried again: fedsweep failures" if count else ""


def _finished(status: Mapping[str, Any]) -> int:
    return int(status["complete"]) + int(status["failed"])


def _time_left(status: Mapping[str, Any], prefix: str = "  time left ") -> str:
    seconds = status.get("eta_s") or 0.0
    return f"{prefix}{duration(seconds)}" if round(seconds) and status["pending"] + status["assigned"] else ""


def duration(seconds: float) -> str:
    """A duration for people: `0:42`, `12:05`, `3:10:00`, `2 d 04:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
