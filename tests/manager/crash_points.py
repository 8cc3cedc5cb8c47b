"""A small sweep whose manager dies at every point where something leaves it. Run as a script by `test_crashes.py`.

For each point k a manager is forked, and this process is its worker, over a socket. The manager exits without a trace
just before or after its k-th commit, write, fsync, rename or answer, or in the middle of one, or of a migration.
Another is then started and the sweep goes on to its end. The worker is a good one: it keeps a result until it is
acknowledged. What is wrong afterwards goes to standard output, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import conftest
import pandas  # noqa: F401  (these here, so that not every manager that is forked imports them anew)
import pyarrow.parquet
import pyarrow.vendored.version  # noqa: F401
import scipy.special  # noqa: F401
from crash_scenes import SCENES, Scene

from fedsweep.manager import ExperimentManager, file_systems, schema
from fedsweep.manager.invariants import check

DEAD, DONE, BROKEN = 9, 0, 1
TWICE = 23  # a second crash comes at most so many points into the recovery from the first
LONGEST_WAIT_S = 60.0
real_write, real_replace = os.write, os.replace


class Plug:
    """Counts the points, and pulls itself at the one it was told."""

    def __init__(self, crash_at: int | None) -> None:
        self.crash_at = crash_at
        self.kinds: list[str] = []
        self.is_counting = True

    def is_due(self, kind: str) -> bool:
        """Whether to die here."""
        if self.is_counting:
            self.kinds.append(kind)
        return self.is_counting and len(self.kinds) == self.crash_at

    def pull(self) -> NoReturn:
        """Die."""
        (Path.cwd() / "point.txt").write_text(self.kinds[-1])
        os._exit(DEAD)

    def at(self, kind: str) -> None:
        """Be at a point; may not return."""
        if self.is_due(kind):
            self.pull()

    def around(self, kind: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """Do something, with a point before and after it."""
        self.at(f"before {kind}")
        value = action(*arguments)
        self.at(f"after {kind}")
        return value

    def half(self, kind: str, action: Callable[[Any, bytes], Any], target: Any, content: bytes) -> Any:
        """Do something with bytes, with points before and after it and in its middle."""
        if self.is_due(f"in {kind}"):
            action(target, content[: len(content) // 2])
            self.pull()
        return self.around(kind, action, target, content)

    def install(self) -> None:
        """Put points around all that leaves this process."""
        plug = self

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
                run = super().execute
                if statement == "COMMIT":
                    return plug.around(f"commit of {_ledger_method()}", run, statement)
                return run(statement.replace("synchronous = FULL", "synchronous = OFF"), *arguments)

            def executescript(self, script: str) -> sqlite3.Cursor:
                self.set_trace_callback(lambda statement: plug.at("in migration"))
                run = super().executescript
                try:
                    return plug.around("migration", run, script)
                finally:
                    self.set_trace_callback(None)

            def create_function(self, name: str, count: int, function: Callable[..., Any], **options: Any) -> None:
                def guarded(*arguments: Any) -> Any:
                    plug.at(f"in migration, {name}")
                    return function(*arguments)

                super().create_function(name, count, guarded, **options)

        connect, send = sqlite3.connect, asyncio.StreamWriter.write
        sqlite3.connect = lambda path, **options: connect(path, factory=Connection, **options)  # type: ignore[assignment]
        os.write = lambda to, content: plug.half(f"write {_name_of(to)}", real_write, to, content)
        os.fsync = lambda of: plug.around(f"fsync {_name_of(of)}", lambda: None)
        os.replace = lambda old, new: plug.around(f"rename {Path(new).name}", real_replace, old, new)
        asyncio.StreamWriter.write = lambda writer, content: plug.half(  # type: ignore[method-assign]
            f"send {json.loads(content)['type']}", send, writer, content
        )


def _name_of(descriptor: int) -> str:
    """The name of a file or folder, without what differs from run to run."""
    return re.sub(r"\.([0-9a-f]{8}\.tmp|\w{8})$", ".tmp", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)


def _ledger_method() -> str:
    """Which change of the ledger is being committed."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.endswith("ledger.py") and frame.f_code.co_name != "_transaction":
            return frame.f_code.co_name
    return "nobody"


# ---- the manager, in a process of its own


def run_manager(
    scene: Scene, plug: Plug, connection: socket.socket, acknowledged: set[str], has_summaries: bool
) -> None:
    """A manager from its start to the end of the sweep, which serves one worker."""
    manager = ExperimentManager(scene.configs, port=0, lease_s=0.0)  # who comes back has lost what it held
    scene.open(manager)
    # Before any work is done again: a result that was lost and recomputed would look like one that was kept.
    lost = [task_id for task_id in acknowledged if manager.tasks[task_id]["status"] != "complete"]
    assert not lost, f"acknowledged, but not in the ledger: {lost}"
    manager.load_completed_tasks()
    manager.save_state()
    plug.is_counting = not scene.is_about_opening
    connection.sendall(manager.sweep.token.encode() + b"\n")
    asyncio.run(serve(manager, connection))
    assert manager.check_all_complete(), manager.get_status()
    manager.stops = 0 if has_summaries else 2  # two stop signals leave out summaries
    assert manager._finish() == 0
    manager.close()


async def serve(manager: ExperimentManager, connection: socket.socket) -> None:
    connection.setblocking(False)
    await manager.handle_client(*await asyncio.open_connection(sock=connection))


# ---- its worker


class ManagerDied(Exception):
    """It did not answer."""


@dataclass
class Worker:
    """Does all that the manager has to do; outlives it."""

    spool: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task, what to submit until it is acknowledged
    acknowledged: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task

    def work(self, connection: socket.socket) -> None:
        """Work until nothing is left.

        Raises:
            ManagerDied: try again with another.
        """
        with connection, connection.makefile("rb") as stream:

            def ask(kind: str, **fields: Any) -> dict[str, Any]:
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"type": kind, "worker_id": "w", "token": token, **fields}).encode())
                    connection.sendall(b"\n")
                return dict(json.loads(self._line(stream)))

            token = self._line(stream).decode().strip()
            while True:
                self._deliver(ask)
                answer = ask("request_task")
                if answer["type"] == "no_task":
                    assert answer["done"], answer
                    return
                task = answer["task"]
                submission = {"task_id": task["task_id"], "attempt": task["attempt"]}
                self.spool[task["task_id"]] = {**submission, "result_data": conftest.result_of(task)}

    @staticmethod
    def _line(stream: Any) -> bytes:
        try:
            line: bytes = stream.readline()
        except OSError as error:
            raise ManagerDied from error
        if not line.endswith(b"\n"):  # nothing, or half an answer
            raise ManagerDied
        return line

    def _deliver(self, ask: Callable[..., dict[str, Any]]) -> None:
        for task_id, submission in list(self.spool.items()):
            answer = ask("submit_result", **submission)
            assert answer["type"] == "ack", answer
            self.acknowledged[task_id] = submission["result_data"]
            del self.spool[task_id]


# ---- one crash


def live(scene: Scene, folder: Path, worker: Worker, crash_at: int | None, has_summaries: bool) -> int:
    """One life of a manager in a folder; its exit status."""
    ours, its = socket.socketpair()
    if pid := os.fork():
        its.close()
        ours.settimeout(LONGEST_WAIT_S)
        with contextlib.suppress(ManagerDied):
            worker.work(ours)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ours.close()
    os.chdir(folder)
    plug = Plug(crash_at)
    plug.install()
    try:
        run_manager(scene, plug, its, set(worker.acknowledged), has_summaries)
    except BaseException:
        Path("error.txt").write_text(traceback.format_exc())
        os._exit(BROKEN)
    Path("points.json").write_text(json.dumps(plug.kinds))
    os._exit(DONE)


def problem_of(scene: Scene, folder: Path, worker: Worker) -> str | None:
    """What is wrong in the folder of a finished sweep."""
    os.chdir(folder)
    ledger = Path(".fedsweep/ledger.sqlite3")
    try:
        with contextlib.closing(sqlite3.connect(ledger)) as db:
            signatures = dict(db.execute("SELECT task_id, signature FROM tasks"))
        acknowledged = {signatures[task_id]: result for task_id, result in worker.acknowledged.items()}
        conftest.assert_sound(ledger, acknowledged)
        violations = check(ledger.parent, acknowledged=acknowledged, has_ended=True)
        assert not violations, list(map(str, violations))
        rows = {path: len(conftest.rows_of(f"{path}/final_results.csv")) for path in scene.rows}
        assert rows == scene.rows
        left = [path.name for path in Path().rglob("*") if path.name.endswith((".tmp", ".new"))]
        assert not left, left
    except AssertionError as error:
        return f"{error}\n{traceback.format_exc()}"
    return None


def crash(
    scene: Scene, folder: Path, crash_at: int, again_at: int | None, has_summaries: bool
) -> tuple[str, str | None]:
    """Crash at a point (and, if told so, again in the recovery): the kind of the point, and what is wrong then.

    Where the crash is not in the summaries, they are left out afterwards: they take the most time.
    """
    scene.set_up(folder)
    worker = Worker(spool=dict(scene.spool))
    if live(scene, folder, worker, crash_at, has_summaries=not scene.is_about_opening) != DEAD:
        return "missed", (folder / "error.txt").read_text() if (folder / "error.txt").exists() else "it was not reached"
    kind = (folder / "point.txt").read_text()
    if again_at is not None:
        live(scene, folder, worker, again_at, has_summaries)
    if live(scene, folder, worker, None, has_summaries) != DONE:
        return kind, (folder / "error.txt").read_text()
    return kind, problem_of(scene, folder, worker)


def points_of(scene: Scene, folder: Path) -> list[str]:
    """The kinds of all points of a sweep that nothing happens to."""
    scene.set_up(folder)
    worker = Worker(spool=dict(scene.spool))
    if live(scene, folder, worker, None, has_summaries=not scene.is_about_opening) != DONE:
        raise RuntimeError((folder / "error.txt").read_text())
    if problem := problem_of(scene, folder, worker):
        raise RuntimeError(problem)
    points: list[str] = json.loads((folder / "points.json").read_text())
    return points


def chosen(points: list[str], stride: int) -> list[int]:
    """Which points to crash at: each, or one of so many and the first of each kind."""
    firsts = {kind: number for number, kind in reversed(list(enumerate(points, start=1)))}
    return sorted({*range(1, len(points) + 1, stride), *firsts.values()})


def crash_often(scene: Scene, root: Path, stride: int, again_at: str) -> dict[str, Any]:
    """Crash at many points or all: which there are, which were hit, and what was wrong."""
    folder = root / "sweep"
    points = points_of(scene, folder)
    hits, problems = [], []
    for crash_at in chosen(points, stride):
        os.chdir(root)
        shutil.rmtree(folder)
        is_twice = crash_at % 2 == ("even", "odd").index(again_at)
        again = 1 + crash_at % TWICE if is_twice else None
        kind, problem = crash(scene, folder, crash_at, again, has_summaries="after send no_task" in points[:crash_at])
        hits.append(kind)
        if problem:
            problems.append([crash_at, kind, problem])
    return {"points": points, "hits": hits, "problems": problems}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Crashes of a manager at points of a small sweep.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("scene", choices=SCENES)
    parser.add_argument("--stride", type=int, default=1, help="crash at one point of so many")
    parser.add_argument("--again", choices=["even", "odd"], default="even", help="points with a crash in the recovery")
    asked = parser.parse_args()
    logging.disable()
    schema.columns_of_a_new_ledger()  # once in a process, and so in none that is forked
    if SCENES[asked.scene].is_on_a_network:
        file_systems.mounts = lambda: [("/", "nfs4")]
    print(json.dumps(crash_often(SCENES[asked.scene], asked.folder.resolve(), asked.stride, asked.again)))
