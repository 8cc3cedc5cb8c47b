"""The state as JSON, both ways; and taking over from an old experiment manager."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest

from fedsweep.errors import ConfigError, StateError
from fedsweep.manager.records import Status, UnknownAttempt

NOW = datetime(2026, 1, 1, tzinfo=UTC)

# Written by hand after the old manager's description: tasks by id, times without a zone, signatures of eleven parts, no
# results, and 0 and 0.0 as two tasks.
OLD_CONFIG = {
    "dataset": "digits",
    "model_type": "lr",
    "width_factor": 2,
    "depth": 1,
    "poison_ratio": 0.5,
    "poison_type": "label_flip",
    "alpha": 1,
    "data_ordering": "shuffle",
    "aggregator": "fedavg",
    "batch_size": 32,
    "num_clients": 2,
    "output_dir": "./out/first",
}


def old_task(number: int, seed: int = 42, **fields) -> dict:
    config = {**OLD_CONFIG, "width_factor": number + 1, **fields.pop("config", {})}
    return {
        "task_id": f"first_{number}_{seed}",
        "phase": "first",
        "config": config,
        "seed": seed,
        "output_dir": "./out/first",
        "output_dirs": ["./out/first"],
        "status": "pending",
        "assigned_to": None,
        "assigned_at": None,
        "retry_count": 0,
        "last_error": None,
        **fields,
    }


def write_old(path: Path, *tasks: dict, completed: tuple[str, ...] = ()) -> Path:
    assigned = {task["task_id"]: task for task in tasks if task["status"] == "assigned"}
    state = {"tasks": {task["task_id"]: task for task in tasks}, "completed_tasks": list(completed)}
    path.write_text(json.dumps({**state, "assigned_tasks": assigned}))
    return path


def local_time(moment: datetime) -> str:
    """A time as `datetime.now().isoformat()` wrote it: local, and without saying so."""
    return moment.astimezone().replace(tzinfo=None).isoformat()


# ---- an old manager's


def test_tasks_of_an_old_state_become_ours(managers, folder):
    path = write_old(
        folder / "state.json", old_task(0), old_task(1, retry_count=2, last_error="ValueError: x"), old_task(7)
    )
    manager = managers(None)
    assert manager.load_state(path)
    assert list(manager.tasks) == ["first_0_42", "first_1_42", "first_7_42"]
    task = manager.tasks["first_1_42"]
    assert (task["status"], task["retry_count"], task["last_error"]) == ("pending", 2, "ValueError: x")
    assert (task["config"]["alpha"], task["config"]["global_rounds"]) == (1.0, 10)
    assert task["output_dirs"] == ["out/first"]
    assert task["signature"].count("|") == 11


def test_retries_go_on_where_they_were(managers, folder):
    manager = managers(None)
    manager.load_state(write_old(folder / "state.json", old_task(0, retry_count=3)))
    task = manager.get_next_task("w")
    manager.mark_failed(task["task_id"], "w", "ValueError: again", task["attempt"])
    assert manager.tasks["first_0_42"]["status"] == "failed"


def test_tasks_handed_out_lately_stay_with_their_workers_and_stale_ones_wait_again(managers, folder, make_result):
    fresh = old_task(0, status="assigned", assigned_to="old-1", assigned_at=local_time(NOW - timedelta(hours=1)))
    stale = old_task(1, status="assigned", assigned_to="old-2", assigned_at=local_time(NOW - timedelta(hours=7)))
    manager = managers(None)
    manager.load_state(write_old(folder / "state.json", fresh, stale))
    assert list(manager.assigned_tasks) == ["first_0_42"]
    assert manager.tasks["first_0_42"]["assigned_to"] == "old-1"
    assert manager.tasks["first_0_42"]["assigned_at"] == NOW - timedelta(hours=1)
    # Both workers may still deliver, without an attempt number.
    for task_id, worker in (("first_0_42", "old-1"), ("first_1_42", "old-2")):
        assert manager.save_result(task_id, worker, make_result(manager.tasks[task_id])) == "accepted"
    assert manager.check_all_complete()


def test_a_task_that_was_never_handed_out_takes_no_result(managers, folder, make_result):
    manager = managers(None)
    manager.load_state(write_old(folder / "state.json", old_task(0)))
    with pytest.raises(UnknownAttempt):
        manager.save_result("first_0_42", "w", make_result(manager.tasks["first_0_42"]))


def test_what_an_old_state_calls_complete_counts_only_with_a_row(managers, folder, caplog):
    (folder / "out/first").mkdir(parents=True)
    columns = [*OLD_CONFIG][:10]
    header = ["phase", *columns, "mean_test_acc", "seed"]
    row = ["first", *(str({**OLD_CONFIG, "width_factor": 1}[name]) for name in columns), "0.75", "42"]
    (folder / "out/first/final_results.csv").write_text(",".join(header) + "\n" + ",".join(row) + "\n")
    tasks = [old_task(number, status="complete") for number in (0, 1, 2)]
    manager = managers(None)
    with caplog.at_level(logging.WARNING):
        manager.load_state(write_old(folder / "state.json", *tasks))
    status = manager.get_status()
    assert (status["complete"], status["pending"]) == (1, 2)
    assert "calls 2 tasks complete of which no result is found; they will run again" in caplog.text


def test_two_spellings_of_one_experiment_become_one_task(managers, folder):
    clean = old_task(0, config={"poison_ratio": 0, "width_factor": 4})
    same = old_task(1, config={"poison_ratio": 0.0, "width_factor": 4, "poison_type": "random_noise"})
    manager = managers(None)
    manager.load_state(write_old(folder / "state.json", clean, same))
    assert list(manager.tasks) == ["first_0_42"]


def test_a_state_is_taken_over_into_a_running_sweep_without_touching_it(managers, folder, two_phases, make_result):
    manager = managers()
    done = manager.get_next_task("w")
    manager.save_result(done["task_id"], "w", make_result(done), done["attempt"])
    before = dict(manager.tasks)
    known = {name: before["first_2_1"]["config"][name] for name in OLD_CONFIG if name != "output_dir"}
    taken = old_task(2, seed=1, config=known, retry_count=3)
    manager.load_state(write_old(folder / "state.json", taken, old_task(5)))
    assert before.items() <= dict(manager.tasks).items()
    assert manager.tasks["first_2_1"]["retry_count"] == 0  # our own knowledge of it is newer
    assert "first_5_42" in manager.tasks


def test_every_problem_of_a_state_is_told_and_nothing_is_changed(managers, folder):
    first = old_task(0, config={"learning_rate": 0.1, "poison_type": "label_flop"})
    second = old_task(1, config={"agregator": "median", "depth": -1})
    third = old_task(2, status="lost")
    fourth = {"task_id": "x"}
    path = write_old(folder / "state.json", old_task(3))
    content = json.loads(path.read_text())
    content["tasks"].update({task["task_id"]: task for task in (first, second, third, fourth)})
    content["tasks"]["first_4_42"] = old_task(4, assigned_at="yesterday")
    path.write_text(json.dumps(content))
    manager = managers(None)
    with pytest.raises(ConfigError) as caught:
        manager.load_state(path)
    message = str(caught.value)
    assert "tasks.first_0_42.config.learning_rate: there is no such parameter" in message
    assert '"label_flop" is not a poison type; did you mean "label_flip"?' in message
    assert 'tasks.first_1_42.config.agregator: there is no such parameter; did you mean "aggregator"?' in message
    assert "tasks.first_1_42.config.depth: -1 is not allowed" in message
    assert "tasks.first_2_42.status: \"lost\"; expected 'pending', 'assigned', 'complete' or 'failed'" in message
    assert 'tasks.x: expected a task with a "config"' in message
    assert 'tasks.first_4_42.assigned_at: "yesterday"; expected a time in ISO 8601' in message
    assert len(caught.value.problems) == 7
    assert len(manager.tasks) == 0


NO_STATES = {
    "nothing": ("", "is not JSON as it is read here (Expecting value at character 0: the end)"),
    "cut off": ('{"tasks": {', "is not JSON as it is read here (Expecting property name enclosed in double quotes at"),
    "a list": ("[]", 'is no state of an experiment manager: it has no "tasks"'),
    "tasks in a list": ('{"tasks": []}', 'is no state of an experiment manager: it has no "tasks"'),
    "a newer one": (
        '{"tasks": {}, "format": "fedsweep-state", "version": 2}',
        "was written by a newer fedsweep or another program",
    ),
    "nesting": ('{"tasks": ' + "[" * 100_000, "may nest at most 32 levels"),
    "a key twice": ('{"tasks": {}, "tasks": {}}', 'the key "tasks" stands twice'),
    "Infinity": ('{"tasks": {}, "last_attempt": Infinity}', "Infinity is not a JSON number"),
    "a number without end": (
        '{"tasks": {}, "last_attempt": ' + "9" * 5000 + "}",
        "a number has 5,000 digits; at most 400",
    ),
    "half a surrogate pair": ('{"tasks": {"\\ud800": {}}}', "a string has half of a surrogate pair"),
    "a byte-order mark": ("\ufeff{}", "expected UTF-8 without a byte-order mark"),
    "an attempt that is no number": (
        '{"tasks": {}, "last_attempt": "7"}',
        'last_attempt is "7"; expected a whole number',
    ),
    "attempts beyond what SQLite counts": (
        json.dumps({"tasks": {}, "last_attempt": 2**63 - 1}),
        "last_attempt is 9223372036854775807; expected at most 4,611,686,018,427,387,904",
    ),
    "results in a list": ('{"tasks": {}, "results": [1]}', "results is [1]; expected an object"),
    "assigned tasks in a list": ('{"tasks": {}, "assigned_tasks": [1]}', "assigned_tasks is [1]; expected an object"),
}


@pytest.mark.parametrize(("content", "message"), NO_STATES.values(), ids=NO_STATES.keys())
def test_files_that_are_no_state_are_refused_in_one_line(managers, folder, content, message):
    (folder / "state.json").write_text(content)
    with pytest.raises(StateError) as caught:
        managers(None).load_state("state.json")
    assert str(caught.value).startswith("state.json ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("; nothing was changed")
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 2


@pytest.mark.timeout(20)  # opening a FIFO the usual way waits for ever
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_bytes(b"\xff\xfe{}"), "is not JSON"),
        (lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."), "is not JSON"),
        (lambda path: path.write_text('{"tasks": ' + "[" * 100_000), "is not JSON"),
        (lambda path: path.write_text('{"tasks": {"a": ' + "1" * 5000 + "}}"), "is not JSON"),
        (
            lambda path: path.write_text('{"name": "package", "version": "1.0.0"}'),
            "is no state of an experiment manager",
        ),
        (lambda path: path.mkdir(), r"cannot be read \(it is not a plain file\)"),
        (os.mkfifo, r"cannot be read \(it is not a plain file\)"),
        (lambda path: path.symlink_to("/dev/zero"), r"cannot be read \(it is not a plain file\)"),
        (lambda path: path.symlink_to("nowhere"), r"cannot be read \(No such file or directory\)"),
        (lambda path: path.symlink_to(path.name), r"cannot be read \(Too many levels of symbolic links\)"),
    ],
    ids=[
        *("UTF-16", "a pickle", "100,000 levels", "a huge number", "of another program", "a folder", "a FIFO"),
        *("a device", "a link to nothing", "a link to itself"),
    ],
)
def test_what_is_no_json_state_is_refused_in_one_line_and_nothing_is_changed(managers, folder, make, words):
    path = folder / "experiment_state.json"
    make(path)
    before = path.lstat()
    manager = managers()
    tasks = dict(manager.tasks)
    with pytest.raises(StateError, match=rf"experiment_state\.json {words}") as caught:
        manager.load_state("experiment_state.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; nothing was changed")
    assert dict(manager.tasks) == tasks
    assert (path.lstat().st_mode, path.lstat().st_size) == (before.st_mode, before.st_size)


def test_a_state_torn_at_any_byte_is_refused(managers, folder):
    path = write_old(folder / "state.json", old_task(0))
    whole = path.read_bytes()
    manager = managers(None)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(StateError, match="is not JSON"):
            manager.load_state(path)
    assert len(manager.tasks) == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"last_attempt": -5}, "last_attempt is -5; expected at least 0"),
        ({"last_attempt": "many"}, 'last_attempt is "many"; expected a whole number'),
        ({"last_attempt": float("inf")}, "is not JSON as it is read here"),
        ({"note": "\ud800"}, "half of a surrogate pair"),
        ({"results": ["x"]}, r'results is \["x"\]; expected an object'),
        ({"assigned_tasks": ["first_0_42"]}, r'assigned_tasks is \["first_0_42"\]; expected an object'),
    ],
)
def test_what_stands_beside_the_tasks_must_make_sense_too(managers, folder, fields, words):
    (folder / "state.json").write_text(json.dumps({"tasks": {"first_0_42": old_task(0)}, **fields}))
    manager = managers(None)
    with pytest.raises(StateError, match=words):
        manager.load_state("state.json")
    assert len(manager.tasks) == 0


@pytest.mark.timeout(20)
def test_a_state_is_not_written_through_a_link_or_a_fifo(busy, folder):
    for make in (os.mkfifo, lambda path: path.symlink_to(folder / "precious")):
        for name in ("state.json", ".state.json.tmp"):
            make(folder / name)
            busy.save_state("state.json")
            assert json.loads((folder / "state.json").read_text())["format"] == "fedsweep-state"
            (folder / "state.json").unlink()
    assert not (folder / "precious").exists()


WRONG_TASKS = {
    "a huge number": ({"retry_count": 10**30}, "retry_count: 1000000000000000000000000000000; expected at most 1,000,"),
    "a negative number": ({"retry_count": -1}, "retry_count: -1; expected at least 0"),
    "a number as text": ({"retry_count": "2"}, 'retry_count: "2"; expected a whole number'),
    "a truth for a number": ({"retry_count": True}, "retry_count: true; expected a whole number"),
    "a number with a fraction": ({"retry_count": 1e300}, "retry_count: 1e+300; expected a whole number"),
    "a number for a name": ({"task_id": 7}, "task_id: 7; expected a string"),
    "a folder for a list": ({"output_dirs": "out/first"}, 'output_dirs: "out/first"; expected a list'),
    "a number for a folder": ({"output_dirs": [5]}, "output_dirs.0: 5; expected a string"),
    "a number for a cell": ({"cells": [5]}, "cells.0: 5; expected an object"),
    "a number that is none": ({"losses": "many"}, 'losses: "many"; expected a whole number'),
    "an error that is no text": ({"last_error": {"a": 1}}, 'last_error: {"a": 1}; expected a string'),
    "a holder that is no name": ({"assigned_to": ["w"]}, 'assigned_to: ["w"]; expected a string'),
    "a time that no clock shows": (
        {"assigned_at": "9999-12-31T23:59:59-23:59"},
        '-23:59"; expected a time in ISO 8601',
    ),
    "a time that is a number": ({"assigned_at": 5}, "assigned_at: 5; expected a time in ISO 8601"),
    "NUL in a folder": ({"output_dir": "a\0b"}, 'output_dir: "a\\u0000b"; it has a character that cannot be printed'),
    "an empty folder": ({"output_dirs": [""]}, 'output_dirs.0: ""; expected at least 1 character'),
    "a name that acts on a terminal": (
        {"phase": "\x1b[2J"},
        'phase: "\\u001b[2J"; it has a character that cannot be printed',
    ),
    "a name without end": ({"task_id": "x" * 300}, "...; expected at most 256 characters"),
    "a cell without a phase": ({"cells": [{"output_dir": "o", "config": {}}]}, "cells.0.phase: missing"),
    "a cell of another experiment": (
        {"cells": [{"phase": "p", "output_dir": "o", "config": {"depth": 5}}]},
        "cells.0.config: another experiment than that of the task",
    ),
    "a wrong value in a cell": (
        {"cells": [{"phase": "p", "output_dir": "o", "config": {"depth": "x"}}]},
        'cells.0.config.depth: "x" is a string; depth is a whole number from 0 to 1,024',
    ),
}


@pytest.mark.parametrize(("fields", "message"), WRONG_TASKS.values(), ids=WRONG_TASKS.keys())
def test_a_task_with_a_wrong_field_is_refused_in_one_line_and_nothing_is_changed(managers, folder, fields, message):
    task = old_task(0) | fields
    (folder / "state.json").write_text(json.dumps({"tasks": {"first_0_42": task, "first_1_42": old_task(1)}}))
    manager = managers(None)
    with pytest.raises(ConfigError) as caught:
        manager.load_state("state.json")
    [problem] = caught.value.problems
    assert str(problem).startswith("state.json: tasks.first_0_42.")
    assert message in str(problem)
    assert str(problem).isprintable()
    assert len(str(problem)) < 300
    assert len(manager.tasks) == 0


def test_a_key_that_acts_on_a_terminal_is_shown_escaped(managers, folder):
    (folder / "state.json").write_text(json.dumps({"tasks": {"\x1b[2J" * 100: 1}}))
    with pytest.raises(ConfigError) as caught:
        managers(None).load_state("state.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


def test_only_json_files_are_read_and_written_by_path(managers, folder):
    manager = managers(None)
    with pytest.raises(StateError, match=r"missing\.json cannot be read"):
        manager.load_state("missing.json")
    for call in (manager.load_state, manager.save_state):
        with pytest.raises(StateError, match=r"state.pkl is not a .json file"):
            call("state.pkl")


# ---- ours


@pytest.fixture
def busy(managers, make_result, clock):
    """A manager with tasks in every state."""
    manager = managers()
    tasks = [manager.get_next_task("w") for _ in range(4)]
    manager.save_result(tasks[0]["task_id"], "w", make_result(tasks[0], device="cpu"), tasks[0]["attempt"])
    manager.mark_failed(tasks[1]["task_id"], "w", "ValueError: once", tasks[1]["attempt"])
    manager.sweep.ledger._db.execute("UPDATE tasks SET failures = 3 WHERE task_id = ?", (tasks[2]["task_id"],))
    manager.mark_failed(tasks[2]["task_id"], "w", "ValueError: for good", tasks[2]["attempt"])
    return manager


def test_our_state_can_be_read_by_people(busy, folder, clock):
    busy.save_state("state.json")
    state = json.loads((folder / "state.json").read_text())
    assert set(state) == {
        *("format", "version", "saved_at", "last_attempt", "tasks", "completed_tasks", "assigned_tasks", "results")
    }
    assert state["saved_at"] == clock.now().isoformat()
    task = next(task for task in state["tasks"].values() if task["status"] == "assigned")
    assert datetime.fromisoformat(task["assigned_at"]) == clock.now()
    counts = {status: sum(t["status"] == status for t in state["tasks"].values()) for status in get_args(Status)}
    assert counts == {"pending": 5, "assigned": 1, "complete": 1, "failed": 1}
    assert state["completed_tasks"] == list(busy.completed_tasks)
    assert set(state["assigned_tasks"]) == set(busy.assigned_tasks)
    assert list(state["results"]) == list(busy.completed_tasks)
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_our_state_goes_round(busy, folder, managers, check_sound):
    busy.save_state("state.json")
    before = {key: value for key, value in busy.tasks.items()}
    results = dict(busy.sweep.ledger.view.results())
    varying = busy.sweep.ledger.view.varying("out/second")
    last_attempt = busy.sweep.ledger.view.last_attempt()
    busy.close()
    for path in (folder / ".fedsweep").iterdir():
        path.unlink()
    manager = managers(None)
    manager.load_state("state.json")
    assert {key: value for key, value in manager.tasks.items()} == before
    assert dict(manager.sweep.ledger.view.results()) == results
    assert manager.sweep.ledger.view.varying("out/second") == varying
    while manager.get_next_task("v") is not None:
        pass
    handed_out = [task for task in manager.sweep.ledger.view.all_tasks() if task.assigned_to == "v"]
    assert len(handed_out) == 5
    assert min(task.attempt for task in handed_out) > last_attempt
    # The same configuration finds all of them again.
    again = managers()
    assert again.get_status()["config_change"] == {"added": 0, "kept": 8, "removed": 0, "restored": 0}
    again.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_saving_replaces_the_file_at_once_or_not_at_all(busy, folder, monkeypatch):
    busy.save_state("state.json")
    before = (folder / "state.json").read_bytes()

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space left"):
            busy.save_state("state.json")
    assert (folder / "state.json").read_bytes() == before
