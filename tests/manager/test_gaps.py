"""The cells without a result, from the ledger of a sweep that runs or rests, and what a report makes of them."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from pandas import read_csv

from fedsweep.errors import StateError, UsageError
from fedsweep.manager import opening
from fedsweep.manager.gaps import find_plans
from fedsweep.manager.opening import reading
from fedsweep.report import Report, report, words_without_results
from fedsweep.report.coverage import coverage_note
from fedsweep.report.labels import constants, varying
from fedsweep.report.tables import as_records, show_report

STATE = Path(".fedsweep")
ATTACK, CLEAN = Path("out/attack"), Path("out/clean")
SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1, 2]
attack:
  combinations:
    - alpha: [100, 0.1]
    - poison_ratio: [0.0, 0.5]
clean:
  defaults: {alpha: 0.1}
  combinations:
    - poison_ratio: [0.0]
"""


@pytest.fixture
def sweep(managers, make_result):
    """A sweep whose manager is still there: all with alpha 100 is complete; of alpha 0.1 nothing is."""
    manager = managers(SWEEP)
    view = manager.sweep.ledger.view
    low = [task_id for task_id in view.task_ids() if view.task(task_id).config["alpha"] == 0.1]
    failed, cancelled, *_ = low
    manager.sweep.cancel([cancelled])
    while task := manager.get_next_task("w"):
        if task["task_id"] not in low:
            manager.save_result(task["task_id"], "w", make_result(task))
        elif task["task_id"] == failed:
            manager.mark_failed(task["task_id"], "w", "boom")
    return manager


def counted(gaps):
    return sorted((gap.values["alpha"], gap.values["poison_ratio"], gap.values["seed"], gap.reason) for gap in gaps)


LOW = [
    (0.1, 0.0, 1, "failed"),
    (0.1, 0.0, 2, "cancelled"),
    (0.1, 0.5, 1, "unfinished"),
    (0.1, 0.5, 2, "unfinished"),
]


def test_every_cell_without_a_result_is_a_gap_while_the_manager_runs_and_afterwards(sweep):
    for _ in ("running", "at rest"):
        plans = find_plans(STATE, [ATTACK, CLEAN, Path("elsewhere")])
        assert {folder: counted(plan.gaps) for folder, plan in plans.items()} == {ATTACK: LOW, CLEAN: LOW[:2]}
        sweep.close()


def test_a_report_tells_of_what_failed(sweep):
    made = report([ATTACK], formats=("png",), state_dir=STATE)
    [folder] = made.folders
    assert folder.note == ""
    assert "alpha" not in constants(folder.cells)
    assert coverage_note(folder.cells, lambda name, value: f"{name} {value}") == (
        "4 of 8 runs have no result (1 failed, 1 cancelled, 2 not finished): all with alpha 0.1"
    )
    assert len(folder.summary) == 2
    assert len(as_records(made)["folders"][0]["without_result"]) == 2


def test_a_folder_without_any_result_says_why(sweep):
    with pytest.raises(UsageError, match=r"^out/clean has no results; of its 2 runs: 1 failed, 1 cancelled$"):
        report([CLEAN], state_dir=STATE)
    assert words_without_results([CLEAN, Path("x")], STATE) == [
        "out/clean has no results; of its 2 runs: 1 failed, 1 cancelled"
    ]


def test_folders_are_found_by_other_names_and_from_elsewhere(sweep, folder, monkeypatch):
    sweep.close()
    (folder / "link").symlink_to("out")
    for name in (folder / "out/attack", Path("link/attack"), Path("out/../out/attack/")):
        assert find_plans(STATE, [name])
    monkeypatch.chdir(folder / "out")
    assert find_plans(Path("../.fedsweep"), [Path("attack")])


def test_what_the_present_grid_does_not_ask_for_is_no_gap(sweep, managers):
    managers(SWEEP.replace("[100, 0.1]", "[100]"))
    assert find_plans(STATE, [ATTACK])[ATTACK].gaps == []


def test_without_a_ledger_of_the_folder_a_report_says_that_it_does_not_know(sweep, folder):
    shutil.copytree(ATTACK, "copy")
    why = "no sweep in {} writes there; --state-dir names that of the sweep"
    for state_dir in (STATE, Path("nowhere")):
        [made] = report(["copy"], formats=(), state_dir=state_dir).folders
        assert made.note == why.format(state_dir)
        assert len(made.cells) == len(made.summary)
    assert report(["copy"], formats=()).folders[0].note == why.format("a .fedsweep here or above it")


@pytest.fixture
def edited(sweep, managers, make_result):
    """The sweep after its clients became three and two rounds were asked for: of that, all with seed 1 is complete."""
    sweep.close()
    manager = managers(SWEEP.replace("num_clients: 2", "num_clients: 3, global_rounds: 2"))
    while task := manager.get_next_task("w"):
        if task["seed"] == 1:
            manager.save_result(task["task_id"], "w", make_result(task))
        else:
            manager.mark_failed(task["task_id"], "w", "boom")
    manager.close()
    return manager


def test_rows_of_an_earlier_configuration_are_left_out(edited):
    [made] = report([ATTACK], formats=(), state_dir=STATE).folders
    for path in (ATTACK / "final_results.csv", ATTACK / "summary.csv"):
        assert len(read_csv(path)) == {"final_results.csv": 8, "summary.csv": 6}[path.name]
        assert set(read_csv(path)["global_rounds"]) == {2, 10}
    assert made.left_out == 4
    assert (made.summary["n_seeds"] == 1).all()
    assert varying(made.cells) == ["poison_ratio", "alpha"]
    assert len(made.cells) == 4
    assert coverage_note(made.cells, lambda name, value: f"{name} {value}").startswith("4 of 8 runs have no result")
    assert constants(made.cells)["num_clients"] == 3
    assert constants(made.cells)["global_rounds"] == 2
    assert as_records(Report((made,)))["folders"][0]["rows_left_out"] == 4


def test_rows_of_an_earlier_configuration_are_shown_if_asked_for(edited):
    [made] = report([ATTACK], formats=(), state_dir=STATE, every_row=True).folders
    assert made.left_out == 0
    assert {"num_clients", "global_rounds"} <= set(varying(made.cells))
    assert len(made.cells) == 6


def test_an_earlier_configuration_that_comes_back_is_the_present_one(edited, managers):
    managers(SWEEP).close()
    [made] = report([ATTACK], formats=(), state_dir=STATE).folders
    assert made.left_out == 4
    assert constants(made.cells)["num_clients"] == 2
    assert "global_rounds" not in made.cells  # 10, as built in


def test_a_result_keeps_the_rows_under_which_the_present_grid_asks_for_it(managers, make_result):
    """Without poison all attacks are one experiment, with a row for each."""
    both = SWEEP.replace("- alpha: [100, 0.1]", "- poison_type: [label_flip, random_noise]")
    for text in (both, both.replace(", random_noise", "")):
        manager = managers(text)
        while task := manager.get_next_task("w"):
            manager.save_result(task["task_id"], "w", make_result(task))
        manager.close()
    [made] = report([ATTACK], formats=(), state_dir=STATE).folders
    assert made.left_out == 4
    assert varying(made.cells) == ["poison_ratio"]
    assert made.cells["n_seeds"].tolist() == [2, 2]


def test_rows_of_others_stay_and_nothing_is_said_of_their_settings(edited):
    path = ATTACK / "final_results.csv"
    names, *_, last = path.read_text().splitlines()
    signature = last.split(",")[names.split(",").index("signature")]
    path.write_text(f"{path.read_text()}{last.replace(signature, 'theirs')}\n")
    [made] = report([ATTACK], formats=(), state_dir=STATE).folders
    assert made.left_out == 4
    assert not {"num_clients", "global_rounds"} & set(made.cells)


def test_a_folder_to_which_the_present_grid_does_not_write_shows_all_its_rows(sweep, managers):
    sweep.close()
    managers(SWEEP.replace("out/{phase}", "other/{phase}")).close()
    [made] = report([ATTACK], formats=(), state_dir=STATE).folders
    assert made.left_out == 0
    assert len(made.summary) == 2
    assert made.note


def test_the_ledger_is_found_from_elsewhere(sweep, folder, monkeypatch):
    sweep.close()
    (folder / "else/where").mkdir(parents=True)
    for place, name in (("out", "attack"), ("else/where", folder / ATTACK), ("else", "../out/attack"), (ATTACK, ".")):
        monkeypatch.chdir(folder / place)
        [made] = report([name], formats=()).folders
        assert made.note == ""
        assert len(made.cells) == 4


def test_the_ledger_of_a_sweep_that_writes_where_it_lies_is_found(sweep, managers, folder, monkeypatch):
    sweep.close()
    managers(SWEEP.replace("out/{phase}", ".")).close()
    monkeypatch.chdir(folder / "out")
    assert report([".."], formats=()).folders[0].note == ""


def test_where_the_present_grid_has_no_result_yet_all_its_cells_are_without_one(sweep, managers):
    sweep.close()
    managers(SWEEP.replace("num_clients: 2", "num_clients: 3")).close()
    [made] = report([ATTACK], formats=("png",), state_dir=STATE).folders
    assert (made.left_out, made.plots, len(made.summary), len(made.cells)) == (4, (), 0, 4)
    show_report(Report((made,)))


def test_a_ledger_above_is_not_of_a_copy_that_has_the_same_name_here(sweep, folder, monkeypatch):
    sweep.close()
    shutil.copytree("out", "here/out")
    monkeypatch.chdir(folder / "here")
    both = report([ATTACK, folder / ATTACK], formats=()).folders
    assert [bool(made.note) for made in both] == [True, False]


def test_the_nearest_ledger_that_writes_there_is_taken(edited, folder, monkeypatch):
    """Each of these is of another sweep, or of none."""
    shutil.copytree(STATE, "out/.fedsweep")  # writes to out/out
    (ATTACK / ".fedsweep").mkdir()
    (ATTACK / ".fedsweep/ledger.sqlite3").write_bytes(b"no more")
    (folder / "x").mkdir()
    monkeypatch.chdir(folder / "x")
    [made] = report([folder / ATTACK], formats=()).folders
    assert made.note == ""
    assert made.left_out == 4


def test_a_ledger_that_cannot_be_read_is_named_and_stops_no_report(sweep):
    sweep.close()
    (STATE / "ledger.sqlite3").write_bytes(b"no more")
    [made] = report([ATTACK], formats=(), state_dir=STATE).folders
    assert made.note.startswith(".fedsweep/ledger.sqlite3 is not a state file of fedsweep")


def test_a_ledger_that_changes_while_it_is_copied_is_copied_again(sweep, monkeypatch):
    sweep.close()
    ledger = STATE / "ledger.sqlite3"
    copied, times = shutil.copyfile, []

    def copy_and_change(source, target):
        copied(source, target)
        times.append(source)
        if len(times) == 1:
            db = sqlite3.connect(ledger)
            db.execute("INSERT INTO meta VALUES ('late', 'yes')")
            db.commit()
            db.close()

    monkeypatch.setattr(opening.shutil, "copyfile", copy_and_change)
    with reading(ledger) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'late'").fetchone()[0] == "yes"
    assert len(times) > 1


def test_a_ledger_that_never_stands_still_is_refused(sweep, monkeypatch):
    ledger, count = STATE / "ledger.sqlite3", iter(range(1000))
    monkeypatch.setattr(opening, "_generation", lambda path: (next(count),))
    with (
        pytest.raises(StateError, match="is changed too often to be read while its manager runs; try again"),
        reading(ledger),
    ):
        pass
