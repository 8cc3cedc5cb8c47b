"""Every input in the corpus, replayed: seeds, what a fuzzer found worth keeping, and everything that ever failed."""

from __future__ import annotations

import re
from pathlib import Path

import fuzz
import pytest
import targets
from targets import CORPUS, TARGETS

INPUTS = [(target.name, path) for target in TARGETS.values() for path in target.seeds()]


@pytest.mark.timeout(30)  # an input that takes long is one that failed
@pytest.mark.parametrize(("name", "path"), INPUTS, ids=[f"{name}-{path.name}" for name, path in INPUTS])
def test_an_input_of_the_corpus_keeps_every_promise(name: str, path: Path) -> None:
    TARGETS[name].run(path.read_bytes())


def test_the_corpus_is_small_and_has_both_kinds_of_inputs() -> None:
    assert sum(path.stat().st_size for _, path in INPUTS) < 100_000
    for target in TARGETS.values():
        assert {target.run(path.read_bytes()) for path in target.seeds()} == {True, False}, target.name


def test_the_fuzzer_drives_every_target_and_replays_only_what_has_one() -> None:
    assert tuple(TARGETS) == fuzz.PARSERS
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize(
    ("name", "broken", "replacement", "words"),
    [
        ("protocol", "decode", lambda raw: {}["x"], "KeyError"),
        ("protocol", "encode", lambda message: b"{}", "does not go round|unknown_type"),
        ("sweep", "parse", lambda sources: 1 / 0, "ZeroDivisionError"),
        ("results", "_rewritten", lambda survey: b"", "is not whole"),
        ("results", "foreign_line", lambda columns, row: b"", "written anew is not as it must be"),
        ("report", "parse_results", lambda name, content: "".index("x"), "ValueError"),
        ("state", "parse_state", lambda name, content: int("x"), "ValueError"),
        ("state", "write_state", lambda path, view, now: path.write_bytes(b'{"tasks": {}}'), "does not go round"),
    ],
)
def test_a_promise_that_is_broken_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: str, replacement: object, words: str
) -> None:
    """The targets are not blind: with a parser or writer that does otherwise, some input of the corpus fails."""
    monkeypatch.setattr(targets, broken, replacement)
    failures = []
    for path in TARGETS[name].seeds():
        try:
            TARGETS[name].run(path.read_bytes())
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    assert any(re.search(words, failure) for failure in failures), failures
