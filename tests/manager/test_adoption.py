"""Rows that others wrote: which experiment they belong to, when they count, and when not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedsweep.manager.adoption import describe, read_parameters, read_result
from fedsweep.manager.columns import RESULT_COLUMNS, line
from fedsweep.manager.results import finished_signatures

FIRST, SECOND = Path("out/first/final_results.csv"), Path("out/second/final_results.csv")

ROW = {
    "phase": "first",
    "dataset": "digits",
    "model_type": "lr",
    "width_factor": "2",
    "depth": "1",
    "poison_ratio": "0.5",
    "poison_type": "label_flip",
    "alpha": "1",
    "data_ordering": "shuffle",
    "aggregator": "fedavg",
    "batch_size": "32",
    "mean_test_acc": "0.875",
    "std_test_acc": "0.0",
    "mean_test_loss": "0.25",
    "std_test_loss": "0",
    "mean_val_acc": "0.5",
    "std_val_acc": "0",
    "mean_val_loss": "1e-3",
    "std_val_loss": "0",
    "num_parameters": "650",
    "best_epoch": "7.0",
    "seed": "1",
}


def append(path: Path, *rows: dict[str, str], columns=RESULT_COLUMNS) -> None:
    """Append rows as an old tool does, under a header where there is no file yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def test_rows_of_an_old_tool_count_with_a_warning_that_says_so(managers, read_rows, caplog, check_sound):
    append(FIRST, ROW, {**ROW, "seed": "2"})
    manager = managers()
    assert manager.get_status()["complete"] == 2
    assert (
        "final_results.csv: 2 rows without a signature (lines 2, 3) matched on dataset to batch_size and seed alone; "
        "taken as done"
    ) in caplog.text
    rows = read_rows(FIRST)
    assert [(row["seed"], row["mean_test_acc"], row["best_epoch"], row["outcome"]) for row in rows] == [
        ("1", "0.875", "7", "ok"),
        ("2", "0.875", "7", "ok"),
    ]
    assert all(row["signature"].count("|") == 11 for row in rows)
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")
    assert not list(FIRST.parent.glob("*.torn-*"))  # everything in those rows is in the new ones


def test_they_count_once_and_are_not_warned_of_again(managers, caplog):
    append(FIRST, ROW)
    managers()
    caplog.clear()
    assert managers().get_status()["complete"] == 1
    assert "without a signature" not in caplog.text


@pytest.mark.parametrize(
    "spelling",
    [
        {"poison_ratio": "0.50"},
        {"poison_ratio": "5e-1", "alpha": "1.0", "width_factor": "2.0", "seed": "1.0"},
        {"alpha": " 1 "},
        {"poison_type": ""},  # says nothing, and nothing else fits... but random_noise does: see below
    ],
)
def test_numbers_match_however_they_are_spelled(managers, spelling, two_phases):
    text = two_phases.replace("[label_flip, random_noise]", "[label_flip]")
    append(FIRST, {**ROW, **spelling})
    assert managers(text).get_status()["complete"] == 1


@pytest.mark.parametrize("poison_type", ["label_flip", "random_noise", ""])
@pytest.mark.parametrize("ratio", ["0", "0.0"])
def test_a_clean_row_is_clean_whatever_it_says_of_the_attack(managers, read_rows, poison_type, ratio):
    """`second` has two clean cells, and `first` two for each seed: the row fills those that compute the same."""
    append(
        SECOND,
        {**ROW, "phase": "second", "poison_ratio": ratio, "poison_type": poison_type, "lr": "0.02"},
        columns=(*RESULT_COLUMNS, "lr"),
    )
    manager = managers()
    assert manager.get_status()["complete"] == 1
    assert [row["poison_type"] for row in read_rows(FIRST)] == ["label_flip", "random_noise"]
    assert [row["lr"] for row in read_rows(SECOND)] == ["0.02"]


def test_a_row_that_fits_several_experiments_is_not_taken(managers, caplog, read_rows):
    append(SECOND, {**ROW, "phase": "second", "poison_ratio": "0"})  # with lr 0.01 or 0.02?
    append(FIRST, {**ROW, "poison_type": ""})
    manager = managers()
    assert manager.get_status()["complete"] == 0
    assert caplog.text.count("more than one experiment has the values of line 2; not counted as done") == 2
    assert len(read_rows(SECOND)) == 1  # it stays
    assert managers().get_status()["complete"] == 0


def test_other_parameters_in_the_row_must_agree_too(managers):
    append(FIRST, {**ROW, "num_clients": "3"}, columns=(*RESULT_COLUMNS, "num_clients"))
    assert managers().get_status()["complete"] == 0
    FIRST.unlink()
    append(FIRST, {**ROW, "num_clients": "2"}, columns=(*RESULT_COLUMNS, "num_clients"))
    assert managers().get_status()["complete"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mean_test_acc": "n/a"}, "mean_test_acc is 'n/a', not a number"),
        ({"mean_test_acc": "nan"}, "mean_test_acc is 'nan', not a finite number"),
        ({"mean_test_acc": ""}, "mean_test_acc is empty"),
        ({"mean_test_acc": "87.5"}, "mean_test_acc is '87.5'; a share is from 0 to 1"),
        ({"mean_val_loss": "inf"}, "mean_val_loss is 'inf', not a finite number"),
        ({"best_epoch": "7.5"}, "best_epoch is '7.5', not a whole number"),
        ({"num_parameters": "-1"}, "num_parameters is -1; expected at least 0"),
    ],
)
def test_rows_whose_numbers_cannot_be_read_do_not_count(managers, caplog, change, reason, read_rows):
    append(FIRST, {**ROW, **change})
    assert managers().get_status()["complete"] == 0
    assert f"final_results.csv: line 2 does not count as done: {reason}" in caplog.text
    assert len(read_rows(FIRST)) == 1


def test_such_a_row_goes_once_the_experiment_has_its_own(managers, make_result, check_sound, clock):
    append(FIRST, {**ROW, "mean_test_acc": "n/a"})
    manager = managers()
    while task := manager.get_next_task("w"):
        manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    managers().close()
    check_sound(".fedsweep/ledger.sqlite3")
    assert "n/a" in Path("out/first/final_results.csv.torn-1").read_text()


def test_a_row_of_another_experiment_is_left_alone(managers, caplog):
    append(FIRST, {**ROW, "dataset": "mnist"}, {**ROW, "dataset": "no such dataset"}, {**ROW, "seed": "99"})
    before = FIRST.read_text().splitlines()[1:]
    manager = managers()
    assert manager.get_status()["complete"] == 0
    assert [row.rstrip(",") for row in FIRST.read_text().splitlines()[1:]] == before
    assert caplog.text == ""


def test_a_row_with_a_signature_belongs_to_that_computation_only(managers, folder):
    columns = (*RESULT_COLUMNS, "signature")
    signature = next(iter(managers().tasks.values()))["signature"]
    append(SECOND, {**ROW, "phase": "elsewhere", "signature": signature}, columns=columns)
    append(FIRST, {**ROW, "signature": signature.replace("digits", "mnist")}, columns=columns)
    manager = managers()
    assert list(manager.completed_tasks) == [signature]


def test_a_finished_folder_is_taken_over_by_a_fresh_state(managers, make_result, folder, check_sound):
    manager = managers()
    while task := manager.get_next_task("w"):
        origin = {"worker": "=w", "device": "cpu", "plan": "loop", "wall_time_s": 1.5}
        changes = {**origin, "attack_success_rate": 0.25, "rounds_run": 2}
        manager.save_result(task["task_id"], "w", make_result(task, **changes), task["attempt"])
    manager.close()
    before = FIRST.read_bytes()
    for path in (folder / ".fedsweep").iterdir():
        path.unlink()
    manager = managers()
    assert manager.get_status()["complete"] == 8
    assert sorted(FIRST.read_bytes().splitlines()) == sorted(before.splitlines())
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_a_diverged_row_counts_without_metrics(managers, read_rows):
    empty = dict.fromkeys([name for name in ROW if name.startswith(("mean", "std"))], "")
    columns = (*RESULT_COLUMNS, "outcome")
    append(FIRST, {**ROW, **empty, "outcome": "diverged"}, columns=columns)
    manager = managers()
    assert (manager.get_status()["complete"], manager.get_status()["diverged"]) == (1, 1)
    assert read_rows(FIRST)[0]["outcome"] == "diverged"


def test_two_rows_of_one_experiment_the_first_counts_and_the_other_is_kept_beside(managers, read_rows):
    append(FIRST, ROW, {**ROW, "mean_test_acc": "0.125"})
    managers()
    assert [row["mean_test_acc"] for row in read_rows(FIRST)] == ["0.875"]
    assert "0.125" in Path("out/first/final_results.csv.torn-1").read_text()


def test_an_unended_last_row_does_not_count(managers):
    """`…,42` torn to `…,4` is a row of another seed."""
    append(FIRST, ROW)
    FIRST.write_bytes(FIRST.read_bytes().rstrip(b"\r\n"))
    assert managers().get_status()["complete"] == 0
    assert Path("out/first/final_results.csv.torn-1").exists()


# ---- while the manager runs


def test_a_row_added_meanwhile_completes_the_task(managers, make_result, read_rows, check_sound):
    manager = managers()
    held = [manager.get_next_task("w") for _ in range(8)]
    ours = next(task for task in held if task["config"]["poison_ratio"] == 0.5 and task["seed"] == 1)
    manager.save_result(held[0]["task_id"], "w", make_result(held[0]), held[0]["attempt"])
    append(FIRST, ROW)  # 22 fields under a header that has more: what an old tool appends
    assert manager.refresh_completed() == 1
    assert manager.get_status()["assigned"] == 6
    # Its worker hears of it, and if it delivers all the same, that is a duplicate.
    from fedsweep.manager.protocol import Heartbeat, SubmitResult, TaskProgress

    held_tasks = tuple(TaskProgress(task_id=task["task_id"], attempt=task["attempt"]) for task in held[1:])
    beat = Heartbeat(type="heartbeat", worker_id="w", tasks=held_tasks)
    assert manager.answer(beat, False) == {"type": "ack", "drop": [ours["task_id"]]}
    submit = SubmitResult(
        type="submit_result",
        worker_id="w",
        task_id=ours["task_id"],
        attempt=ours["attempt"],
        result_data=make_result(ours),
    )
    assert manager.answer(submit, False) == {"type": "ack", "status": "duplicate"}
    assert len(manager.sweep.ledger.view.conflicts()) == 1
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_an_unchanged_file_is_not_read_again(managers, make_result, monkeypatch):
    manager = managers()
    task = manager.get_next_task("w")
    manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    manager.refresh_completed()
    assert "out/first" not in manager.sweep.projection.due()
    append(FIRST, ROW)
    assert "out/first" in manager.sweep.projection.due()


def test_finished_signatures_of_a_grid_need_no_state(make_grid, two_phases, folder):
    grid = make_grid(two_phases)
    assert finished_signatures(grid) == set()
    append(
        FIRST,
        ROW,
        {**ROW, "poison_ratio": "0"},
        {**ROW, "mean_test_acc": "?", "seed": "2"},
        {**ROW, "dataset": "mnist"},
    )
    by_signature = {task.signature: task.experiment for task in grid.tasks}
    found = [by_signature[signature] for signature in finished_signatures(grid)]
    assert sorted((each.poison_ratio, each.seed) for each in found) == [(0.5, 1)]  # the clean one may have either lr
    assert sorted(path.name for path in folder.rglob("*")) == ["final_results.csv", "first", "out"]


# ---- the pieces


def test_parameters_are_read_in_their_own_types():
    assert read_parameters(
        {"alpha": "1", "depth": "2.0", "target_class": "", "poison_type": "", "dataset": "'=x"[:0]}
    ) == {
        "alpha": 1.0,
        "depth": 2,
        "target_class": None,
    }
    with pytest.raises(ValueError, match="depth"):
        read_parameters({"depth": "deep"})


def test_a_result_has_the_fields_that_the_row_has():
    assert read_result({"mean_test_acc": "0.5", "worker": "'=w", "wall_time_s": "3", "device": ""}) == {
        "mean_test_acc": 0.5,
        "worker": "=w",
        "wall_time_s": 3.0,
    }


def test_long_lists_of_lines_are_cut():
    assert describe([3]) == "line 3"
    assert describe(range(2, 10)) == "lines 2, 3, 4, 5, 6 and 3 more"


def test_rows_written_by_pandas_without_a_last_column_are_read(managers):
    path = Path("out/first/final_results.csv")
    path.parent.mkdir(parents=True)
    index = line(["", *RESULT_COLUMNS]), line(["0", *ROW.values()])
    path.write_bytes(b"\n".join(index) + b"\n")  # DataFrame.to_csv() with its index
    assert managers().get_status()["complete"] == 1
