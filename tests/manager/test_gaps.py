"""The cells without a result, from the ledger of a sweep that runs or rests, and what a report makes of them."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from fedsweep.errors import StateError, UsageError
from fedsweep.manager import opening
from fedsweep.manager.gaps import find_gaps
from fedsweep.manager.opening import reading
from fedsweep.report import report, words_without_results
from fedsweep.report.coverage import coverage_note
from fedsweep.report.labels import constants
from fedsweep.report.tables import as_records

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
        gaps = find_gaps(STATE, [ATTACK, CLEAN, Path("elsewhere")])
        assert {folder: counted(found) for folder, found in gaps.items()} == {ATTACK: LOW, CLEAN: LOW[:2]}
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
        assert find_gaps(STATE, [name])
    monkeypatch.chdir(folder / "out")
    assert find_gaps(Path("../.fedsweep"), [Path("attack")])


def test_what_the_present_grid_does_not_ask_for_is_no_gap(sweep, managers):
    managers(SWEEP.replace("[100, 0.1]", "[100]"))
    assert find_gaps(STATE, [ATTACK]) == {ATTACK: []}


def test_without_a_ledger_of_the_folder_a_report_says_that_it_does_not_know(sweep, folder):
    shutil.copytree(ATTACK, "copy")
    why = "no sweep in {} writes there; --state-dir names that of the sweep"
    for state_dir in (STATE, Path("nowhere")):
        [made] = report(["copy"], formats=(), state_dir=state_dir).folders
        assert made.note == why.format(state_dir)
        assert len(made.cells) == len(made.summary)
    assert report(["copy"], formats=()).folders[0].note == ""


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
