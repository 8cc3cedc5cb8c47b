"""Opening the ledger's file, without ever mistaking another file for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from fedsweep.errors import StateError
from fedsweep.files import StrangeFile, fsync, make_folder, open_plain
from fedsweep.manager import schema
from fedsweep.manager.file_systems import network_file_system

COMPANIONS = ("-wal", "-journal", "-shm")  # that SQLite keeps beside its file
ADVICE = "move it away or name another --state-dir"
RESTORE = (
    "put a backup of the ledger in its place, with its own log or none beside it; without one, move the state "
    "directory away and start the sweep again: rows in its results files count as done"
)
WAL_HEADER = 32  # bytes
COPIES = 10  # tries to copy a ledger between two changes of it


def open_database(path: Path, *, is_examined: bool = True) -> sqlite3.Connection:
    """The database at `path`, made if there is none, brought to the newest version, held by this process alone.

    Every page of it is looked at, unless `is_examined` says that the caller does so.

    Raises:
        StateError: what lies there is not a ledger that this version can use. Nothing was changed.
    """
    path = _followed(path)
    try:
        if not path.exists():
            _refuse_journals_alone(path)
            _create(path)
    except OSError as error:
        raise StateError(f"{path} cannot be made ({error.strerror}); {ADVICE}") from None
    refuse_what_is_no_ledger(path)
    _refuse_what_cannot_be_written(path)
    ledger_id = _ledger_id_without_log(path)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        _hold(connection)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        _refuse_version(version, path)
        if is_examined:
            _examine(connection)
        if ledger_id not in (None, _ledger_id(connection)):
            raise StateError(f"{_beside(path, '-wal')} is the log of another ledger; move it away")
        schema.migrate(connection, version)
        _refuse_other_tables(connection, path)
        _choose_journal(connection, path)
    except BaseException as error:
        connection.interrupt()  # closing shall not write the log into a file that is refused
        connection.close()
        if isinstance(error, sqlite3.DatabaseError):
            raise StateError(f"{path} cannot be used ({error}); {ADVICE}") from None
        raise
    return connection


@contextlib.contextmanager
def reading(ledger: Path) -> Iterator[sqlite3.Connection]:
    """A copy of the ledger, whole with its log, in the newest version, to look into: the file itself stays as it is.

    A manager may be at work on it.

    Raises:
        StateError: there is none, or it cannot be read.
    """
    if not os.path.lexists(ledger):
        raise StateError(f"there is no {ledger}; name the state directory of a sweep")
    refuse_what_is_no_ledger(ledger)
    with tempfile.TemporaryDirectory(prefix="fedsweep-") as scratch:
        copy = Path(scratch) / ledger.name
        try:
            _copy(ledger, copy)
            db = open_database(copy, is_examined=False)
        except OSError as error:
            raise StateError(f"{ledger} cannot be read ({error.strerror})") from None
        except StateError as error:
            raise StateError(str(error).replace(str(copy), str(ledger))) from None
        try:
            yield db
        except sqlite3.DatabaseError as error:
            raise StateError(f"{ledger} is damaged ({error}); {RESTORE}") from None
        finally:
            db.close()


def _copy(ledger: Path, copy: Path) -> None:
    """Copy a ledger and its log as they were at one moment.

    What is appended to the log meanwhile does no harm: SQLite drops the end of a log that is not whole.
    """
    for _ in range(COPIES):
        before = _generation(ledger)
        for suffix in ("", "-wal", "-journal"):
            _beside(copy, suffix).unlink(missing_ok=True)
            if (part := _beside(ledger, suffix)).exists():
                shutil.copyfile(part, _beside(copy, suffix))
        if _generation(ledger) == before:
            return
    raise StateError(f"{ledger} is changed too often to be read while its manager runs; try again")


def _generation(ledger: Path) -> tuple[object, ...]:
    """What is another once the file has changed, or its log has begun anew."""
    stamps = [
        (path.stat().st_mtime_ns, path.stat().st_size)
        for path in (ledger, _beside(ledger, "-journal"))
        if path.exists()
    ]
    wal = _beside(ledger, "-wal")
    if not wal.exists():
        return (*stamps, None)
    with os.fdopen(open_plain(wal), "rb") as stream:
        return (*stamps, stream.read(WAL_HEADER))


def _followed(path: Path) -> Path:
    """The file that a link leads to: SQLite keeps its log beside that.

    Raises:
        StateError: it leads nowhere. The disk that has the ledger may not be mounted, so nothing is begun anew.
    """
    if not path.is_symlink():
        return path
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise StateError(
            f"{path} is a link to nothing ({os.readlink(path)}); bring back its target, or {ADVICE}"
        ) from None


def _refuse_journals_alone(path: Path) -> None:
    for suffix in ("-wal", "-journal"):
        if os.path.lexists(companion := _beside(path, suffix)):
            raise StateError(f"{path} is missing but {companion.name} is there; put the file back, or move both away")


def _refuse_what_cannot_be_written(path: Path) -> None:
    as_effective = os.access in os.supports_effective_ids
    for place in (path, path.parent):  # SQLite makes its log in the folder
        if not os.access(place, os.W_OK, effective_ids=as_effective):
            raise StateError(f"{place} may not be written by you; let it be written, or name another --state-dir")


def _hold(connection: sqlite3.Connection) -> None:
    connection.row_factory = sqlite3.Row
    # Before anything is read: then no memory is shared with other processes, which network file systems cannot do.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _choose_journal(connection: sqlite3.Connection, path: Path) -> None:
    """Keep a write-ahead log on a local disk, and a rollback journal on a network; a ledger that was moved is changed.

    A connection that holds the file alone does not delete its journal after a transaction, but overwrites the
    beginning and syncs that; so a commit is as safe as with the log.
    """
    wanted = "wal" if network_file_system(path.parent) is None else "delete"
    (mode,) = connection.execute(f"PRAGMA journal_mode = {wanted}").fetchone()
    if mode != wanted:
        raise sqlite3.OperationalError(f"its journal cannot be changed from {mode} to {wanted}")


def _examine(connection: sqlite3.Connection) -> None:
    """Look at every page.

    Raises:
        sqlite3.DatabaseError: the file is damaged.
    """
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise sqlite3.DatabaseError(" ".join(str(problem).split()))


def refuse_what_is_no_ledger(path: Path) -> None:
    """Look at the header without opening the file as a database, which would already change it.

    Raises:
        StateError: this is no ledger; the message says what it is.
    """
    try:
        with os.fdopen(open_plain(path), "rb") as stream:
            header = stream.read(100)
    except StrangeFile:
        raise StateError(f"{path} is not a file; {ADVICE}") from None
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    if not header:
        raise StateError(f"{path} is empty, so it is no state of fedsweep; {ADVICE}")
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StateError(f"{path} is not a state file of fedsweep; {ADVICE}")
    if int.from_bytes(header[68:72], "big") != schema.APPLICATION_ID:
        raise StateError(f"{path} belongs to another program; {ADVICE}")
    for suffix in COMPANIONS:
        companion = _beside(path, suffix)
        if os.path.lexists(companion) and not stat.S_ISREG(companion.lstat().st_mode):
            raise StateError(f"{companion} is not a plain file, and SQLite keeps one of that name; move it away")


def _refuse_version(version: int, path: Path) -> None:
    newest = len(schema.MIGRATIONS)
    if version > newest:
        raise StateError(
            f"{path} was written by a newer fedsweep (state version {version}; this one knows {newest}); "
            "install that version, or name another --state-dir"
        )
    if version == 0:
        raise StateError(f"{path} has no state version, so it is no state of fedsweep; {ADVICE}")


def _ledger_id(connection: sqlite3.Connection) -> str | None:
    found = connection.execute("SELECT value FROM meta WHERE key = 'ledger_id'").fetchone()
    return None if found is None else str(found[0])


def _ledger_id_without_log(path: Path) -> str | None:
    """What the ledger's file says of itself, the log beside it left out; None where there is no log."""
    wal = _beside(path, "-wal")
    if not wal.exists() or not wal.stat().st_size:
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True)) as alone:
            return _ledger_id(alone)
    except sqlite3.DatabaseError:
        return None  # it is whole with its log only, or not at all


def _refuse_other_tables(connection: sqlite3.Connection, path: Path) -> None:
    missing = sorted(schema.columns_of_a_new_ledger() - schema.columns(connection))
    if missing:
        raise StateError(f"{path} has no {missing[0]}, so it is no state of fedsweep; {ADVICE}")


def _create(path: Path) -> None:
    """Make a new ledger beside its place, whole and on disk, and only then move it there: a crash leaves no part."""
    make_folder(path.parent)
    unfinished = path.with_name(f"{path.name}.new")
    for left in (unfinished, _beside(unfinished, "-journal")):
        left.unlink(missing_ok=True)
    connection = sqlite3.connect(unfinished, isolation_level=None)
    try:
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        schema.migrate(connection)
        connection.execute("INSERT INTO meta VALUES ('ledger_id', ?)", (uuid.uuid4().hex[:8],))
    finally:
        connection.close()
    os.replace(unfinished, path)
    fsync(path.parent)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}{suffix}")
