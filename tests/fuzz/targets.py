"""The parsers that read what others wrote, each as a function of bytes that checks what is promised of it.

Any bytes either parse, or are refused with the parser's own error, in clear lines of bounded length. What parses goes
round: written out and read again it is the same. Everything else is an exception here. The same functions are driven
by hypothesis (`test_targets`), by atheris (`fuzz.py`), and over every input in `corpus` (`test_corpus`).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from fedsweep.errors import ConfigError, DataError, ProtocolError, StateError
from fedsweep.manager.adoption import read_result
from fedsweep.manager.columns import FILE_NAME, OWN_COLUMNS, RowFormat, line
from fedsweep.manager.csv_lines import read_header, read_row
from fedsweep.manager.ledger import Ledger, differs
from fedsweep.manager.protocol import (
    ERROR_CODES,
    MAX_REASON,
    REQUESTS,
    FrameReader,
    decode,
    encode,
    error_message,
    parse_request,
)
from fedsweep.manager.records import Row
from fedsweep.manager.results import parse_results
from fedsweep.manager.sources import NotText, text_of
from fedsweep.manager.state_json import State, StateTask, parse_state, write_state
from fedsweep.manager.survey import Survey, Surveyor, foreign_line, whole_columns
from fedsweep.plan.config import Source, parse
from fedsweep.plan.experiment import PARAMETERS, Experiment, check_value, from_config
from fedsweep.plan.grid import count, expand

CORPUS = Path(__file__).with_name("corpus")
MAX_LINE = 1200  # characters of one problem: the longest names every parameter
MAX_TASKS = 200  # of a grid that is expanded here
MEMORY = Path("/dev/shm")  # where a sync costs nothing
BYTEWISE = 400  # bytes of a stream that is also read one byte at a time


@dataclass(frozen=True)
class Target:
    """A parser under test."""

    name: str
    run: Callable[[bytes], bool]  # whether the bytes parsed; raises where a promise is broken
    words: tuple[str, ...]  # what its inputs are made of

    def seeds(self) -> list[Path]:
        """Its inputs in the corpus: seeds, what a fuzzer found worth keeping, and everything that ever failed."""
        return sorted((CORPUS / self.name).iterdir())


def _check_lines(text: str) -> None:
    """One clear message: lines that can be printed, none without end."""
    lines = text.split("\n")
    assert all(line.strip() and line.isprintable() for line in lines), f"not fit to be read: {text[:500]!r}"
    assert max(map(len, lines)) <= MAX_LINE, f"{max(map(len, lines))} characters: {text[:500]!r}"


# ---- a message of the protocol


def read_messages(data: bytes) -> bool:
    """A stream as a server reads it: frames, JSON, requests; then what it would answer."""
    frames, refusal = _frames([data])
    if len(data) <= BYTEWISE:
        assert _frames([data[at : at + 1] for at in range(len(data))]) == (frames, refusal), "cuttings matter"
    accepted = [_read_message(frame) for frame in frames]
    return refusal is None and bool(accepted) and all(accepted)


def _frames(pieces: list[bytes]) -> tuple[list[bytes], str | None]:
    reader, found = FrameReader(), []
    try:
        for piece in pieces:
            for frame in reader.feed(piece):
                found.append(frame.raw)
    except ProtocolError as error:
        _check_refusal(error)
        return found, error.code
    return found, None


def _read_message(raw: bytes) -> bool:
    try:
        message = decode(raw)
        assert decode(encode(message)) == message, "JSON does not go round"
        request = parse_request(message)
    except ProtocolError as error:
        _check_refusal(error)
        return False
    sent = request.model_dump(mode="json", exclude_unset=True)
    assert parse_request(decode(encode(sent))) == request, "a request does not go round"
    assert request.type in REQUESTS
    return True


def _check_refusal(error: ProtocolError) -> None:
    assert error.code in ERROR_CODES and error.code != "internal"
    assert len(str(error)) <= MAX_REASON, f"{len(str(error))} characters: {error}"
    _check_lines(str(error))
    assert decode(encode(error_message(error.code, str(error))))["code"] == error.code


# ---- a YAML sweep


def read_sweep(data: bytes) -> bool:
    """A configuration file: text, YAML, layout, values, grid. The config of each task stands for its experiment."""
    try:
        sweep = parse([Source("a.yaml", text_of(data))])
        if count(sweep) > MAX_TASKS:
            return True
        grid = expand(sweep, MAX_TASKS)
    except NotText as error:
        _check_lines(str(error))
        return False
    except ConfigError as error:
        assert error.problems
        assert len(str(error).split("\n")) == len(error.problems)
        _check_lines(str(error))
        return False
    assert grid.total == count(sweep) >= grid.unique > 0
    assert len({task.signature for task in grid.tasks}) == grid.unique
    for task in grid.tasks:
        config = json.loads(json.dumps(task.config, allow_nan=False))
        assert {name: check_value(name, value) for name, value in config.items()} == task.config
        assert from_config(config).signature == task.signature
        assert all(cell.experiment.signature == task.signature and cell.output_dir for cell in task.cells)
    return True


# ---- a results file

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: out}
seeds: [1, 2]
first:
  combinations:
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
second:
  combinations: [{lr: [0.01, 0.02]}]
"""
RESULT = {"outcome": "ok", "mean_test_acc": 0.5, "mean_test_loss": 1 / 3, "best_epoch": 2, "device": "=cpu, 1"}


@cache
def _folder() -> Path:
    in_memory = MEMORY.is_dir() and "TMPDIR" not in os.environ
    folder = tempfile.TemporaryDirectory(prefix="fedsweep-fuzz-", dir=MEMORY if in_memory else None)
    atexit.register(folder.cleanup)
    return Path(folder.name)


@cache
def sweep_under_way() -> Ledger:
    """A ledger of 8 tasks, the first four of which are complete."""
    ledger = Ledger(_folder() / "ledger.sqlite3")
    atexit.register(ledger.close)
    ledger.store_plan(expand(parse([Source("a.yaml", SWEEP)])).tasks)
    for task in ledger.hand_out("w", 3600.0, 4):
        ledger.accept(task.task_id, "w", RESULT, task.attempt)
    return ledger


def read_results_file(data: bytes) -> bool:
    """A `final_results.csv` as the manager compares it with its ledger; written anew, nothing more is wrong with it."""
    header = read_header(data.split(b"\n")[0])
    for raw in data.split(b"\n")[1:] if header else ():
        with contextlib.suppress(ValueError):
            read_row(raw, header)
    survey = _survey(data)
    for message in survey.messages():
        _check_lines(message)
    again = _survey(_rewritten(survey))
    assert again.is_sound and not again.has_tail, "a file that was written anew is not as it must be"
    assert not (again.missing or again.cut or again.adoptions), "a file that was written anew is not whole"
    assert _without_empty(again.foreign) == _without_empty(survey.foreign), "rows of others were changed"
    for adoption in survey.adoptions:
        row = Row(output_dir="out", phase="p", spelled={}, signature="s", result=dict(adoption.data))
        columns = sorted(OWN_COLUMNS)
        found = read_header(line(columns))
        assert found is not None
        read_again = read_result(read_row(RowFormat(columns)(row), found))
        assert not differs(adoption.data, read_again), "an adopted result does not go round"
    return header is not None


def read_report(data: bytes) -> bool:
    """A `final_results.csv` as a report reads it: typed, whatever stands in it, and numbers exactly."""
    try:
        rows = parse_results("out/final_results.csv", data)
    except DataError as error:
        _check_lines(str(error))
        return False
    numbers = rows.select_dtypes("number")
    assert {"mean_test_acc", "width_factor", "seed"} <= set(numbers)
    written = rows.to_csv(index=False).encode()
    again = parse_results("out/final_results.csv", written)
    assert numbers.equals(again.select_dtypes("number")), "numbers do not go round"
    return len(rows) > 0


def _survey(content: bytes) -> Survey:
    return Surveyor(sweep_under_way().view, "out", f"out/{FILE_NAME}").survey(content)


def _rewritten(survey: Survey) -> bytes:
    """The file that takes the place of the surveyed one, as `Projection` writes it."""
    columns = whole_columns(survey)
    ours = [RowFormat(columns)(row) for row in sweep_under_way().view.rows_in("out")]
    others = [foreign_line(columns, row) for row in survey.foreign]
    return b"".join(each + b"\n" for each in (line(columns), *ours, *others))


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if value} for row in rows]


# ---- a JSON state

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def read_state_file(data: bytes) -> bool:
    """A state of an old manager or of ours: taken over into a ledger and written out, it is read the same again."""
    try:
        state = parse_state("state.json", data)
    except StateError as error:
        _check_lines(str(error))
        return False
    except ConfigError as error:
        assert error.problems
        _check_lines(str(error))
        return False
    with _empty_ledger() as ledger:
        ledger.take_over(state, 3600.0)
        path = _folder() / "state.json"
        write_state(path, ledger.view, NOW)
        again = parse_state(str(path), path.read_bytes())
    kept = [task for task in state.tasks if not task.is_orphaned or task.result is not None]
    assert _facts(again) == {task.planned.signature: _task_facts(task) for task in kept}, "a state does not go round"
    assert again.last_attempt >= state.last_attempt
    return True


@contextlib.contextmanager
def _empty_ledger() -> Iterator[Ledger]:
    with tempfile.TemporaryDirectory(dir=_folder()) as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite3")
        try:
            yield ledger
        finally:
            ledger.close()


def _facts(state: State) -> dict[str, Any]:
    return {task.planned.signature: _task_facts(task) for task in state.tasks}


def _task_facts(task: StateTask) -> dict[str, Any]:
    """What must be the same of a task after it went through a ledger. Hand-outs end with time, and ids may be taken."""
    is_complete = task.result is not None
    return {
        "cells": {(cell.phase, cell.output_dir, cell.experiment) for cell in task.planned.cells},
        "ended": "complete" if is_complete else "failed" if task.status == "failed" else None,
        "failures": task.failures,
        "losses": task.losses,
        "last_error": task.last_error,
        "result": task.result,
        "is_orphaned": task.is_orphaned,
        "options": task.planned.options,
    }


# ---- all of them

_CSV = (
    *("\n", "\r\n", ",", ";", '"', '""', "\0", "\ufeff", "'=", "0.5", "0,5", "1e999", "nan", "diverged"),
    *sorted(OWN_COLUMNS),
    *("digits", "lr", "label_flip", "shuffle", "fedavg", "first", "second"),
)
_JSON = (
    *("{", "}", "[", "]", ":", ",", '"', "\\", "\\u0000", "\\ud800", "null", "true", "1e999", "NaN", "0.5", "-1"),
    *("\n", '"task_id":'),
)
_PROTOCOL = (
    *_JSON,
    *(f'"type":"{kind}"' for kind in REQUESTS),
    *sorted({f'"{name}":' for model in REQUESTS.values() for name in model.model_fields}),
    *('"mean_test_acc":0.5', '"history":[{"round":1}]', '"outcome":"diverged"'),
)
_YAML = (
    *("defaults:", "seeds:", "combinations:", "exp1:", "<<: ", "&a ", "*a", "!!int ", "---\n", "%YAML 1.1\n", "\t"),
    *(": ", "- ", "? ", "| ", "> ", "[", "]", "{", "}", ", ", "'", '"', "#", "\n", "\n  ", "\n    - "),
    *(f"{name}: " for name in PARAMETERS),
    *(".nan", ".inf", "0x1F", "5e-4", "null", "true", "{phase}", "..", "mnist", "cnn", "median"),
)
_STATE_FIELDS = (
    *("tasks", "config", "cells", "results", "assigned_tasks", "last_attempt", "phase", "seed", "output_dir"),
    *("output_dirs", "status", "losses", "retry_count", "last_error", "assigned_to", "assigned_at", "orphaned"),
)
_STATE = (
    *_JSON,
    *(f'"{name}":' for name in (*_STATE_FIELDS, *Experiment.model_fields)),
    *('"pending"', '"assigned"', '"complete"', '"failed"', '"2026-01-01T00:00:00"'),
)
TARGETS = {
    target.name: target
    for target in (
        Target("protocol", read_messages, _PROTOCOL),
        Target("sweep", read_sweep, _YAML),
        Target("results", read_results_file, _CSV),
        Target("report", read_report, _CSV),
        Target("state", read_state_file, _STATE),
    )
}
