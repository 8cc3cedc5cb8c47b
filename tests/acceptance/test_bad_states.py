"""Whatever lies in the place of the state: one line that says what and where, status 2, and not a byte is changed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from permissions import give_up_privileges

from fedsweep.manager import ExperimentManager
from fedsweep.manager.schema import APPLICATION_ID, MIGRATIONS

pytestmark = pytest.mark.acceptance

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1, 2]
first: {combinations: [{poison_ratio: [0.0, 0.5]}]}
second: {combinations: [{poison_ratio: [0.5, 0.75]}]}
"""
Call = Callable[..., subprocess.CompletedProcess[str]]
STATE, LEDGER, WAL = Path(".fedsweep"), Path(".fedsweep/ledger.sqlite3"), Path(".fedsweep/ledger.sqlite3-wal")
NEWER = len(MIGRATIONS) + 1
# Run a sweep and die with three results in the log beside the ledger.
DYING = """
import os
from fedsweep.manager import ExperimentManager
manager = ExperimentManager(["sweep.yaml"], port=0)
manager.load_all_configs()
manager.load_state() or manager.generate_all_tasks()
for _ in range(3):
    task = manager.get_next_task("w")
    manager.save_result(task["task_id"], "w", {"mean_test_acc": 0.5}, task["attempt"])
os._exit(0)
"""


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as somebody whom the permissions of files bind. It may not wait for anything."""
    return subprocess.run(
        [sys.executable, "-m", "fedsweep", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        preexec_fn=give_up_privileges,
    )


@pytest.fixture(scope="module")
def quickly() -> Iterator[Call]:
    """As `call`, in a process that is forked from one that has everything imported."""
    script = Path(__file__).resolve().parents[1] / "support/forked_commands.py"
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as commands:
        assert commands.stdin is not None
        assert commands.stdout is not None

        def call_quickly(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
            commands.stdin.write(json.dumps([str(folder), arguments]) + "\n")
            commands.stdin.flush()
            return subprocess.CompletedProcess(arguments, *json.loads(commands.stdout.readline()))

        yield call_quickly
        commands.stdin.close()


def everything(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file of a folder by its name: its mode and its content. What the lock's holder wrote does not count."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content: bytes | str = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and path.name != "manager.lock":
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = mode, content
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was stopped in order, with four results of six."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "sweep.yaml").write_text(SWEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with ExperimentManager(["sweep.yaml"], port=0) as manager:
            manager.load_all_configs()
            manager.generate_all_tasks()
            for _ in range(4):
                task = manager.get_next_task("w")
                assert task is not None
                manager.save_result(task["task_id"], "w", {"mean_test_acc": 0.5}, task["attempt"])
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose manager was killed: what it did last stands in the log beside the ledger."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "sweep.yaml").write_text(SWEEP)
    subprocess.run([sys.executable, "-c", DYING], cwd=folder, check=True)
    assert (folder / WAL).stat().st_size > 0
    return folder


# ---- what may lie there


@dataclass(frozen=True)
class Bad:
    """Something in the place of the state, and what is said of it."""

    words: str
    make: Callable[[], object]


def content(raw: bytes) -> Callable[[], object]:
    return lambda: LEDGER.write_bytes(raw)


def cut(size: Callable[[int], int]) -> Callable[[], None]:
    return lambda: os.truncate(LEDGER, size(LEDGER.stat().st_size))


def instead(make: Callable[[Path], object], path: Path = LEDGER) -> Callable[[], None]:
    def put() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return put


def database(*statements: str) -> Callable[[], None]:
    """Another database, made by these statements."""

    def make() -> None:
        LEDGER.unlink()
        edit(*statements)()

    return make


def edit(*statements: str) -> Callable[[], None]:
    def run() -> None:
        with closing(sqlite3.connect(LEDGER, isolation_level=None)) as db:
            for statement in statements:
                db.execute(statement)

    return run


def overwrite(page: int) -> Callable[[], None]:
    def run() -> None:
        raw = bytearray(LEDGER.read_bytes())
        raw[4096 * page : 4096 * (page + 1)] = b"\xa5" * 4096
        LEDGER.write_bytes(raw)

    return run


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_to_notes(path: Path) -> None:
    Path("notes.txt").write_text("mine\n")
    path.symlink_to(Path("notes.txt").resolve())


NO_STATE, UNUSABLE = "ledger.sqlite3 is not a state file of fedsweep; move it away", "ledger.sqlite3 cannot be used ("
ANOTHER_S, NO_FILE = "ledger.sqlite3 belongs to another program; move it away", "ledger.sqlite3 is not a file; move it"
NEW = f"was written by a newer fedsweep (state version {NEWER}; this one knows {NEWER - 1}); install that version"
OURS = f"PRAGMA application_id = {APPLICATION_ID}"
VERSION = f"PRAGMA user_version = {NEWER - 1}"

BAD = {
    "empty": Bad("ledger.sqlite3 is empty, so it is no state of fedsweep; move it away", content(b"")),
    "one byte": Bad(NO_STATE, content(b"S")),
    "text": Bad(NO_STATE, content(b"Dear diary,\n" * 500)),
    "NULs": Bad(NO_STATE, content(bytes(65536))),
    "the magic alone": Bad(NO_STATE, content(b"SQLite format 3\0")),
    "a JSON state of an old manager": Bad(NO_STATE, content(json.dumps({"tasks": {}}).encode())),
    "compressed": Bad(NO_STATE, lambda: LEDGER.write_bytes(gzip.compress(LEDGER.read_bytes()))),
    "encrypted": Bad(NO_STATE, lambda: LEDGER.write_bytes(bytes(byte ^ 0x5A for byte in LEDGER.read_bytes()))),
    "cut in its header": Bad(NO_STATE, cut(lambda size: 99)),
    "cut after its header": Bad(UNUSABLE, cut(lambda size: 100)),
    "cut after a page": Bad(UNUSABLE, cut(lambda size: 4096)),
    "cut after three pages": Bad(UNUSABLE, cut(lambda size: 3 * 4096)),
    "cut in the middle": Bad(UNUSABLE, cut(lambda size: size // 2 + 7)),
    "cut before its last page": Bad(UNUSABLE, cut(lambda size: size - 4096)),
    "the first page overwritten": Bad(NO_STATE, overwrite(0)),
    "the second page overwritten": Bad(UNUSABLE, overwrite(1)),
    "the tasks overwritten": Bad(UNUSABLE, overwrite(3)),
    "a database of another program": Bad(ANOTHER_S, database("CREATE TABLE notes (words TEXT)")),
    "a database that says whose it is": Bad(
        ANOTHER_S, database("PRAGMA application_id = 0x0f055112", "CREATE TABLE tasks (id)")
    ),
    "our mark, but no tables": Bad("has no state version, so it is no state", database(OURS, "VACUUM")),
    "our marks on other tables": Bad(
        "cannot be used (no such table: meta)", database(OURS, VERSION, "CREATE TABLE notes (words TEXT)")
    ),
    "a table missing": Bad("has no conflicts.attempt, so it is no state", edit("DROP TABLE conflicts")),
    "a column missing": Bad("has no conflicts.worker", edit("ALTER TABLE conflicts DROP COLUMN worker")),
    "a newer version": Bad(NEW, edit(f"PRAGMA user_version = {NEWER}")),
    "a newer version with a rollback journal": Bad(
        NEW, edit("PRAGMA journal_mode = DELETE", f"PRAGMA user_version = {NEWER}")
    ),
    "a folder": Bad(NO_FILE, instead(Path.mkdir)),
    "a folder with things in it": Bad(NO_FILE, instead(lambda path: (path / "a/b").mkdir(parents=True))),
    "a FIFO": Bad(NO_FILE, instead(os.mkfifo)),
    "a device": Bad("/dev/zero is not a file; move it", instead(link("/dev/zero"))),
    "a link to nothing": Bad(
        "is a link to nothing (/mnt/away/ledger.sqlite3); bring back its target, or move it away",
        instead(link("/mnt/away/ledger.sqlite3")),
    ),
    "a link to itself": Bad("is a link to nothing (ledger.sqlite3)", instead(link("ledger.sqlite3"))),
    "a link to a text": Bad("notes.txt is not a state file of fedsweep", instead(link_to_notes)),
    "not readable": Bad("ledger.sqlite3 cannot be read (Permission denied)", lambda: LEDGER.chmod(0)),
    "not writable": Bad(
        "ledger.sqlite3 may not be written by you; let it be written, or name", lambda: LEDGER.chmod(0o444)
    ),
    "a folder that is not writable": Bad(
        ".fedsweep may not be written by you; let it be written, or name", lambda: STATE.chmod(0o555)
    ),
    "missing, its log there": Bad(
        "is missing but ledger.sqlite3-wal is there; put the file back, or move both away",
        lambda: LEDGER.rename(WAL),
    ),
    "missing, its journal there": Bad(
        "is missing but ledger.sqlite3-journal is there", lambda: LEDGER.rename(f"{LEDGER}-journal")
    ),
    "a folder for its log": Bad("ledger.sqlite3-wal is not a plain file", WAL.mkdir),
    "a FIFO for its log": Bad("ledger.sqlite3-wal is not a plain file", lambda: os.mkfifo(WAL)),
    "a link for its log": Bad("ledger.sqlite3-wal is not a plain file", lambda: link_to_notes(WAL)),
    "a FIFO for its journal": Bad("ledger.sqlite3-journal is not a plain file", lambda: os.mkfifo(f"{LEDGER}-journal")),
    "a folder for its shared memory": Bad("ledger.sqlite3-shm is not a plain file", Path(f"{LEDGER}-shm").mkdir),
    "a folder for the lock": Bad(
        "manager.lock is not a plain file; delete it, or name another", instead(Path.mkdir, STATE / "manager.lock")
    ),
    "a FIFO for the lock": Bad("manager.lock is not a plain file", instead(os.mkfifo, STATE / "manager.lock")),
    "a link for the lock": Bad("manager.lock is not a plain file", instead(link_to_notes, STATE / "manager.lock")),
    "a FIFO for the token": Bad("no token in .fedsweep/token (it is not a", instead(os.mkfifo, STATE / "token")),
    "a folder for the token": Bad("no token in .fedsweep/token (it is not a", instead(Path.mkdir, STATE / "token")),
    "a device for the token": Bad("it is not a text file with a token", instead(link("/dev/zero"), STATE / "token")),
    "nothing in the token": Bad("the token file .fedsweep/token is empty", lambda: (STATE / "token").write_bytes(b"")),
    "a file for the state directory": Bad(
        ".fedsweep cannot hold the state (File exists)", instead(lambda path: path.write_text("x"), STATE)
    ),
    "a FIFO for the state directory": Bad(".fedsweep cannot hold the state (File exists)", instead(os.mkfifo, STATE)),
    "a link to nothing for the state directory": Bad(
        ".fedsweep cannot hold the state (File exists)", instead(link("/mnt/away"), STATE)
    ),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_a_bad_state_is_told_in_one_line_and_left_as_it_is(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quickly: Call, bad: Bad
) -> None:
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    bad.make()
    before = everything(folder)
    try:
        ended = quickly(folder, "manager", "sweep.yaml", "--port", "0")
        assert everything(folder) == before
    finally:
        STATE.chmod(0o755) if STATE.is_dir() else None
    assert_refused(ended, bad.words)


def assert_refused(ended: subprocess.CompletedProcess[str], words: str) -> None:
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    said = [line for line in ended.stderr.splitlines() if " INFO " not in line]
    assert len(said) == 1, ended.stderr
    assert said[0].startswith("fedsweep: ")
    assert words in said[0]
    assert any(place in said[0] for place in (".fedsweep", "notes.txt", "/dev/zero"))


def test_an_address_that_cannot_be_written_is_told_and_no_result_is_touched(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quickly: Call
) -> None:
    """It is written once all is ready; no worker would find this manager."""
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    (STATE / "manager.json").mkdir()
    before = everything(folder / "out")
    ended = quickly(folder, "manager", "sweep.yaml", "--port", "0")
    assert_refused(ended, "manager.json cannot be written (Is a directory), and workers look there; move away what is")
    assert everything(folder / "out") == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("manager", name) for name in ("empty", "a FIFO", "not writable")),
        *(("run", name) for name in ("cut in the middle", "a newer version", "a link to nothing")),
    ],
)
def test_a_process_that_a_person_starts_says_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    BAD[name].make()
    before = everything(folder)
    options = ["--port", "0"] if command == "manager" else ["--device", "cpu", "--quiet"]
    ended = call(folder, command, "sweep.yaml", *options)
    shutil.rmtree(STATE / "logs", ignore_errors=True)
    assert everything(folder) == before
    assert_refused(ended, BAD[name].words)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("manager.log cannot be written (it is not a plain file)", lambda: ((STATE / "logs").mkdir(), put_fifo())),
        ("manager.log cannot be written (Not a directory)", lambda: (shutil.rmtree(STATE), STATE.write_text("x"))),
    ],
    ids=["a FIFO for its log", "a file for the state directory"],
)
def test_run_without_a_place_for_its_logs_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, make: Callable[[], object]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    make()
    before = everything(folder)
    assert_refused(call(folder, "run", "sweep.yaml", "--device", "cpu", "--quiet"), words)
    assert everything(folder) == before


def put_fifo() -> None:
    os.mkfifo(STATE / "logs/manager.log")


# ---- with what the last manager did in a log beside it


def damage() -> None:
    os.truncate(LEDGER, 2 * 4096)


def migrate_in_the_log() -> None:
    """As a newer version does it that is killed before its log is brought into the file."""
    code = (
        "import os, sqlite3\n"
        f"db = sqlite3.connect({str(LEDGER)!r}, isolation_level=None)\n"
        "db.execute('PRAGMA locking_mode = EXCLUSIVE')\n"
        f"db.execute('PRAGMA user_version = {NEWER}')\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "make"), [(UNUSABLE, damage), (NEW, migrate_in_the_log)], ids=["damaged", "a newer version in the log"]
)
def test_a_bad_state_keeps_its_log(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quickly: Call, words: str, make: Callable[[], None]
) -> None:
    folder = shutil.copytree(killed, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    make()
    before = everything(folder)
    assert_refused(quickly(folder, "manager", "sweep.yaml", "--port", "0"), words)
    assert everything(folder) == before


def test_the_log_of_another_ledger_is_not_mixed_into_this_one(
    finished: Path, killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quickly: Call
) -> None:
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    shutil.copy(killed / WAL, WAL)
    before = everything(folder)
    ended = quickly(folder, "manager", "sweep.yaml", "--port", "0")
    assert_refused(ended, "ledger.sqlite3-wal is the log of another ledger; move it away")
    assert everything(folder) == before


# ---- what is no reason to refuse


def go_on(folder: Path) -> ExperimentManager:
    manager = ExperimentManager(["sweep.yaml"], port=0)
    manager.load_all_configs()
    assert manager.load_state()
    manager.load_completed_tasks()
    return manager


@pytest.mark.parametrize(
    "make",
    [
        lambda: WAL.write_bytes(b""),
        lambda: WAL.write_bytes(b"not a log" * 1000),
        lambda: Path(f"{LEDGER}-shm").write_bytes(b"\xa5" * 32768),
        lambda: Path(f"{LEDGER}-journal").write_bytes(b""),
        lambda: Path(f"{LEDGER}-journal").write_bytes(b"not a journal" * 1000),
        lambda: Path(f"{LEDGER}.new").write_bytes(b"half"),
        lambda: (LEDGER.rename("elsewhere.sqlite3"), LEDGER.symlink_to(Path("elsewhere.sqlite3").resolve())),
        lambda: os.mkfifo(STATE / "manager.json"),
        lambda: (STATE / "manager.json").write_text('{"host": 5, "port": "x"}'),
        lambda: (STATE / "manager.json").symlink_to("manager.json"),
        lambda: os.mkfifo(STATE / "last_status.json"),
        lambda: os.mkfifo(STATE / "last_status.json.tmp"),
        lambda: (STATE / "last_status.json").write_text("[" * 100_000),
        lambda: (STATE / "manager.lock").write_bytes(b"\xff" * 5000),
        lambda: (STATE / "manager.lock").unlink(),
    ],
    ids=[
        *("an empty log", "garbage for a log", "garbage for shared memory", "an empty journal"),
        *("garbage for a journal", "half of a new ledger", "a link to the ledger", "a FIFO for the address"),
        *("garbage for the address", "a loop for the address", "a FIFO for the last status"),
        *("a FIFO for the next status", "a deep last status", "garbage in the lock", "no lock"),
    ],
)
def test_what_does_no_harm_is_passed_over(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], object]
) -> None:
    folder = shutil.copytree(finished, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    rows = {path: path.read_bytes() for path in folder.glob("out/*/final_results.csv")}
    make()
    with go_on(folder) as manager:
        assert manager.get_status()["complete"] == 4
        manager._finish()
    assert {path: path.read_bytes() for path in rows} == rows


def test_a_log_that_someone_deleted_takes_no_result_with_it(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are there."""
    folder = shutil.copytree(killed, tmp_path / "sweep")
    monkeypatch.chdir(folder)
    WAL.unlink()
    with ExperimentManager(["sweep.yaml"], port=0) as manager:
        manager.load_all_configs()
        manager.load_state() or manager.generate_all_tasks()
        manager.load_completed_tasks()
        assert manager.get_status()["complete"] == 3
