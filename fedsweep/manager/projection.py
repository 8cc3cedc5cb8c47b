"""The results files: every row that the ledger says, in every output folder, whatever happens to the files."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedsweep.files import fsync, make_folder, open_fresh, open_plain
from fedsweep.manager.clock import Clock
from fedsweep.manager.columns import FILE_NAME, RowFormat, line
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.records import Row
from fedsweep.manager.survey import Survey, Surveyor, foreign_line, whole_columns

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int, int]  # device, inode, size, time of change in ns: what a file was when we last looked
TRIES = 5
GROWING_S = 2.0


class _ChangedMeanwhile(Exception):
    """Someone wrote into the file between our look and our change."""


@dataclass(frozen=True)
class _Known:
    """A file that is as the ledger wants it, as long as it bears this stamp."""

    columns: tuple[str, ...]
    stamp: Stamp


class Projection:
    """Keeps the `final_results.csv` of every output folder equal to the ledger.

    `add` appends the rows of a new result. `sync` reads a file whole: rows that others wrote are adopted into the
    ledger, and whatever is torn, doubled, missing or edited is put right by writing the file anew beside itself and
    renaming it. What is cut out and lies nowhere else is kept in `final_results.csv.torn-N`. A folder that cannot be
    written is `lagging`, with the reason, and is among those `due`; the others go on.

    Others may append to a file at any time. So lines are appended whole (O_APPEND, one write), and a file that is not
    as we left it is read before anything is written to it.
    """

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        self.lagging: dict[str, str] = {}
        self._ledger = ledger
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._unsynced: set[Path] = set()
        self._growing: dict[str, tuple[Stamp | None, float]] = {}
        self._said: set[str] = set()

    def add(self, rows: Iterable[Row]) -> None:
        """Write the rows of a result that the ledger has just taken."""
        by_folder: dict[str, list[Row]] = {}
        for row in rows:
            by_folder.setdefault(row.output_dir, []).append(row)
        for output_dir, its_rows in by_folder.items():
            if output_dir not in self.lagging:
                self._guarded(output_dir, partial(self._append, output_dir, its_rows))

    def due(self) -> list[str]:
        """The folders whose file is not as we left it: not read yet, changed by others, or lagging."""
        return [output_dir for output_dir in self._ledger.view.output_dirs() if self._is_due(output_dir)]

    def sync(self, output_dir: str, *, patient: bool = False) -> int:
        """Make one file equal to the ledger; how many results were adopted.

        A patient sync leaves a last line without an end alone while it may still be being written.
        """
        return self._guarded(output_dir, partial(self._sync, output_dir, patient))

    def flush(self) -> None:
        """Force every file to the disk, also what a manager before this one has appended and not forced there."""
        while self._unsynced:
            path = self._unsynced.pop()
            try:
                fsync(path)
                fsync(path.parent)
            except OSError as error:
                self._lag(str(path.parent), error)

    def _guarded(self, output_dir: str, action: Callable[[], int]) -> int:
        try:
            adopted = action()
        except OSError as error:
            self._lag(output_dir, error)
            return 0
        if self.lagging.pop(output_dir, None) is not None:
            log.info("%s: its results file is up to date again", output_dir)
        return adopted

    def _lag(self, output_dir: str, error: OSError) -> None:
        reason = error.strerror or str(error)
        if self.lagging.get(output_dir) != reason:
            log.error("%s: %s cannot be written (%s); results are safe in the ledger", output_dir, FILE_NAME, reason)
        self.lagging[output_dir] = reason
        self._known.pop(output_dir, None)

    def _is_due(self, output_dir: str) -> bool:
        known = self._known.get(output_dir)
        return known is None or _stamp(_file_of(output_dir)) != known.stamp

    # ---- appending ------------------------------------------------------------------------------------------------

    def _append(self, output_dir: str, rows: Sequence[Row]) -> int:
        path, known = _file_of(output_dir), self._known.get(output_dir)
        if known is None or _stamp(path) != known.stamp:
            return self._sync(output_dir, patient=True)  # it writes these rows too: they are in the ledger
        self._write_lines(output_dir, path, known, list(map(RowFormat(known.columns), rows)))
        return 0

    def _write_lines(self, output_dir: str, path: Path, known: _Known, lines: Sequence[bytes]) -> None:
        """Append lines in one write, and remember the file unless someone else wrote at the same moment."""
        content = b"".join(raw + b"\n" for raw in lines)
        size = known.stamp[2]
        self._known.pop(output_dir, None)
        descriptor = open_plain(path, os.O_WRONLY | os.O_APPEND)
        try:
            written = os.write(descriptor, content)
            after = _stamp_of(os.fstat(descriptor))
            if written < len(content) and after[2] == size + written:
                os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
        self._unsynced.add(path)
        if written < len(content):
            raise OSError(0, f"only {written} of {len(content)} bytes could be written")
        if after[2] == size + len(content):
            self._known[output_dir] = _Known(known.columns, after)

    # ---- reading and repairing ------------------------------------------------------------------------------------

    def _sync(self, output_dir: str, patient: bool) -> int:
        adopted = 0
        for _ in range(TRIES):
            try:
                return adopted + self._sync_once(output_dir, patient)
            except _ChangedMeanwhile:
                continue
        return adopted  # someone writes without pause; the next refresh tries again

    def _sync_once(self, output_dir: str, patient: bool) -> int:
        path = _file_of(output_dir)
        content, stamp = _read(path)
        if stamp is None and not self._is_active(output_dir):
            return 0  # a folder of an earlier grid that someone has removed stays so
        surveyor = Surveyor(self._ledger.view, output_dir, str(path))
        survey = surveyor.survey(content)
        adopted = self._adopt(output_dir, survey)
        self._say(path, survey)
        if adopted:
            survey = surveyor.survey(content)
        if survey.has_tail and patient and self._may_grow(output_dir, stamp):
            self._known.pop(output_dir, None)
            return adopted
        self._growing.pop(output_dir, None)
        self._repair(output_dir, path, stamp, survey)
        return adopted

    def _may_grow(self, output_dir: str, stamp: Stamp | None) -> bool:
        """Whether the last line of this file may still be being written: it changed within the last seconds."""
        now = self._clock.monotonic()
        seen, since = self._growing.get(output_dir, (None, now))
        if seen != stamp:
            since = now
        self._growing[output_dir] = stamp, since
        return now - since < GROWING_S

    def _is_active(self, output_dir: str) -> bool:
        return self._ledger.view.output_dirs().get(output_dir, False)

    def _adopt(self, output_dir: str, survey: Survey) -> int:
        """Take the results of others into the ledger, and into the other folders of the same experiments."""
        if not survey.adoptions:
            return 0
        tasks = self._ledger.adopt(survey.adoptions)
        for task in tasks:
            self.add(row for row in self._ledger.view.rows_of(task) if row.output_dir != output_dir)
        return len(tasks)

    def _say(self, path: Path, survey: Survey) -> None:
        for message in survey.messages():
            if (words := f"{path}: {message}") not in self._said:
                self._said.add(words)
                log.warning("%s", words)

    def _repair(self, output_dir: str, path: Path, stamp: Stamp | None, survey: Survey) -> None:
        if stamp is not None and survey.is_sound and stamp[2] > 0:
            self._known[output_dir] = _Known(survey.columns, stamp)
            self._unsynced.add(path)
            if survey.missing:
                _refuse_change(path, stamp)
                self._write_lines(output_dir, path, self._known[output_dir], survey.missing)
        elif stamp is not None or survey.missing:
            self._rewrite(output_dir, path, stamp, survey)

    def _rewrite(self, output_dir: str, path: Path, stamp: Stamp | None, survey: Survey) -> None:
        """Write the file anew, whole and on disk, then put it in the place of the old one."""
        columns = whole_columns(survey)
        make_folder(path.parent)
        fresh = path.with_name(f".{path.name}.{self._ledger.view.meta('ledger_id')}.tmp")
        try:
            self._write_fresh(output_dir, fresh, columns, survey)
            if stamp is not None:
                fresh.chmod(stat.S_IMODE(path.stat().st_mode))  # whoever could write to it still can
            _refuse_change(path, stamp)
            if survey.cut:
                self._keep_beside(path, survey.cut)
            written = _stamp_of(fresh.stat())
            _replace(path, fresh, stamp)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        self._known[output_dir] = _Known(columns, written)
        self._unsynced.add(path)

    def _write_fresh(self, output_dir: str, fresh: Path, columns: Sequence[str], survey: Survey) -> None:
        ours: Iterable[bytes] = survey.ours
        if columns != survey.columns:
            ours = map(RowFormat(columns), self._ledger.view.rows_in(output_dir))
        with open_fresh(fresh) as stream:
            stream.write(line(columns) + b"\n")
            stream.writelines(raw + b"\n" for raw in ours)
            stream.writelines(foreign_line(columns, other) + b"\n" for other in survey.foreign)
            stream.flush()
            os.fsync(stream.fileno())

    @staticmethod
    def _keep_beside(path: Path, lines: Sequence[bytes]) -> None:
        number = 1
        while os.path.lexists(kept := path.with_name(f"{path.name}.torn-{number}")):
            number += 1
        with kept.open("xb") as stream:
            stream.write(b"".join(raw + b"\n" for raw in lines))
            stream.flush()
            os.fsync(stream.fileno())
        log.warning("%s: %d line(s) that do not belong there were cut out and are kept in %s", path, len(lines), kept)


def _replace(path: Path, fresh: Path, stamp: Stamp | None) -> None:
    """Rename the new file over the old, unless someone wrote into that meanwhile."""
    old = None if stamp is None else os.open(path, os.O_RDONLY)
    try:
        _refuse_change(path, stamp)
        os.replace(fresh, path)
        if old is not None and stamp is not None and (late := os.pread(old, os.fstat(old).st_size, stamp[2])):
            with path.open("ab") as stream:  # it was written between the look and the renaming
                stream.write(late)
    finally:
        if old is not None:
            os.close(old)
    fsync(path.parent)


def _refuse_change(path: Path, stamp: Stamp | None) -> None:
    if _stamp(path) != stamp:
        raise _ChangedMeanwhile


def _file_of(output_dir: str) -> Path:
    """The results file of a folder; a link is followed, so that it stays one."""
    return Path(os.path.realpath(Path(output_dir) / FILE_NAME))


def _read(path: Path) -> tuple[bytes, Stamp | None]:
    """A file whole, and its stamp; nothing and None where there is none."""
    try:
        with os.fdopen(open_plain(path), "rb") as stream:
            stamp = _stamp_of(os.fstat(stream.fileno()))
            return stream.read(stamp[2]), stamp
    except FileNotFoundError:
        return b"", None


def _stamp(path: Path) -> Stamp | None:
    """What the file is now; None where there is none, or where that cannot be told, as behind a link in a circle."""
    try:
        return _stamp_of(path.stat())
    except OSError:
        return None


def _stamp_of(status: os.stat_result) -> Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
