"""A small sweep that dies at every point where something reaches the disk. Run as a script by `test_crashes.py`.

One process is started; it forks a child for each point k, which runs the sweep and exits without a trace just before
or after its k-th commit, write, fsync or rename (or in the middle of a write). Another child then starts the sweep
again and runs it to its end. What is wrong afterwards goes to standard output, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest

from fedsweep.manager import ExperimentManager, file_systems
from fedsweep.manager.protocol import parse_request

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1]
first:
  combinations:
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
second:
  combinations:
    - poison_ratio: [0.0]
    - lr: [0.01, 0.02]
"""
# What an old tool left: a finished row, and one that it did not finish.
OLD_ROWS = f"""\
{",".join(conftest.RESULT_COLUMNS)}
first,digits,lr,2,1,0.5,label_flip,1.0,shuffle,fedavg,32,0.875,0,0.25,0,0.5,0,0.5,0,650,7,1
first,digits,lr,2,1,0.5,ran"""
DEAD, DONE, BROKEN = 9, 0, 1
real_write, real_fsync, real_replace = os.write, os.fsync, os.replace


class Plug:
    """Counts the points, and pulls itself at the one it was told."""

    def __init__(self, crash_at: int | None) -> None:
        self.crash_at = crash_at
        self.count = 0
        self.kinds: list[str] = []

    def point(self, kind: str) -> bool:
        """Whether to die here."""
        self.count += 1
        self.kinds.append(kind)
        return self.count == self.crash_at

    def pull(self) -> None:
        (Path.cwd() / "point.txt").write_text(self.kinds[-1])
        os._exit(DEAD)

    def around(self, kind: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            if self.point(f"before {kind}"):
                self.pull()
            value = action(*arguments)
            if self.point(f"after {kind}"):
                self.pull()
            return value

        return guarded

    def write(self, descriptor: int, content: bytes) -> int:
        if self.point("in write"):
            real_write(descriptor, content[: len(content) // 2])
            self.pull()
        return self.around("write", real_write)(descriptor, content)

    def install(self) -> None:
        plug = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                run = super().execute
                return plug.around("commit", run)(statement) if statement == "COMMIT" else run(statement, *arguments)

        def connect(path: Path, **options: Any) -> sqlite3.Connection:
            connection = real_connect(path, factory=Connection, **options)
            connection.execute("PRAGMA synchronous = OFF")
            return connection

        real_connect = sqlite3.connect
        sqlite3.connect = connect  # type: ignore[assignment]
        os.write, os.replace = self.write, self.around("rename", real_replace)
        os.fsync = self.around("fsync", lambda descriptor: None)


def keep_a_rollback_journal() -> None:
    """Let all this happen as on a network file system."""
    file_systems.mounts = lambda: [("/", "nfs4")]


def run_sweep() -> None:
    """Run the sweep from wherever it is to its end, noting every acknowledgement."""
    manager = ExperimentManager(["sweep.yaml"], port=0)
    manager.load_all_configs()
    if not manager.load_state():
        manager.generate_all_tasks()
    # Before any work is done again: a result that was lost and recomputed would look like one that was kept.
    lost = set(acknowledged()) - set(manager.completed_tasks)
    assert not lost, f"acknowledged, but not in the ledger: {lost}"
    manager.load_completed_tasks()

    def ask(kind: str, **fields: Any) -> dict[str, Any]:
        return manager.answer(parse_request({"type": kind, "worker_id": "w", **fields}), False)

    while True:
        for task_id, task in list(manager.assigned_tasks.items()):  # of a worker that outlived the manager
            deliver(ask, task_id, task)
        answer = ask("request_task")
        if answer["type"] == "no_task":
            break
        deliver(ask, answer["task"]["task_id"], answer["task"])
    manager.sweep.projection.flush()
    manager.save_state()
    manager.close()


def acknowledged() -> dict[str, dict[str, Any]]:
    """Results by signature that were acknowledged so far, in this folder."""
    path = Path("acknowledged.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["signature"]: entry["result"] for entry in map(json.loads, lines)}


def deliver(ask: Callable[..., dict[str, Any]], task_id: str, task: dict[str, Any]) -> None:
    result = conftest.result_of(task)
    answer = ask("submit_result", task_id=task_id, result_data=result)
    assert answer == {"type": "ack", "status": "accepted"}, answer
    line = json.dumps({"signature": task["signature"], "result": result}) + "\n"
    descriptor = os.open("acknowledged.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    real_write(descriptor, line.encode())
    os.close(descriptor)


def in_child(folder: Path, crash_at: int | None) -> int:
    """Run the sweep in a child; its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.chdir(folder)
    plug = Plug(crash_at)
    plug.install()
    try:
        run_sweep()
    except BaseException:
        Path("error.txt").write_text(traceback.format_exc())
        os._exit(BROKEN)
    Path("points.json").write_text(json.dumps(plug.kinds))
    os._exit(DONE)


def problem_of(folder: Path) -> str | None:
    """What is wrong in the folder of a finished sweep."""
    os.chdir(folder)
    try:
        conftest.assert_sound(".fedsweep/ledger.sqlite3", acknowledged())
        rows = [len(conftest.rows_of(f"out/{phase}/final_results.csv")) for phase in ("first", "second")]
        assert rows == [4, 2], rows
        left = [path.name for path in Path().rglob("*") if path.name.endswith((".tmp", ".new"))]
        assert not left, left
    except AssertionError as error:
        return f"{error}\n{traceback.format_exc()}"
    return None


def fresh_folder(root: Path, name: str) -> Path:
    folder = root / name
    (folder / "out/first").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "out/first/final_results.csv").write_text(OLD_ROWS)
    return folder


def crash_everywhere(root: Path, again_after: int | None) -> dict[str, Any]:
    """Crash at every point (and, given `again_after`, a second time that many points into the recovery)."""
    problems, hits, crash_at = [], [], 0
    while True:
        crash_at += 1
        folder = fresh_folder(root, f"at-{crash_at}")
        if (status := in_child(folder, crash_at)) == DONE:
            break
        hits.append((folder / "point.txt").read_text() if status == DEAD else "broken")
        if again_after is not None:
            in_child(folder, again_after)
        if status != DEAD or (status := in_child(folder, None)) != DONE:
            problems.append([crash_at, hits[-1], (folder / "error.txt").read_text()])
        elif problem := problem_of(folder):
            problems.append([crash_at, hits[-1], problem])
        os.chdir(root)
        shutil.rmtree(folder)
    return {"hits": hits, "problems": problems, "points": json.loads((folder / "points.json").read_text())}


if __name__ == "__main__":
    again = int(sys.argv[2]) or None
    if sys.argv[3] == "rollback":
        keep_a_rollback_journal()
    print(json.dumps(crash_everywhere(Path(sys.argv[1]).resolve(), again)))
