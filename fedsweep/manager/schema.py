"""The tables of the ledger's file, and the migrations that bring an older file to them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from functools import lru_cache

from fedsweep.plan.cohort import cohort_key, expected_cost, sharing_key
from fedsweep.plan.experiment import Experiment, RunOptions

APPLICATION_ID = 0x46535750  # "FSWP"; tells our files from those of other programs that use SQLite

# What the ledger means by these tables is said in `Ledger`. `counts` is made when tasks are added and then kept by a
# trigger, so that asking for the state of 100,000 tasks reads a few rows. A transition that would leave two open
# attempts of one task, two results of one task, or a task that is assigned to nobody cannot be committed.
_FIRST = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE tasks (
    number INTEGER PRIMARY KEY,
    signature TEXT NOT NULL UNIQUE,
    task_id TEXT NOT NULL UNIQUE,
    phase TEXT NOT NULL,
    output_dir TEXT NOT NULL,
    seed INTEGER NOT NULL,
    experiment TEXT NOT NULL,
    options TEXT NOT NULL,
    match_key TEXT NOT NULL,
    cohort TEXT NOT NULL,
    position INTEGER NOT NULL,
    orphaned INTEGER NOT NULL DEFAULT 0 CHECK (orphaned IN (0, 1)),
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'assigned', 'complete', 'failed')),
    diverged INTEGER NOT NULL DEFAULT 0 CHECK (diverged IN (0, 1)),
    attempt INTEGER,
    failures INTEGER NOT NULL DEFAULT 0 CHECK (failures >= 0),
    losses INTEGER NOT NULL DEFAULT 0 CHECK (losses >= 0),
    setbacks INTEGER NOT NULL DEFAULT 0,
    last_error TEXT,
    CHECK ((status = 'assigned') = (attempt IS NOT NULL))
);
CREATE INDEX queue ON tasks (setbacks, position) WHERE status = 'pending' AND orphaned = 0;
CREATE INDEX cohort_queue ON tasks (cohort, setbacks, position) WHERE status = 'pending' AND orphaned = 0;
CREATE INDEX failed_tasks ON tasks (position) WHERE status = 'failed';
CREATE INDEX tasks_by_position ON tasks (orphaned, position);
CREATE INDEX tasks_by_match_key ON tasks (match_key);

CREATE TABLE cells (
    number INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES tasks (number),
    digest BLOB NOT NULL,
    phase TEXT NOT NULL,
    output_dir TEXT NOT NULL,
    spelled TEXT NOT NULL,
    position INTEGER NOT NULL,
    active INTEGER NOT NULL DEFAULT 1 CHECK (active IN (0, 1)),
    UNIQUE (task, digest)
);
CREATE INDEX cells_by_output_dir ON cells (output_dir, position);
CREATE TABLE output_dirs (
    path TEXT PRIMARY KEY,
    varying TEXT NOT NULL,
    active INTEGER NOT NULL CHECK (active IN (0, 1))
) WITHOUT ROWID;

CREATE TABLE attempts (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    task INTEGER NOT NULL REFERENCES tasks (number),
    worker TEXT NOT NULL,
    lease_s REAL NOT NULL,
    started_at TEXT NOT NULL,
    ended_at TEXT,
    ended_as TEXT CHECK (ended_as IN ('result', 'failed', 'lost', 'released', 'overtaken', 'forgiven')),
    error TEXT,
    CHECK ((ended_at IS NULL) = (ended_as IS NULL))
);
CREATE UNIQUE INDEX one_open_attempt ON attempts (task) WHERE ended_as IS NULL;
CREATE INDEX attempts_by_task ON attempts (task);

CREATE TABLE results (
    number INTEGER PRIMARY KEY,
    task INTEGER NOT NULL UNIQUE REFERENCES tasks (number),
    attempt INTEGER,
    worker TEXT,
    source TEXT,
    received_at TEXT NOT NULL,
    wall_time_s REAL,
    data TEXT NOT NULL,
    history TEXT
);
CREATE TABLE conflicts (
    number INTEGER PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES tasks (number),
    attempt INTEGER,
    worker TEXT,
    received_at TEXT NOT NULL,
    data TEXT NOT NULL
);

CREATE TABLE counts (
    status TEXT NOT NULL,
    orphaned INTEGER NOT NULL,
    diverged INTEGER NOT NULL,
    amount INTEGER NOT NULL,
    PRIMARY KEY (status, orphaned, diverged)
) WITHOUT ROWID;
CREATE TRIGGER count_changed_task AFTER UPDATE OF status, orphaned, diverged ON tasks
WHEN (old.status, old.orphaned, old.diverged) IS NOT (new.status, new.orphaned, new.diverged) BEGIN
    UPDATE counts SET amount = amount - 1
    WHERE status = old.status AND orphaned = old.orphaned AND diverged = old.diverged;
    INSERT INTO counts VALUES (new.status, new.orphaned, new.diverged, 1)
    ON CONFLICT DO UPDATE SET amount = amount + 1;
END;
"""

# What `queue` goes by. A task that failed, or was lost twice, is tried `alone`, so that whatever it does happens to no
# other. `unfinished` says how many tasks of which cost wait or are under way, so that what is left is known without
# reading the queue; like `counts` it is made when tasks are added and then kept by a trigger.
_SECOND = """
DROP INDEX queue;
DROP INDEX cohort_queue;
ALTER TABLE tasks ADD COLUMN cost REAL NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN sharing TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN alone INTEGER NOT NULL AS (failures > 0 OR losses > 1) VIRTUAL;
UPDATE tasks SET
    options = options_of(options),
    cohort = cohort_of(experiment),
    sharing = sharing_of(experiment),
    cost = cost_of(experiment);
CREATE INDEX queue ON tasks (alone, setbacks, cost DESC, position) WHERE status = 'pending' AND orphaned = 0;
CREATE INDEX cohort_queue ON tasks (cohort, setbacks, cost DESC, position)
WHERE status = 'pending' AND orphaned = 0 AND alone = 0;
CREATE INDEX sharing_queue ON tasks (cohort, setbacks, sharing, cost DESC, position)
WHERE status = 'pending' AND orphaned = 0 AND alone = 0;
CREATE INDEX open_attempts_by_worker ON attempts (worker) WHERE ended_as IS NULL;

CREATE TABLE unfinished (cost REAL PRIMARY KEY, amount INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO unfinished
SELECT cost, count(*) FROM tasks WHERE status IN ('pending', 'assigned') AND orphaned = 0 GROUP BY cost;
CREATE TRIGGER count_unfinished_task AFTER UPDATE OF status, orphaned ON tasks
WHEN (old.status IN ('pending', 'assigned') AND old.orphaned = 0)
    != (new.status IN ('pending', 'assigned') AND new.orphaned = 0) BEGIN
    INSERT INTO unfinished VALUES (new.cost, iif(new.status IN ('pending', 'assigned') AND new.orphaned = 0, 1, -1))
    ON CONFLICT DO UPDATE SET amount = amount + excluded.amount;
END;
"""

MIGRATIONS = (_FIRST, _SECOND)  # the script at index n takes a file from version n to n + 1


def migrate(connection: sqlite3.Connection, version: int = 0) -> None:
    """Bring a file from this version to the newest, one transaction each."""
    for number in range(version, len(MIGRATIONS)):
        _run_script(connection, MIGRATIONS[number], number + 1)


@lru_cache(maxsize=1)
def columns_of_a_new_ledger() -> frozenset[str]:
    """Every table and column that a ledger of the newest version has, as `tasks.number`."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        migrate(connection)
        return columns(connection)
    finally:
        connection.close()


def columns(connection: sqlite3.Connection) -> frozenset[str]:
    """Every table and column of a database, as `tasks.number`."""
    query = "SELECT t.name, c.name FROM sqlite_schema t JOIN pragma_table_xinfo(t.name) c WHERE t.type = 'table'"
    return frozenset(f"{table}.{column}" for table, column in connection.execute(query))


def _run_script(connection: sqlite3.Connection, script: str, version: int) -> None:
    """Run a migration and note its version in one transaction. It may ask what follows from an experiment."""
    for name, function in _DERIVED.items():
        connection.create_function(name, 1, function, deterministic=True)
    connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {version}; COMMIT;")


@lru_cache(maxsize=1)
def _experiment(values: str) -> Experiment:
    return Experiment.model_construct(**json.loads(values))  # they were checked when the task was added


def _options(options: str) -> str:
    """The run options of a task with those that came later, as they are by default."""
    return json.dumps({**RunOptions().__dict__, **json.loads(options)}, separators=(",", ":"))


_DERIVED: dict[str, Callable[[str], str | float]] = {
    "options_of": _options,
    "cohort_of": lambda experiment: cohort_key(_experiment(experiment)),
    "sharing_of": lambda experiment: sharing_key(_experiment(experiment)),
    "cost_of": lambda experiment: expected_cost(_experiment(experiment)),
}
