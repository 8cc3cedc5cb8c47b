"""`fedsweep doctor`: what is wrong with a state directory and its results files, what to do, and doing it."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsweep.errors import StateError
from fedsweep.files import fsync
from fedsweep.manager import file_systems
from fedsweep.manager.clock import Clock
from fedsweep.manager.columns import FILE_NAME
from fedsweep.manager.invariants import Violation, check
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.ledger_view import LedgerView
from fedsweep.manager.mending import mend
from fedsweep.manager.opening import RESTORE, open_database, reading
from fedsweep.manager.projection import Projection
from fedsweep.manager.state_dir import LEDGER_FILE, STATUS_FILE, StateLock

SOUND, UNSOUND = 0, 1
SHOWN = 20  # violations with the same next step
MENDS = "`fedsweep doctor --repair` makes it again from the ledger, as does the next start of the sweep"
MENDS_LEDGER = "`fedsweep doctor --repair` makes it again from what the ledger says elsewhere"
IN_THE_WAY = "move away what is in the place of the file, or let it be read, and call this again"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found, and what was done about it."""

    state_dir: str
    found: tuple[Violation, ...]
    left: tuple[Violation, ...]  # what does not hold now: all that was found, less what was repaired
    backups: tuple[str, ...] = ()  # of what was changed, each beside it
    notes: tuple[str, ...] = ()  # what is not wrong, but worth knowing

    @property
    def exit_code(self) -> int:
        """0: nothing is wrong (any more); 1: something is."""
        return UNSOUND if self.left else SOUND


def examine(state_dir: Path, *, repair: bool = False) -> Diagnosis:
    """Check every invariant of a state directory, and of the results files in its output folders.

    Relative output folders are those in the current folder, as for the manager.

    Args:
        state_dir: the folder with the ledger; held while this looks, so that no manager changes it meanwhile.
        repair: put right what the ledger allows; whatever this changes is copied beside itself before.

    Raises:
        StateHeldError: a manager has it; the message says which.
        StateError: there is no ledger, it cannot be read, or it cannot be mended.
    """
    if not os.path.lexists(state_dir / LEDGER_FILE):
        raise StateError(f"there is no {state_dir / LEDGER_FILE}; name the state directory of a sweep")
    words = file_systems.warning(state_dir)
    notes = () if words is None else (words,)
    with StateLock(state_dir):
        found = left = tuple(check(state_dir))
        backups: list[str] = []
        if repair and found:
            _refuse_a_foreign_folder(state_dir)
            backups = _repair(state_dir, found)
            left = tuple(check(state_dir))
    return Diagnosis(state_dir=str(state_dir), found=found, left=left, backups=tuple(backups), notes=notes)


def _refuse_a_foreign_folder(state_dir: Path) -> None:
    """Called in a wrong place, a repair would write every results file anew there."""
    with reading(state_dir / LEDGER_FILE) as db:
        relative = [path for path in LedgerView(db).output_dirs() if not os.path.isabs(path)]
    is_here = any(Path(path).exists() for path in relative) or state_dir.resolve().parent == Path.cwd()
    if relative and not is_here:
        raise StateError(
            f"none of the output folders of {state_dir} ({relative[0]}, …) is in {Path.cwd()}; nothing was changed: "
            "call this in the folder where the sweep ran"
        )


def _repair(state_dir: Path, found: Iterable[Violation]) -> list[str]:
    """Put right what can be; the copies of what was changed."""
    path = state_dir / LEDGER_FILE
    backup = _back_up(path, "", "-wal", "-journal")
    broken = {violation.invariant for violation in found}
    if broken - {"I3"}:
        _mend(path)
    with closing(Ledger(path)) as ledger:
        projection = Projection(ledger, Clock())
        backups = [_sync(projection, output_dir) for output_dir in ledger.view.output_dirs()]
        projection.flush()
    kept = [copy for copy in (_unless_same(path, backup), *backups) if copy]
    if "I8" not in broken and any(violation.invariant == "I8" for violation in check(state_dir)):
        kept.append(_back_up(state_dir / STATUS_FILE))  # a result in it could not be read, and is none any more
        (state_dir / STATUS_FILE).unlink()
    return kept


def _mend(path: Path) -> None:
    with closing(open_database(path, is_examined=False)) as db:
        try:
            mend(db, Clock().now().isoformat())
        except sqlite3.DatabaseError as error:
            raise StateError(f"{path} cannot be mended ({error}); {RESTORE}") from None


def _sync(projection: Projection, output_dir: str) -> str | None:
    """Make a results file equal to the ledger; the copy of what it was, if that was something else."""
    path = Path(output_dir) / FILE_NAME
    if not path.is_file():
        projection.sync(output_dir)
        return None
    backup = _back_up(path)
    projection.sync(output_dir)
    return _unless_same(path, backup)


def _back_up(path: Path, *suffixes: str) -> str:
    """Copy a file (with what belongs to it) beside itself, on disk when this returns; the name of the copy."""
    number = 1
    while os.path.lexists(backup := f"{path}.backup-{number}"):
        number += 1
    for suffix in suffixes or ("",):
        if os.path.exists(part := f"{path}{suffix}"):
            with open(part, "rb") as source, open(f"{backup}{suffix}", "xb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
    fsync(path.parent)
    return backup


def _unless_same(path: Path, backup: str) -> str | None:
    """The name of the copy, which goes if the file is still the same."""
    if os.path.exists(f"{backup}-wal") or os.path.exists(f"{backup}-journal"):
        return backup
    if not filecmp.cmp(path, backup, shallow=False):
        return backup
    os.unlink(backup)
    return None


# ---- saying so ----------------------------------------------------------------------------------------------------


def show_diagnosis(diagnosis: Diagnosis, *, as_json: bool = False) -> None:
    """Print a diagnosis for people, or as one JSON object."""
    if as_json:
        print(json.dumps(_as_json(diagnosis)))
    else:
        print("\n".join(_lines(diagnosis)))


def next_step(violation: Violation) -> str:
    """What to do about a violation."""
    if violation.is_derived:
        return MENDS if violation.invariant == "I3" else MENDS_LEDGER
    return IN_THE_WAY if violation.invariant == "I3" else RESTORE


def _as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    left = set(diagnosis.left)
    return {
        "state_dir": diagnosis.state_dir,
        "sound": not diagnosis.left,
        "violations": [
            {**asdict(one), "is_repaired": one not in left, "next_step": next_step(one) if one in left else None}
            for one in (*diagnosis.found, *(one for one in diagnosis.left if one not in diagnosis.found))
        ],
        "backups": list(diagnosis.backups),
        "notes": list(diagnosis.notes),
    }


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield from (f"note: {words}" for words in diagnosis.notes)
    if not diagnosis.found:
        yield f"{diagnosis.state_dir}: sound; every result is there once, and the files say what the ledger does"
        return
    repaired = [one for one in diagnosis.found if one not in diagnosis.left]
    yield from _list("repaired", repaired, has_next_step=False)
    yield from _list("wrong", diagnosis.left, has_next_step=True)
    for backup in diagnosis.backups:
        yield f"what was changed is kept in {backup}"
    if not diagnosis.left:
        yield f"{diagnosis.state_dir}: sound now"


def _list(word: str, violations: Sequence[Violation], *, has_next_step: bool) -> Iterator[str]:
    """The violations, those with the same next step together."""
    steps: dict[str, list[Violation]] = {}
    for violation in violations:
        steps.setdefault(next_step(violation), []).append(violation)
    for step, alike in steps.items():
        yield from (f"{word}: {violation}" for violation in alike[:SHOWN])
        if len(alike) > SHOWN:
            yield f"{word}: {len(alike) - SHOWN} more of this kind"
        if has_next_step:
            yield f"  next: {step}"
