"""What the commands that look into a sweep say to people."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedsweep.control import Sweep, ask_failures, end, retry, show_failures
from fedsweep.errors import ManagerUnreachable
from fedsweep.manager import ExperimentManager
from fedsweep.repeat import repeat
from fedsweep.run import _not_complete, _say_what_is_not_run, ask_status

GRID = "p: {combinations: [{width_factor: [1, 2]}]}"
TASK = {"task_id": "p_0_42", "seed": 42}
CONFIG = {
    "model_type": "lr",
    "depth": 0,
    "num_clients": 2,
    "global_rounds": 2,
    "engine": "batched",
}


def group(**changes: Any) -> dict[str, Any]:
    common = {"group": "3fa9c1", "cause": "KeyError: 'x'", "frame": "", "failures": 4, "failed": 1, "open": 0}
    places = {"task_ids": ["p_0_42"], "workers": ["w"], "hosts": ["h"], "text": "KeyError: 'x'"}
    times = {"first_at": "2026-01-01T00:00:00.123456+00:00", "last_at": "2026-01-01T00:00:07+00:00"}
    return common | places | times | {"repeat": "fedsweep repeat p_0_42"} | changes


def shown(capsys: pytest.CaptureFixture[str], *groups: dict[str, Any], earlier: bool = False, **said: Any) -> str:
    show_failures({"groups": groups, "left_out": 0, "set_aside": [], **said}, earlier=earlier)
    return capsys.readouterr().out


def test_times_are_shown_to_the_second(capsys):
    assert "from 2026-01-01T00:00:00+00:00 to 2026-01-01T00:00:07+00:00\n" in shown(capsys, group())
    same = group(last_at="2026-01-01T00:00:00.9+00:00")
    assert "at 2026-01-01T00:00:00+00:00\n" in shown(capsys, same)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "2 are tried again"),  # of a manager that does not say
        ({"hands_out": True}, "2 are tried again"),
        ({"hands_out": False}, "2 will be tried again when the sweep is started again"),
        ({"earlier": True}, "2 will not be tried again"),
    ],
)
def test_what_becomes_of_open_tasks_is_said_as_it_is(capsys, said, words):
    out = shown(capsys, group(open=2), **said)
    assert f"1 task failed for good, {words}\n" in out
    assert ("fedsweep retry 3fa9c1" in out) == ("earlier" not in said)


def test_failures_of_an_earlier_configuration_are_pointed_at(capsys):
    show_failures({"groups": [], "left_out": 0, "set_aside": [], "earlier": 3}, state_option=" --state-dir s")
    assert capsys.readouterr().out == (
        "Nothing has failed.\n\n3 tasks of an earlier configuration had failed and will not be run: "
        "fedsweep failures --earlier --state-dir s\n"
    )


def test_a_sweep_at_rest_tries_nothing_again_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(GRID)
    with ExperimentManager(["a.yaml"]) as manager:
        manager.load_all_configs()
        manager.generate_all_tasks()
        task = manager.get_next_task("w")
        manager.mark_failed(task["task_id"], "w", "ValueError: no")
    found = ask_failures(Sweep(tmp_path / ".fedsweep"))
    assert (found["groups"][0]["open"], found["hands_out"]) == (1, False)


def test_the_end_of_a_run_tells_each_cause_once_and_the_cancelled_apart(swept):
    with swept as manager:
        status = manager.get_status()
    assert [each["task_id"] for each in status["failures"]] == ["bad_0_42", "bad_1_42"]
    assert _not_complete(status, swept.state_dir).splitlines() == [
        "2 experiments failed for good:",
        "  2, such as bad_0_42: enough",
        "`fedsweep failures` says more, `fedsweep retry` lets them be tried again.",
        "Each has a log in its output folder's logs/; those of the workers are in .fedsweep/logs.",
        "2 experiments (gone_0_42, gone_1_42) were cancelled; `fedsweep retry cancelled` brings them back.",
    ]
    elsewhere = _not_complete({"failed": 1, "cancelled": 1}, Path("my state"))
    assert elsewhere == "1 experiment was cancelled; `fedsweep retry cancelled --state-dir 'my state'` brings it back."


def test_a_retry_says_plainly_that_there_is_nothing_to_try(swept):
    sweep = Sweep(swept.state_dir)
    hint = "; 2 cancelled stay so (`fedsweep retry cancelled` brings them back)."
    assert retry(sweep, []) == (
        f"2 tasks will be tried again (where nothing runs, once the sweep is started again){hint}"
    )
    assert retry(sweep, []) == f"Nothing to try again{hint}"
    assert retry(sweep, ["cancelled"]).startswith("2 tasks will be tried again")
    assert retry(sweep, []) == "Nothing to try again."


class Running:
    """Stands in for a sweep that runs."""

    def __init__(self, **answered: Any) -> None:
        self.answered = answered

    def ask_running(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"type": "ack"} | self.answered


@pytest.mark.parametrize(
    ("answered", "words"),
    [
        (
            {"workers": 2, "tasks": 24, "lease_s": 120.0},
            " Waiting for 2 workers with 24 tasks; a worker without a sign is given up after 120 s; "
            "`fedsweep stop` ends now.",
        ),
        ({"workers": 0, "tasks": 0, "lease_s": 120.0}, ""),
        ({}, ""),  # of a manager that does not say
    ],
)
def test_a_drain_says_whom_it_waits_for_and_how_long_at_most(answered, words):
    said = end(Running(**answered), "drain")
    assert said == (
        f"Workers finish what they hold and get nothing more; then all ends.{words} "
        "Everything finished is kept; the command that started the sweep goes on from there."
    )
    assert "Waiting" not in end(Running(**answered), "stop")


def test_status_at_rest_says_how_the_sweep_was_left(swept, fedsweep):
    done = fedsweep("status")
    assert (done.returncode, done.stdout) == (1, "")
    first, how_far = done.stderr.splitlines()
    assert first.startswith("fedsweep: no manager is running on .fedsweep; name another --state-dir")
    assert re.fullmatch(
        r"As it was left on \d\d \w+ \d\d:\d\d: 0 of 4 experiments complete, 2 failed for good, 2 cancelled\.", how_far
    )
    retry(Sweep(swept.state_dir), [])
    with pytest.raises(ManagerUnreachable, match="2 cancelled, 2 still to be run; the command that started it goes on"):
        ask_status(swept.state_dir)


def test_what_the_configuration_does_not_ask_for_is_counted_in_full_each_time(swept, caplog):
    caplog.set_level("INFO")
    for alpha, count in (("1, 2", 2), ("1", 3)):
        expected = f"{count} experiments of an earlier configuration are kept, with all results, but not run"
        (swept.state_dir.parent / "a.yaml").write_text(f"bad: {{combinations: [{{alpha: [{alpha}]}}]}}")
        for _ in range(2):  # the second finds nothing to change
            caplog.clear()
            with ExperimentManager(["a.yaml"], state_dir=swept.state_dir) as manager:
                assert manager.start() == 1
                status = manager.get_status()
            assert expected in caplog.text
            said: list[str] = []
            _say_what_is_not_run(status, said.append)
            assert said == [f"{expected}."]


# ---- repeat


def test_a_repeat_is_readable_and_its_json_has_every_digit(capsys):
    task = TASK | {"config": CONFIG}
    assert repeat(task, device="cpu", as_json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert repeat(task, device="cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "model_type lr, depth 0, num_clients 2, global_rounds 2, all else by default"
    record = result["history"][0]
    assert lines[2] == f"round 1/2: validation loss {record['val_loss']:.4f}, accuracy {record['val_acc']:.4f}"
    named = dict(line.split(maxsplit=1) for line in lines[4:])
    assert named["mean_test_acc"] == f"{result['mean_test_acc']:.4f}"
    assert "std_test_acc" not in named
    assert "attack_success_rate" not in named


@pytest.mark.parametrize("verbose", [False, True])
def test_an_error_that_says_what_to_do_is_one_line_of_it(capsys, verbose):
    task = TASK | {"config": CONFIG | {"num_clients": 900}}
    assert repeat(task, device="cpu", verbose=verbose) == 1
    said = capsys.readouterr().err
    assert "PartitionError: 1293 training samples are not enough" in said
    assert ("Traceback" in said) == verbose


def test_an_error_of_the_code_has_its_traceback(capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("fedsweep.repeat.run_single_experiment", broken)
    assert repeat(TASK | {"config": CONFIG}, device="cpu") == 1
    assert "Traceback" in capsys.readouterr().err
