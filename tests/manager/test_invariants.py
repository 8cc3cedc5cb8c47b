"""The invariants and `fedsweep doctor`: whatever is broken is found, said, and mended where the ledger allows it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsweep.errors import StateError, StateHeldError
from fedsweep.manager import ExperimentManager
from fedsweep.manager.answers import answer
from fedsweep.manager.doctor import RESTORE, Diagnosis, examine, next_step, show_diagnosis
from fedsweep.manager.invariants import Violation, check
from fedsweep.manager.protocol import parse_request

STATE, LEDGER = Path(".fedsweep"), Path(".fedsweep/ledger.sqlite3")
FIRST, SECOND = Path("out/first/final_results.csv"), Path("out/second/final_results.csv")


@pytest.fixture
def sound(managers, make_result) -> dict[str, dict]:
    """A sweep that was stopped in the middle: five of eight tasks complete, one assigned, one that failed once.

    The results by signature.
    """
    manager = managers()
    done = {}
    for number in range(7):
        task = manager.get_next_task("w")
        if number < 5:
            done[task["signature"]] = make_result(task)
            manager.save_result(task["task_id"], "w", done[task["signature"]], task["attempt"])
        elif number == 5:
            manager.mark_failed(task["task_id"], "w", "ValueError: no", task["attempt"])
    manager.sweep.projection.flush()
    manager.close()
    return done


@contextmanager
def edit() -> Iterator[sqlite3.Connection]:
    """The ledger as someone opens it who knows nothing of its constraints."""
    with closing(sqlite3.connect(LEDGER)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        yield db
        db.commit()


def run(*statements: str) -> Callable[[], None]:
    def edits() -> None:
        with edit() as db:
            for statement in statements:
                db.execute(statement)

    return edits


def rebuild(old: str, new: str, *statements: str) -> Callable[[], None]:
    """Make the ledger anew with another schema, then run the statements."""

    def edits() -> None:
        with closing(sqlite3.connect(LEDGER)) as db:
            script = "\n".join(db.iterdump())
            marks = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
        assert old in script
        LEDGER.unlink()
        with edit() as db:
            db.executescript(script.replace(old, new))
            for name, mark in zip(("application_id", "user_version"), marks, strict=True):
                db.execute(f"PRAGMA {name} = {mark}")
        run(*statements)()

    return edits


def rewrite(change: Callable[[bytes], bytes], path: Path = FIRST) -> Callable[[], object]:
    return lambda: path.write_bytes(change(path.read_bytes()))


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[], object]:
    return rewrite(lambda content: b"".join(change(content.splitlines(keepends=True))))


def corrupt_index() -> None:
    """Make an index that has not all rows of its table."""
    with edit() as db:
        db.execute("CREATE INDEX meanwhile ON tasks (task_id) WHERE number > 3")
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_schema SET sql = 'CREATE INDEX meanwhile ON tasks (task_id)' WHERE name = 'meanwhile'"
        )


def replace_by(make: Callable[[Path], object]) -> Callable[[], None]:
    def put() -> None:
        FIRST.unlink()
        make(FIRST)

    return put


ONE = "(SELECT task FROM results LIMIT 1)"
HELD = "(SELECT number FROM tasks WHERE status = 'assigned')"
WAITING = "(SELECT number FROM tasks WHERE status = 'pending' AND failures = 0 LIMIT 1)"
OPENED = "INSERT INTO attempts (task, worker, lease_s, started_at) VALUES"


@dataclass(frozen=True)
class Broken:
    """A way to break an invariant, what is said of it, and whether a repair mends it."""

    invariant: str
    words: str
    break_it: Callable[[], object]
    is_mended: bool = True


BROKEN = {
    "an index that lacks rows": Broken("I0", "missing from index", corrupt_index),
    "a result of no task": Broken(
        "I0", "refer to none: results:", run(f"UPDATE results SET task = 99 WHERE task = {ONE}"), is_mended=False
    ),
    "two results of one task": Broken(
        "I1",
        "more than one result of first_",
        rebuild(
            "task INTEGER NOT NULL UNIQUE REFERENCES",
            "task INTEGER NOT NULL REFERENCES",
            "INSERT INTO results (task, received_at, data) SELECT task, received_at, data FROM results LIMIT 1",
        ),
        is_mended=False,
    ),
    "two tasks of one signature": Broken(
        "I1",
        "more than one task for digits|lr",
        rebuild(
            "signature TEXT NOT NULL UNIQUE",
            "signature TEXT NOT NULL",
            f"UPDATE tasks SET signature = (SELECT signature FROM tasks WHERE number = {ONE}) WHERE number = {WAITING}",
        ),
        is_mended=False,
    ),
    "complete without a result": Broken(
        "I2", "complete, but without a result: first_", run(f"DELETE FROM results WHERE task = {ONE}")
    ),
    "an acknowledged result that is gone, its row too": Broken(
        "I2",
        "an attempt brought a result that is not there: first_",
        lambda: (run(f"DELETE FROM results WHERE task = {ONE}")(), shutil.rmtree("out")),
        is_mended=False,
    ),
    "a result, but not complete": Broken(
        "I2",
        "there is a result, but it is not complete: ",
        run(f"UPDATE tasks SET status = 'pending' WHERE number = {ONE}"),
    ),
    "a result that is no JSON": Broken(
        "I2", "the result cannot be read: first_", run(f"UPDATE results SET data = substr(data, 9) WHERE task = {ONE}")
    ),
    "a result with NaN": Broken(
        "I2",
        "the result cannot be read: first_",
        run(f"UPDATE results SET data = replace(data, '2.5', 'NaN') WHERE task = {ONE}"),
    ),
    "a history that is none": Broken(
        "I2", "the result cannot be read: first_", run(f"UPDATE results SET history = '[1]' WHERE task = {ONE}")
    ),
    "no file": Broken("I3", "it is missing; the ledger has 7 rows for it", FIRST.unlink),
    "no folder": Broken("I3", "it is missing", lambda: shutil.rmtree("out")),
    "an empty file": Broken("I3", "no header", rewrite(lambda content: b"")),
    "a torn header": Broken("I3", "no header", rewrite(lambda content: content[:40])),
    "a torn row": Broken("I3", "the last line has no end", rewrite(lambda content: content[:-20])),
    "NULs at the end": Broken("I3", "bytes that are zero", rewrite(lambda content: content + b"\0" * 64 + b"\n")),
    "a line that is no row": Broken("I3", "it has 2 fields", rewrite(lambda content: content + b"a,b\n")),
    "a row twice": Broken("I3", "stands here again", lines(lambda rows: [*rows, rows[1]])),
    "a row missing": Broken("I3", "1 of 7 rows are missing", lines(lambda rows: rows[:-1])),
    "an edited number": Broken(
        "I3", "mean_val_acc is '0.9'", rewrite(lambda content: content.replace(b",0.1,", b",0.9,"))
    ),
    "columns in another order": Broken(
        "I3", "in their order", rewrite(lambda content: content.replace(b"phase,dataset", b"dataset,phase"))
    ),
    "a column missing": Broken(
        "I3", "the header has no outcome", rewrite(lambda content: content.replace(b"outcome", b"o"))
    ),
    "saved by a spreadsheet": Broken(
        "I3",
        "a byte-order mark and CRLF line ends",
        rewrite(lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")),
    ),
    "a folder in its place": Broken("I3", "not a regular file", replace_by(Path.mkdir), is_mended=False),
    "a FIFO in its place": Broken("I3", "not a regular file", replace_by(os.mkfifo), is_mended=False),
    "an older attempt is open": Broken(
        "I4",
        "its open attempt is not its last: ",
        run(
            "DROP INDEX one_open_attempt",
            f"{OPENED} ({HELD}, 'v', 60, '2026-01-01')",
            "UPDATE attempts SET ended_at = '', ended_as = 'lost' WHERE number = last_insert_rowid()",
        ),
        is_mended=False,
    ),
    "a number that would come again": Broken(
        "I4", "would get a number that was given out already; the last was 7", run("UPDATE sqlite_sequence SET seq = 3")
    ),
    "numbers forgotten": Broken("I4", "the last was 7", run("DELETE FROM sqlite_sequence")),
    "a result of an attempt that never was": Broken(
        "I4",
        "from an attempt that was never made: first_",
        run(f"UPDATE results SET attempt = 99 WHERE task = {ONE}"),
        is_mended=False,
    ),
    "two open attempts": Broken(
        "I5",
        "more than one open attempt of ",
        run("DROP INDEX one_open_attempt", f"{OPENED} ({HELD}, 'v', 60, '2026-01-01')"),
    ),
    "an open attempt of a task that waits": Broken(
        "I5", "open and not assigned: ", run(f"{OPENED} ({WAITING}, 'v', 60, '2026-01-01')")
    ),
    "assigned to nobody": Broken(
        "I5",
        "assigned to an attempt that is not open",
        run(f"UPDATE attempts SET ended_at = '', ended_as = 'released' WHERE task = {HELD}"),
    ),
    "a state that there is not": Broken(
        "I6", "in none of the four states: ", run(f"UPDATE tasks SET status = 'lost' WHERE number = {WAITING}")
    ),
    "counts that are not the tasks'": Broken(
        "I6",
        "in all; there are 1 assigned, 5 complete, 2 pending, 8 in all",
        run("UPDATE counts SET amount = amount + 1"),
    ),
    "what is left, wrong": Broken(
        "I6", "what is noted as unfinished", run("UPDATE unfinished SET amount = amount + 1")
    ),
    "failed after one failure": Broken(
        "I7", "neither 4 failures nor 5 losses: ", run("UPDATE tasks SET status = 'failed' WHERE failures = 1")
    ),
    "a loss that was counted as a failure": Broken(
        "I7",
        "more failures or losses are held against it than its attempts had: ",
        run(f"UPDATE tasks SET failures = 4, status = 'failed' WHERE number = {WAITING}"),
    ),
    "two tasks of one name": Broken(
        "I1",
        "more than one task is called first_",
        rebuild(
            "task_id TEXT NOT NULL UNIQUE",
            "task_id TEXT NOT NULL",
            f"UPDATE tasks SET task_id = (SELECT task_id FROM tasks WHERE number = {ONE}) WHERE number = {WAITING}",
        ),
        is_mended=False,
    ),
    "fewer results than when the last manager ended": Broken(
        "I8",
        "6 experiments were complete; the ledger has 5 results",
        lambda: (STATE / "last_status.json").write_text(json.dumps({"complete": 6})),
        is_mended=False,
    ),
}


def everything() -> dict[str, bytes | str]:
    """Every file of this folder but the lock, by name."""
    return {
        str(path): path.read_bytes() if path.is_file() else oct(path.lstat().st_mode)
        for path in Path().rglob("*")
        if path.name != "manager.lock"
    }


def test_a_finished_sweep_breaks_none(managers, make_result):
    manager = managers()
    done = {}
    while (task := manager.get_next_task("w")) is not None:
        done[task["signature"]] = make_result(task)
        manager.save_result(task["task_id"], "w", done[task["signature"]], task["attempt"])
    assert check(STATE, acknowledged=done, has_ended=True) == []  # with the log beside the ledger
    manager.close()
    assert check(STATE, acknowledged=done, has_ended=True) == []


def test_a_sweep_in_the_middle_breaks_none_and_a_repair_changes_nothing(sound):
    before = everything()
    assert check(STATE, acknowledged=sound) == []
    diagnosis = examine(STATE, repair=True)
    assert (diagnosis.found, diagnosis.backups, diagnosis.exit_code) == ((), (), 0)
    assert everything() == before


def test_a_cancelled_task_is_no_violation_and_stays_cancelled_through_a_repair(sound, managers):
    manager = managers()
    waiting = [task["task_id"] for task in manager.tasks.values() if task["status"] == "pending"]
    answer(manager.sweep, parse_request({"type": "cancel", "names": waiting}), legacy=False)
    cancelled = manager.get_status()["cancelled"]
    manager.close()
    assert cancelled == len(waiting) > 0
    assert check(STATE) == []
    with edit() as db:
        db.execute("UPDATE tasks SET status = 'pending' WHERE status = 'complete'")
    assert examine(STATE, repair=True).exit_code == 0
    manager = managers()
    assert manager.get_status()["cancelled"] == cancelled


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.timeout(20)  # opening a FIFO the usual way waits for ever
def test_what_is_broken_is_found_and_mended_where_possible(sound, broken, managers):
    broken.break_it()
    before = everything()
    found = examine(STATE)
    assert [one for one in found.found if one.invariant == broken.invariant and broken.words in one.what], found.found
    assert (found.exit_code, found.left, everything()) == (1, found.found, before)  # looking changes nothing

    repaired = examine(STATE, repair=True)
    assert repaired.found == found.found
    assert (repaired.left == ()) == (repaired.exit_code == 0) == broken.is_mended, repaired.left
    after = everything()
    changed = {name for name in before if after.get(name) != before[name]}
    kept = {Path(name).name.partition(".backup-")[0]: after[name] for name in after if name not in before}
    for name in changed - {f"{LEDGER}-wal", f"{LEDGER}-shm"}:
        assert before[name] in [after.get(backup) for backup in repaired.backups], f"{name} changed without a backup"
    assert {name for name in after if name not in before} - set(repaired.backups) <= {
        *("out", "out/first", "out/second", str(FIRST), str(SECOND)),
        *(name for name in after if ".torn-" in name),
    }, kept
    if broken.is_mended:
        assert check(STATE) == []
        managers().close()  # and a manager goes on from there
        assert check(STATE) == []


def test_what_was_acknowledged_must_be_there_as_it_was_sent(sound):
    first, second, *_ = sound
    changed = {**sound, first: {**sound[first], "best_epoch": 1}, "gone": {}}
    assert [(one.invariant, one.what) for one in check(STATE, acknowledged=changed)] == [
        ("I2", "acknowledged, but not there: gone"),
        ("I2", f"not as it was acknowledged: {first}"),
    ]
    run(f"UPDATE results SET history = NULL WHERE task = (SELECT number FROM tasks WHERE signature = '{second}')")()
    assert [one.what for one in check(STATE, acknowledged=sound)] == [f"not as it was acknowledged: {second}"]


def test_a_sweep_that_has_ended_has_nothing_left_to_do(sound):
    lines(lambda rows: rows[:-1])()
    assert [str(one) for one in check(STATE, has_ended=True) if one.invariant == "I8"] == [
        f"I8 {LEDGER}: the sweep has ended with 2 pending and 1 assigned",
        f"I8 {LEDGER}: the sweep has ended, but not all rows stand in {FIRST}",
    ]


def test_a_lost_result_is_taken_from_its_row(sound):
    with edit() as db:
        (signature,) = db.execute(f"SELECT signature FROM tasks WHERE number = {ONE}").fetchone()
        db.execute(f"DELETE FROM results WHERE task = {ONE}")
    assert examine(STATE, repair=True).exit_code == 0
    with edit() as db:
        (data,) = db.execute(
            "SELECT r.data FROM results r JOIN tasks t ON t.number = r.task WHERE t.signature = ?", (signature,)
        ).fetchone()
    assert json.loads(data)["mean_test_acc"] == sound[signature]["mean_test_acc"]


def test_a_manager_that_cannot_read_a_result_says_so_in_one_line(sound):
    BROKEN["a result that is no JSON"].break_it()
    FIRST.unlink()
    with pytest.raises(StateError, match=r"the result of digits\|lr.* cannot be read; `fedsweep doctor` says what"):
        ExperimentManager(["sweep.yaml"], port=0).start()


def test_rows_of_others_are_no_violation_and_stay(sound):
    with FIRST.open("a") as stream:
        stream.write(FIRST.read_text().splitlines()[1].replace("digits", "mnist") + "\n")
    before = everything()
    assert examine(STATE, repair=True).found == ()
    assert everything() == before


def test_a_folder_that_left_the_grid_and_was_removed_is_no_violation(managers, sound, two_phases):
    managers(two_phases[: two_phases.index("second:")]).close()
    shutil.rmtree("out/second")
    assert check(STATE) == []


# ---- the command


def test_what_a_manager_holds_is_left_alone_and_its_holder_named(managers, sound):
    managers()
    with pytest.raises(
        StateHeldError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}; `fedsweep status`"
    ):
        examine(STATE, repair=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no "), (b"", "is empty"), (b"x" * 4096, "is not a state file"), ("cut", "cannot be used")],
)
def test_what_is_no_ledger_cannot_be_examined_and_stays_as_it_is(sound, content, words):
    whole = LEDGER.read_bytes()
    LEDGER.unlink()
    if content is not None:
        LEDGER.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    before = everything()
    for repair in (False, True):
        with pytest.raises(StateError, match=rf"{LEDGER}.*" if content else words) as raised:
            examine(STATE, repair=repair)
        assert words in str(raised.value)
        assert "/tmp" not in str(raised.value)
    assert everything() == before


def test_an_earlier_version_is_examined_without_bringing_it_up_to_date(sound):
    golden = Path(__file__).resolve().parents[1] / "golden" / "ledger_v1.sql"
    LEDGER.unlink()
    with edit() as db:
        db.executescript(golden.read_text("utf-8"))
        db.execute(f"PRAGMA application_id = {0x46535750}")
        db.execute("PRAGMA user_version = 1")
    before = LEDGER.read_bytes()
    shutil.rmtree("out")
    assert {one.invariant for one in examine(STATE).found} <= {"I3"}
    assert LEDGER.read_bytes() == before


def test_a_repair_in_the_wrong_folder_writes_nothing(sound, folder, monkeypatch):
    LEDGER_BEFORE = LEDGER.read_bytes()
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(StateError, match=r"none of the output folders .* call this in the folder where the sweep ran"):
        examine(folder / STATE, repair=True)
    assert os.listdir() == []
    assert (folder / LEDGER).read_bytes() == LEDGER_BEFORE


def test_backups_have_names_of_their_own(sound):
    for number in (1, 2, 3):
        lines(lambda rows: rows[:-1])()
        assert examine(STATE, repair=True).backups == (f"{FIRST}.backup-{number}",)


def test_words_for_people(sound, capsys):
    show_diagnosis(examine(STATE))
    (said,) = capsys.readouterr().out.splitlines()
    assert said == ".fedsweep: sound; every result is there once, and the files say what the ledger does"
    lines(lambda rows: [*rows[:-1], b"torn\n"])()
    run("UPDATE sqlite_sequence SET seq = 3", f"UPDATE results SET attempt = 99 WHERE task = {ONE}")()
    show_diagnosis(examine(STATE))
    shown = capsys.readouterr().out
    assert f"wrong: I3 {FIRST}:8: this is no row: it has 1 fields where the header has" in shown
    assert "\n  next: `fedsweep doctor --repair` makes it again from the ledger" in shown
    assert f"\n  next: {RESTORE}" in shown
    show_diagnosis(examine(STATE, repair=True))
    shown = capsys.readouterr().out
    assert f"repaired: I3 {FIRST}: 1 of 7 rows are missing\n" in shown
    assert f"what was changed is kept in {FIRST}.backup-1\n" in shown
    assert "wrong: I4" in shown


def test_many_alike_are_counted(capsys):
    many = tuple(Violation("I3", f"a.csv:{number}", "torn", True) for number in range(50))
    show_diagnosis(Diagnosis(state_dir="s", found=many, left=many))
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == ["wrong: 30 more of this kind", f"  next: {next_step(many[0])}"]
    assert len(shown) == 22


@pytest.mark.acceptance
def test_the_command_prints_json_and_its_status(sound, folder):
    lines(lambda rows: rows[:-1])()

    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedsweep", "doctor", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)

    wrong = doctor("--json")
    report = json.loads(wrong.stdout)
    assert (wrong.returncode, report["sound"], wrong.stderr) == (1, False, "")
    assert [(one["invariant"], one["is_repaired"]) for one in report["violations"]] == [("I3", False)]
    repaired = doctor(".fedsweep", "--repair", "--json")
    report = json.loads(repaired.stdout)
    assert (repaired.returncode, report["sound"], report["backups"]) == (0, True, [f"{FIRST}.backup-1"])
    missing = doctor("nowhere")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "fedsweep: there is no nowhere/ledger.sqlite3; name the state directory of a sweep\n"
