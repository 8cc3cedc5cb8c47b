"""Odd inputs by the thousand, made of what real ones are made of: each parser reads them or refuses them clearly.

FEDSWEEP_EXAMPLES makes them more. `fuzz.py` goes on from here, guided by what an input covers.
"""

from __future__ import annotations

import csv
import io
import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import OWN_COLUMNS, PARAMETERS, REQUESTS, TARGETS, Target

from fedsweep.manager.columns import RESULT_COLUMNS
from fedsweep.manager.protocol import ResultData
from fedsweep.plan.experiment import Experiment

often = settings(
    max_examples=int(os.environ.get("FEDSWEEP_EXAMPLES", "300")),
    deadline=None,
    derandomize="FEDSWEEP_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

ODD_TEXT = st.sampled_from(
    [
        "",
        "a",
        "x" * 300,
        "\x1b[2J",
        "a\0b",
        "é\u2028",
        "../x",
        "/",
        "null",
        "0.5",
        "1e999",
        "nan",
        "-1",
        "'=1",
        "a,b\nc",
    ]
)
ODD_NUMBERS = st.sampled_from([0, 1, -1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**53 + 1, 2**63, 10**30, True, None])
ODD = ODD_TEXT | ODD_NUMBERS | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9)
VALUES = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=2))


def good(name: str) -> st.SearchStrategy[Any]:
    """Values that a parameter takes: its default, or a word that its kind has."""
    words = {"dataset": "mnist", "model_type": "lr", "aggregator": "median", "seed": 7, "num_clients": 2}
    return st.sampled_from([PARAMETERS[name].default, words.get(name, PARAMETERS[name].default)])


def mostly(values: st.SearchStrategy[Any], otherwise: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda number: otherwise if number == 0 else values)


def some_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """An object with some of these fields, and now and then another."""
    known = st.fixed_dictionaries({}, optional=fields)
    return st.tuples(known, mostly(st.just({}), st.dictionaries(ODD_TEXT, VALUES, max_size=1))).map(
        lambda both: both[0] | both[1]
    )


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


# ---- real inputs, edited


def edited(target: Target) -> st.SearchStrategy[bytes]:
    """An input of the corpus after some edits: words put in, stretches left out, doubled, or those of another input."""
    seeds = [path.read_bytes() for path in target.seeds()]
    words = st.sampled_from([word.encode() for word in target.words]) | st.binary(max_size=4)
    place = st.floats(0, 1, exclude_max=True)
    edits = st.lists(st.tuples(st.sampled_from("ircs"), place, place, words), max_size=6)
    return st.tuples(st.sampled_from(seeds), st.sampled_from(seeds), edits).map(lambda parts: _edit(*parts))


def _edit(data: bytes, other: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
    for kind, first, second, word in edits:
        start = int(first * (len(data) + 1))
        end = min(len(data), start + int(second**3 * (len(data) + 1)))
        middle = {
            "i": word + data[start:end],
            "r": word,
            "c": data[start:end] * 2,
            "s": other[int(first * len(other)) :][: end - start],
        }[kind]
        data = data[:start] + middle + data[end:]
    return data


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_a_real_input_that_was_edited_is_read_or_refused(target: Target) -> None:
    @often
    @given(edited(target))
    def run(data: bytes) -> None:
        target.run(data)

    run()


# ---- inputs of the right shape with odd values

RESULTS = some_of({name: VALUES for name in ResultData.model_fields})
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("worker_id", "task_id", "error", "host"), mostly(ODD_TEXT)),
    "result_data": mostly(RESULTS.map(lambda result: {"mean_test_acc": 0.5} | result)),
    "names": mostly(st.lists(ODD_TEXT, max_size=3)),
    "tasks": mostly(st.lists(some_of({"task_id": ODD_TEXT, "round": ODD_NUMBERS, "val_acc": ODD}), max_size=2)),
}
MESSAGES = st.sampled_from(sorted(REQUESTS)).flatmap(
    lambda kind: some_of({name: FIELDS.get(name, ODD) for name in REQUESTS[kind].model_fields if name != "type"}).map(
        lambda message: {"type": kind, **message}
    )
)


@often
@given(st.lists(MESSAGES, min_size=1, max_size=3), st.sampled_from([b"", b"\n", b"\r\n", b"}", b"{"]))
def test_messages_with_odd_values_are_read_or_refused(messages: list[dict[str, Any]], between: bytes) -> None:
    TARGETS["protocol"].run(between.join(map(as_json, messages)))


SETTINGS = some_of({name: mostly(good(name)) for name in PARAMETERS})
VARIED = st.sampled_from(sorted(Experiment.model_fields)).flatmap(
    lambda name: st.lists(mostly(good(name)), min_size=1, max_size=3).map(lambda values: {name: values})
)
PHASE = some_of(
    {
        "defaults": mostly(SETTINGS),
        "combinations": mostly(st.lists(mostly(VARIED), min_size=1, max_size=3)),
        "seeds": mostly(st.lists(st.integers(0, 3), min_size=1, max_size=2)),
    }
)


@often
@given(
    some_of({"defaults": mostly(SETTINGS), "seeds": mostly(st.just([1, 2])), "p": mostly(PHASE), "q": mostly(PHASE)})
)
def test_sweeps_with_odd_values_are_read_or_refused(sweep: dict[str, Any]) -> None:
    TARGETS["sweep"].run(as_json(sweep))  # JSON is YAML


CONFIG = some_of({name: mostly(good(name)) for name in PARAMETERS})
CELL = some_of({"phase": mostly(st.just("p")), "output_dir": mostly(st.just("out")), "config": mostly(CONFIG)})
TASK = some_of(
    {
        "task_id": mostly(st.sampled_from(["p_0_1", "p_1_1", "p_00_1", "q_9_42", "x"])),
        "config": mostly(CONFIG, VALUES),
        "phase": mostly(st.just("p")),
        "seed": mostly(st.integers(0, 3)),
        "output_dir": mostly(st.sampled_from(["out", "./out/", "a/../b"])),
        "output_dirs": mostly(st.lists(st.just("out"), max_size=2)),
        "status": mostly(st.sampled_from(["pending", "assigned", "complete", "failed"])),
        "assigned_to": mostly(st.sampled_from(["w", None])),
        "assigned_at": mostly(st.sampled_from([None, "2026-01-01T00:00:00", "2026-01-01T00:00:00.5+14:00"])),
        "retry_count": mostly(st.integers(0, 4)),
        "losses": mostly(st.integers(0, 5)),
        "last_error": mostly(ODD_TEXT),
        "orphaned": mostly(st.booleans()),
        "cells": mostly(st.lists(CELL, max_size=2)),
    }
).map(lambda task: {"config": {}, **task})
STATES = some_of(
    {
        "format": mostly(st.just("fedsweep-state")),
        "version": mostly(st.just(1)),
        "last_attempt": mostly(st.integers(0, 9)),
        "assigned_tasks": mostly(st.dictionaries(st.sampled_from(["p_0_1", "p_1_1"]), some_of({"worker_id": ODD}))),
        "results": mostly(st.just({})),
    }
)


@often
@given(
    STATES, st.dictionaries(mostly(st.sampled_from(["p_0_1", "p_1_1", "q_1_1"]), ODD_TEXT), mostly(TASK), max_size=3)
)
def test_states_with_odd_values_are_read_or_refused(state: dict[str, Any], tasks: dict[str, Any]) -> None:
    TARGETS["state"].run(as_json({"tasks": tasks, **state}))


COLUMNS = mostly(
    st.just(list(RESULT_COLUMNS)),
    st.lists(mostly(st.sampled_from(sorted(OWN_COLUMNS)), ODD_TEXT), min_size=1, max_size=30),
)
FIELD = st.sampled_from(["", "digits", "lr", "first", "0", "1", "0.5", "2", "1.0", "32", "fedavg", "shuffle"])


@often
@given(COLUMNS, st.lists(st.lists(mostly(FIELD, ODD.map(str)), min_size=20, max_size=24), max_size=3), st.booleans())
@pytest.mark.parametrize("name", ["results", "report"])
def test_results_files_with_odd_values_are_read_or_refused(
    name: str, columns: list[str], rows: list[list[str]], european: bool
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=";" if european else ",", lineterminator="\n").writerows([columns, *rows])
    TARGETS[name].run(text.getvalue().encode())
