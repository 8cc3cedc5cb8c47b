"""Mistakes in the source that the tests must find, and the tests that find each.

A mistake is one or several replacements of text that stands exactly once in its file, so it survives edits around it;
where it does not, `test_mutants` says so. To be run: see `kill_mutants.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """Text in a file, and what takes its place."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the tests that go red for it."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]  # arguments for pytest


LEDGER, TRANSACTIONS = "fedsweep/manager/ledger.py", "fedsweep/manager/transactions.py"
OPENING, SCHEMA = "fedsweep/manager/opening.py", "fedsweep/manager/schema.py"
DECISIONS, FAILURES = "fedsweep/manager/decisions.py", "fedsweep/manager/failures.py"
SWEEP, WORKER, HELD = "fedsweep/manager/sweep.py", "fedsweep/worker/worker.py", "fedsweep/worker/held.py"

POWER_LOSS = ("tests/manager/test_power_loss.py", "-k", "nothing_that_was_promised")
FAULTS = "tests/stress/test_faults.py"

MUTANTS = (
    Mutant(
        "ack before commit",  # each change is committed by the next one
        (
            Edit(
                TRANSACTIONS,
                '            self._db.execute("BEGIN IMMEDIATE")\n',
                "            if self._db.in_transaction:\n"
                '                self._db.execute("COMMIT")\n'
                '            self._db.execute("BEGIN IMMEDIATE")\n',
            ),
            Edit(
                TRANSACTIONS,
                '            yield self._db\n            self._db.execute("COMMIT")\n',
                "            yield self._db\n",
            ),
            Edit(
                LEDGER,
                "        self._db.close()\n",
                "        if self._db.in_transaction:\n"
                '            self._db.execute("COMMIT")\n'
                "        self._db.close()\n",
            ),
        ),
        ("tests/manager/test_crashes.py", "-k", "sweep"),
    ),
    Mutant(
        "no fsync",
        (Edit(OPENING, "PRAGMA synchronous = FULL", "PRAGMA synchronous = OFF"),),
        ("tests/manager/test_ledger.py", "-k", "synced_before_they_are_acknowledged"),
    ),
    Mutant(
        "no fsync, and the power goes",
        (Edit(OPENING, "PRAGMA synchronous = FULL", "PRAGMA synchronous = OFF"),),
        POWER_LOSS,
    ),
    Mutant(
        "folders are not synced",
        (Edit("fedsweep/files.py", "        os.fsync(descriptor)\n", "        pass\n"),),
        POWER_LOSS,
    ),
    Mutant(
        "the spool is not synced",
        (Edit("fedsweep/worker/spool.py", "            os.fsync(descriptor)\n", ""),),
        POWER_LOSS,
    ),
    Mutant(
        "a migration is no transaction",
        (
            Edit(
                SCHEMA,
                'f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {version}; COMMIT;"',
                'f"{script} PRAGMA user_version = {version};"',
            ),
        ),
        ("tests/manager/test_crashes.py", "-k", "migration"),
    ),
    Mutant(
        "a new ledger is made in its place",  # a crash leaves what the next start completes; power may leave nothing
        (Edit(OPENING, '    unfinished = path.with_name(f"{path.name}.new")\n', "    unfinished = path\n"),),
        POWER_LOSS,
    ),
    Mutant(
        "no tail cut",
        (
            Edit(
                "fedsweep/manager/survey.py",
                "            survey.has_tail, survey.is_sound = True, False\n",
                "            survey.has_tail = True\n",
            ),
        ),
        ("tests/manager/test_bad_results_files.py", "-k", "torn_at_every_byte"),
    ),
    Mutant(
        "no attempt check",
        (
            Edit(
                LEDGER,
                'is_it = found["worker"] == worker if attempt is None else found["attempt"] == attempt\n',
                "is_it = True\n",
            ),
        ),
        ("tests/manager/test_ledger.py", "-k", "old_attempt or late_renewal"),
    ),
    Mutant(
        "no UNIQUE",
        (
            Edit(SCHEMA, "task INTEGER NOT NULL UNIQUE REFERENCES", "task INTEGER NOT NULL REFERENCES"),
            Edit(
                LEDGER,
                '"VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task) DO NOTHING"',
                '"VALUES (?, ?, ?, ?, ?, ?, ?, ?)"',
            ),
        ),
        ("tests/manager/test_ledger.py", "-k", "the_file_itself_allows_one_result"),
    ),
    Mutant(
        "wall clock",
        (Edit("fedsweep/manager/clock.py", "return time.monotonic()", "return time.time()"),),
        ("tests/manager/test_clock.py",),
    ),
    Mutant(
        "loss counted as failure",
        (Edit(LEDGER, "            losses=losses,\n", "            losses=losses,\n            failures=losses,\n"),),
        ("tests/manager/test_ledger.py", "-k", "five_losses_then_failed"),
    ),
    Mutant(
        "lease not renewed after restart",
        (
            Edit(
                LEDGER,
                "        self._lease_ends: dict[int, float] = {}\n        self._renew_all()\n",
                "        self._lease_ends: dict[int, float] = {}\n",
            ),
        ),
        ("tests/manager/test_ledger.py", "-k", "renewed_in_full_by_a_restart"),
    ),
    Mutant(
        "shutdown before the last fsync",
        (
            Edit(
                "fedsweep/manager/manager.py",
                "        with self.lock:\n            self.sweep.projection.flush()\n",
                "        with self.lock:\n",
            ),
        ),
        ("tests/manager/test_shutdown.py",),
    ),
    Mutant(
        "a heartbeat of an old attempt renews",
        (
            Edit(
                LEDGER,
                "        open_attempt = self._open_attempt_of(task_id, worker, attempt)\n",
                "        open_attempt = self._open_attempt_of(task_id, worker, self.view.task(task_id).attempt)\n",
            ),
        ),
        ("tests/manager/test_ledger.py", "-k", "late_renewal"),
    ),
    Mutant(
        "a late result is refused",
        (
            Edit(
                LEDGER,
                '            self._check_attempt(db, found["number"], task_id, attempt)\n',
                '            self._check_attempt(db, found["number"], task_id, attempt)\n'
                "            if self._open_attempt_of(task_id, worker, attempt) is None:\n"
                "                raise UnknownAttempt(task_id)\n",
            ),
        ),
        (FAULTS, "-k", "delivers_if_its_task_is_open"),
    ),
    Mutant(
        "numbers make another cause",
        (Edit(FAILURES, """    (re.compile(r"[-+]?\\d+(?:[.,:]\\d+)*(?:e[-+]?\\d+)?"), "N"),\n""", ""),),
        ("tests/manager/test_failures.py", "-k", "differs_from_task_to_task"),
    ),
    Mutant(
        "the place makes no other cause",
        (Edit(FAILURES, 'f"{self.cause}\\0{self.frame}"', "self.cause"),),
        ("tests/manager/test_failures.py", "-k", "another_type_words_or_place"),
    ),
    Mutant(
        "retry gives no fresh budget",
        (
            Edit(
                DECISIONS,
                "SET status = 'pending', failures = 0, losses = 0, last_error",
                "SET status = 'pending', last_error",
            ),
        ),
        ("tests/manager/test_failures.py", "-k", "fresh_budget"),
    ),
    Mutant(
        "cancel leaves what is running alone",
        (Edit(DECISIONS, 'if found["status"] not in ("pending", "assigned"):', 'if found["status"] != "pending":'),),
        ("tests/manager/test_failures.py", "-k", "cancelled_tasks"),
    ),
    Mutant(
        "drain still hands out",
        (
            Edit(
                SWEEP,
                "            self.hands_out = False\n            self.ending = ending\n",
                "            self.ending = ending\n",
            ),
        ),
        ("tests/manager/test_failures.py", "-k", "sweep_that_is_ended"),
    ),
    Mutant(
        "a repair keeps no copy",
        (
            Edit(
                "fedsweep/manager/doctor.py",
                "    if not filecmp.cmp(path, backup, shallow=False):\n        return backup\n",
                "",
            ),
        ),
        ("tests/manager/test_invariants.py", "-k", "backups_have_names or mended_where_possible"),
    ),
    Mutant(
        "failures of a worker that is set aside stay",
        (Edit(SWEEP, "            self.ledger.forgive(forgiven)\n", ""),),
        (FAULTS, "-k", "set_aside"),
    ),
    Mutant(
        "a worker that is set aside ends as if all were done",
        (
            Edit(
                WORKER,
                'no more tasks: %s", reply.message)\n                self._leave()\n                return 1\n',
                'no more tasks: %s", reply.message)\n                self._leave()\n                return 0\n',
            ),
        ),
        (FAULTS, "-k", "set_aside"),
    ),
    Mutant(
        "a worker gives up a manager that has answered before",
        (Edit(WORKER, "if not self.has_answered and time", "if time"),),
        (FAULTS, "-k", "outlive"),
    ),
    Mutant(
        "a worker that waits looks for no results of others",
        (
            Edit(
                WORKER,
                "                self.is_spool_due = True\n                self.stop.sleep(min",
                "                self.stop.sleep(min",
            ),
        ),
        (FAULTS, "-k", "computed_again"),
    ),
    Mutant(
        "a result leaves the spool before it is acknowledged",
        (
            Edit(
                HELD,
                "            self._end(task_id)\n        try:\n            if not",
                "            self._end(task_id)\n            spool.remove(kept)\n        try:\n            if not",
            ),
        ),
        ("tests/worker/test_worker.py", "-k", "in_the_spool_before_it_is_first_sent"),
    ),
    Mutant(
        "a result that waited leaves the spool before it is acknowledged",
        (
            Edit(
                "fedsweep/worker/delivery.py",
                "        try:\n            delivered = submit_result_to_manager(\n",
                "        spool.remove(waiting)\n        try:\n            delivered = submit_result_to_manager(\n",
            ),
        ),
        (FAULTS, "-k", "outlive"),
    ),
    Mutant(
        "a stopped worker gives nothing back",
        (Edit("fedsweep/worker/task.py", "            held.give_back_all()\n", ""),),
        (FAULTS, "-k", "sigterm"),
    ),
    Mutant(
        "a task may kill workers without end",
        (Edit(LEDGER, "MAX_LOSSES = 5\n", "MAX_LOSSES = 50\n"),),
        (FAULTS, "-k", "kills_every_worker"),
    ),
)
