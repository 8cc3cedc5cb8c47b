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
        ("tests/manager/test_crashes.py",),
    ),
    Mutant(
        "no fsync",
        (Edit(OPENING, "PRAGMA synchronous = FULL", "PRAGMA synchronous = OFF"),),
        ("tests/manager/test_ledger.py", "-k", "synced_before_they_are_acknowledged"),
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
)
