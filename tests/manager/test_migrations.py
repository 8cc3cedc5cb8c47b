"""Ledgers of earlier versions: opened, brought up to date, and nothing lost."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from fedsweep.errors import StateError
from fedsweep.manager import schema
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.records import Counts
from fedsweep.manager.schema import MIGRATIONS
from fedsweep.plan.cohort import cohort_key, expected_cost, sharing_key
from fedsweep.plan.experiment import PARAMETERS, from_config

# What the ledger of version 1 was made of, see `conftest.py`.
GRID = """\
defaults: {dataset: digits, model_type: lr, depth: 1, num_clients: 2, output_dir: out}
seeds: [1, 2]
p:
  combinations:
    - width_factor: [2, 4]
    - poison_ratio: [0.0, 0.5]
q:
  defaults: {depth: 0}
  combinations:
    - width_factor: [2, 4]
"""


def shape_of(path: Path) -> dict[str, str]:
    """The columns of every table, and every index and trigger."""
    db = sqlite3.connect(path)
    made = db.execute("SELECT name, type, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'").fetchall()
    shape = {
        name: str(db.execute(f"SELECT name, type FROM pragma_table_xinfo('{name}')").fetchall())
        if kind == "table"
        else " ".join(sql.split())
        for name, kind, sql in made
    }
    db.close()
    return shape


def test_a_ledger_of_version_1_opens_with_everything_that_was_in_it(old, ledgers):
    ledger = ledgers()
    assert ledger.view.counts() == Counts(pending=8, assigned=1, complete=1)
    assert ledger.view.result(1)["device"] == "cpu"
    failed, held = ledger.view.task("p_0_2"), ledger.view.task("p_1_1")
    assert (failed.failures, failed.last_error) == (1, "ValueError: no")
    assert (held.status, held.attempt, held.assigned_to) == ("assigned", 3, "host-2")
    assert ledger.renew("p_1_1", "host-2", 3)
    assert ledger.view.meta("plan_digest") == "digest of version 1"
    assert ledger._db.execute("SELECT sum(amount) FROM unfinished").fetchone()[0] == 9


def test_its_tasks_have_what_the_queue_is_ordered_by(old, ledgers):
    ledger = ledgers()
    rows = ledger._db.execute("SELECT number, cohort, sharing, cost FROM tasks").fetchall()
    for row in rows:
        task = ledger.view.task_number(row["number"])
        assert set(task.config) == set(PARAMETERS)  # run options that came later have their defaults
        experiment = from_config(task.config)
        assert row["cohort"] == task.cohort == cohort_key(experiment)
        assert (row["sharing"], row["cost"]) == (sharing_key(experiment), expected_cost(experiment))
    tasks = [ledger.hand_out("w", 60, max_tasks=10) for _ in range(4)]
    assert [[task.task_id for task in together] for together in tasks] == [
        ["q_0_1", "q_0_2"],  # all pixels times all classes is the most
        ["p_2_1", "p_3_1", "p_2_2", "p_3_2"],  # the wide ones, seed by seed
        ["p_1_2"],
        [],  # to a worker that holds others the one that failed does not go
    ]
    assert [task.attempt for together in tasks for task in together] == [5, 6, 7, 8, 9, 10, 11]
    assert ledger.hand_out("v", 60, max_tasks=10)[0].task_id == "p_0_2"


def test_a_grid_stored_into_it_changes_nothing_else(old, ledgers, make_grid):
    ledger = ledgers()
    before = list(ledger.view.all_tasks())
    change = ledger.store_plan(make_grid(GRID).tasks)
    assert str(change) == "0 added, 10 kept"
    assert list(ledger.view.all_tasks()) == before


def test_it_has_then_the_shape_of_a_new_one(old, tmp_path):
    Ledger(old).close()
    Ledger(tmp_path / "new.sqlite3").close()
    assert shape_of(old) == shape_of(tmp_path / "new.sqlite3")
    db = sqlite3.connect(old)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
    db.close()


def test_a_migration_that_breaks_off_has_changed_nothing(old, monkeypatch):
    before, shape = old.read_bytes(), shape_of(old)
    broken = MIGRATIONS[1] + "\nSELECT no_such_function();\n"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (MIGRATIONS[0], broken))
        with pytest.raises(StateError, match="cannot be used"):
            Ledger(old)
    assert shape_of(old) == shape
    assert len(before) == old.stat().st_size
    ledger = Ledger(old)
    assert ledger.view.counts() == Counts(pending=8, assigned=1, complete=1)
    ledger.close()
