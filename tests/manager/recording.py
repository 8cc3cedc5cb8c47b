"""Writes down everything that is done to the files of a folder: by Python through `os`, by SQLite through a VFS.

The events are those of `simulated_disk.py`. Nothing is really synced, so that a recording is quick.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
from simulated_disk import ROOT, Event

SQLITE = "ledger.sqlite3"
JOURNALS = ("-journal", "-wal")


class Recorder:
    """Looks at a folder before and after each call that orders changes, and notes what has changed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self._ids = {root.stat().st_ino: ROOT}
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._contents: dict[int, bytes] = {}
        self._count = 0
        self._is_begun = False
        self.observe()
        self._is_begun = True
        self.events += [("sync", node) for node in [*self._contents, *self._names]]  # what is there at first is safe

    def observe(self) -> None:
        """Note what has appeared, and what has changed in files that SQLite does not write."""
        self._observe(self.root, ROOT)

    def _observe(self, folder: Path, node: int) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            child = self._names[node].get(entry.name)
            if child is None or self._ids.get(entry.inode()) != child:
                child = self._appeared(node, entry)
            if entry.is_dir():
                self._observe(folder / entry.name, child)
            elif not (self._is_begun and entry.name.startswith(SQLITE)):
                self._compare(child, Path(entry.path).read_bytes())

    def _appeared(self, folder: int, entry: os.DirEntry[str]) -> int:
        self._count += 1
        node = self._ids[entry.inode()] = self._count
        if entry.is_dir():
            self._names[node] = {}
            self.events.append(("folder", node))
        else:
            self._contents[node] = b""
            self.events.append(("file", node))
        self._names[folder][entry.name] = node
        self.events.append(("name", folder, entry.name, node))
        return node

    def _compare(self, node: int, new: bytes) -> None:
        old = self._contents[node]
        if old == new:
            return
        if len(new) < len(old):
            self.events.append(("resize", node, len(new)))
        begin = next((place for place, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]), len(old))
        begin = min(begin, len(new))
        if begin < len(new):
            self.events.append(("write", node, begin, new[begin:]))
        self._contents[node] = new

    def synced(self, inode: int) -> None:
        """A file or folder was synced."""
        self.observe()
        self.events.append(("sync", self._ids[inode]))

    def node_of(self, path: str) -> int:
        """The node of a file that is there."""
        self.observe()
        return self._ids[os.stat(path).st_ino]

    def folder_of(self, path: str | Path) -> int:
        """The node of the folder in which this path lies."""
        return self._ids[os.stat(Path(path).resolve().parent).st_ino]

    def renamed(self, old: str | Path, new: str | Path) -> None:
        """A file has got another name in its folder."""
        folder, was, now = self.folder_of(new), Path(old).name, Path(new).name
        self.events.append(("rename", folder, was, now))
        self._names[folder][now] = self._names[folder].pop(was)

    def removed(self, path: str | Path) -> None:
        """A file is gone."""
        folder = self.folder_of(path)
        del self._ids[next(inode for inode, node in self._ids.items() if node == self._names[folder][Path(path).name])]
        del self._names[folder][Path(path).name]
        self.events.append(("remove", folder, Path(path).name))

    def promise(self, kind: str, *what: Any) -> None:
        """Note that something was promised to someone at this moment."""
        self.observe()
        self.events.append(("promise", kind, *what))


@contextmanager
def recording(root: Path) -> Iterator[Recorder]:
    """Record what happens in a folder."""
    recorder = Recorder(root)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "unlink", "remove")}

    def fsync(descriptor: int) -> None:
        recorder.synced(os.fstat(descriptor).st_ino)

    def renaming(name: str) -> Callable[..., None]:
        def rename(old: Any, new: Any, **options: Any) -> None:
            recorder.observe()
            real[name](old, new, **options)
            recorder.renamed(old, new)

        return rename

    def removing(name: str) -> Callable[..., None]:
        def remove(path: Any, **options: Any) -> None:
            recorder.observe()
            real[name](path, **options)
            recorder.removed(path)

        return remove

    vfs = _Vfs(recorder)
    connect = sqlite3.connect
    os.fsync, os.replace, os.rename = fsync, renaming("replace"), renaming("rename")
    os.unlink, os.remove = removing("unlink"), removing("remove")
    sqlite3.connect = lambda path, uri=False, **options: Connection(str(path), uri)  # type: ignore[assignment, misc]
    try:
        yield recorder
    finally:
        recorder.observe()
        for name, function in real.items():
            setattr(os, name, function)
        sqlite3.connect = connect
        vfs.unregister()


class _Vfs(apsw.VFS):
    """Does what SQLite does on this system, and tells the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        super().__init__("recording", "unix")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path is None:
            return apsw.VFSFile("unix", name, flags)
        is_new = not os.path.exists(path)
        return _File(self._recorder, path, name, flags, is_new=is_new)

    def xDelete(self, name: str, syncdir: bool) -> None:
        super().xDelete(name, False)
        self._recorder.removed(name)
        if syncdir:
            self._recorder.events.append(("sync", self._recorder.folder_of(name)))


class _File(apsw.VFSFile):
    def __init__(self, recorder: Recorder, path: str, name: Any, flags: list[int], *, is_new: bool) -> None:
        super().__init__("unix", name, flags)
        self._recorder = recorder
        self._node = recorder.node_of(path)
        # SQLite syncs the folder of a journal that it has made together with the journal itself.
        self._folder = recorder.folder_of(path) if is_new and path.endswith(JOURNALS) else None

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        self._recorder.events.append(("write", self._node, offset, bytes(data)))

    def xTruncate(self, size: int) -> None:
        super().xTruncate(size)
        self._recorder.events.append(("resize", self._node, size))

    def xSync(self, flags: int) -> None:
        self._recorder.events.append(("sync", self._node))
        if self._folder is not None:
            self._recorder.events.append(("sync", self._folder))
            self._folder = None


# ---- as much of the standard library's `sqlite3` as the ledger uses, on apsw


class Row(tuple[Any, ...]):
    """A row whose fields have names."""

    names: tuple[str, ...]

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)

    def keys(self) -> list[str]:
        return list(self.names)


class Connection:
    """A connection like one of `sqlite3` with `isolation_level=None`."""

    row_factory: Any = None

    def __init__(self, path: str, uri: bool) -> None:
        flags = apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE | (apsw.SQLITE_OPEN_URI if uri else 0)
        self._db = apsw.Connection(path, flags=flags, vfs="recording")

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Cursor:
        return Cursor(self._db, sql, parameters)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        for row in rows:
            self._db.execute(sql, tuple(row))

    def executescript(self, script: str) -> None:
        self._db.execute(script)

    def create_function(self, name: str, count: int, function: Callable[..., Any], **options: Any) -> None:
        self._db.create_scalar_function(name, function, count, **options)

    def interrupt(self) -> None:
        self._db.interrupt()

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def close(self) -> None:
        self._db.close()


class Cursor:
    """What a statement has given, read at once."""

    def __init__(self, db: apsw.Connection, sql: str, parameters: Sequence[Any]) -> None:
        before = db.total_changes()
        cursor = db.cursor()
        names: list[tuple[str, ...]] = []
        cursor.exec_trace = lambda cursor, *_: names.append(tuple(name for name, _ in cursor.get_description())) or True
        try:
            found = cursor.execute(sql, tuple(parameters)).fetchall()
        except (apsw.CorruptError, apsw.NotADBError) as error:
            raise sqlite3.DatabaseError(str(error)) from error
        self._rows = iter([_row(names[-1], values) for values in found])
        self.rowcount = db.changes() if db.total_changes() != before else 0
        self.lastrowid = db.last_insert_rowid()

    def fetchone(self) -> Row | None:
        return next(self._rows, None)

    def fetchall(self) -> list[Row]:
        return list(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return self._rows


def _row(names: tuple[str, ...], values: tuple[Any, ...]) -> Row:
    row = Row(values)
    row.names = names
    return row
