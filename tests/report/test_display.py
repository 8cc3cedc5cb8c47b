"""What a person reads of a sweep while it runs."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fedsweep.report.display import _JsonLines, _PlainLines, panel, plain_line

STATUS = {"total": 10, "complete": 2, "assigned": 3, "pending": 5, "failed": 0, "failed_attempts": 0, "eta_s": None}


def shown(status) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(panel(status))
    return stream.getvalue()


@pytest.mark.parametrize("seconds", [None, 0.0, 0.4])
def test_a_line_without_failures_and_without_a_time_to_tell(seconds):
    line = plain_line(STATUS | {"eta_s": seconds})
    assert line == "2/10 done · complete 2 · running 3 · pending 5 · failed 0"
    assert "attempt" not in shown(STATUS)
    assert "time left" not in shown(STATUS)


@pytest.mark.parametrize("over", [{"done": True}, {"ending": "drain"}])
def test_workers_are_awaited_only_while_there_is_something_for_them(over):
    assert "waiting for workers" in shown(STATUS)
    assert "waiting for workers" not in shown(STATUS | over)


def test_the_cancelled_are_told_apart_from_the_failed():
    status = STATUS | {"failed": 3, "cancelled": 2, "total": 13}
    assert plain_line(status).endswith("pending 5 · failed 1 · cancelled 2")
    assert "failed 1 · cancelled 2" in shown(status)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "1 attempt failed, tried again: fedsweep failures"),
        (12, "12 attempts failed, tried again: fedsweep failures"),
    ],
)
def test_attempts_that_failed_are_told_before_any_experiment_has(count, words):
    status = STATUS | {"failed_attempts": count, "eta_s": 65.0}
    assert plain_line(status).endswith(f" · failed 0 · {words} · time left 1:05")
    assert words in shown(status)


def test_the_time_left_alone_makes_no_new_line_but_a_failed_attempt_does():
    stream = io.StringIO()
    display = _PlainLines(stream, every_s=0.0)
    for change in ({}, {"eta_s": 9.0}, {"eta_s": 8.0}, {"failed_attempts": 1}):
        display.update(STATUS | change)
    assert [line.count("attempt") for line in stream.getvalue().splitlines()] == [0, 1]


def test_programs_are_told_of_failed_attempts_too():
    stream = io.StringIO()
    display = _JsonLines(stream)
    for count in (0, 0, 2):
        display.update(STATUS | {"failed_attempts": count})
    assert [json.loads(line)["failed_attempts"] for line in stream.getvalue().splitlines()] == [0, 2]
