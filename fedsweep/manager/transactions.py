"""Changes of the ledger's file: each is on disk when it ends, or was not made."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator

from fedsweep.manager.records import LedgerUnwritable


class Transactions:
    """Makes every change a transaction; several that are made together are one, so that the disk is waited for once."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._are_together = False
        self._refusal: LedgerUnwritable | None = None  # of one of those that are made together

    def change(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """One change: on disk when this ends, or with the others that it is made together with.

        Raises:
            LedgerUnwritable: the disk refuses; nothing was changed.
        """
        return self._part() if self._are_together else self._whole()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Changes that are made together: all of them are on disk when this ends, or none was made.

        A change that raises is undone alone, unless it was the disk that refused it.

        Raises:
            LedgerUnwritable: the disk refused one of them, or all; nothing was changed.
        """
        self._are_together = True
        try:
            with self._whole():
                yield
                if self._refusal is not None:
                    raise self._refusal
        finally:
            self._are_together, self._refusal = False, None

    @contextlib.contextmanager
    def _whole(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise _unwritable(error) from error
            raise

    @contextlib.contextmanager
    def _part(self) -> Iterator[sqlite3.Connection]:
        if self._refusal is not None:
            raise self._refusal
        try:
            self._db.execute("SAVEPOINT part")
            yield self._db
            self._db.execute("RELEASE part")
        except BaseException as error:
            # SQLite may have undone everything: then what comes must not begin anew, and be kept without the rest.
            if isinstance(error, sqlite3.OperationalError) or not self._db.in_transaction:
                self._refusal = _unwritable(error)
                raise self._refusal from error
            self._db.execute("ROLLBACK TO part")
            self._db.execute("RELEASE part")
            raise


def _unwritable(error: BaseException) -> LedgerUnwritable:
    return LedgerUnwritable(f"the ledger cannot be written ({error}); nothing was changed")
