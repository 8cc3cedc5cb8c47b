"""Starts managers or workers in milliseconds: a process that has imported everything, and forks.

Run as a script with a role (`manager` or `worker`). It reads one command a line (`["start", FOLDER, PORT, NAME,
OPTIONS]`, `["kill", PID]`, `["ended", PID]`; the options are those of `run_manager` or `run_worker`) and answers each
with one line; all are JSON. When its standard input ends, it kills what it started, and ends.

What is not as in production: no time is spent on training, several processes share one interpreter's start, and pauses
are short.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any, NoReturn

from histories import Recorder
from plug import Plug

HEARTBEAT_S, LEASE_S = 0.2, 1.2
TOGETHER = 2  # tasks that a worker takes at once


def start(role: str, folder: Path, port: int, name: str, options: dict[str, Any]) -> int:
    """Fork a manager or a worker; its process id."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.setpgid(0, 0)
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log_file = os.open(folder / f"{role}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log_file, 1)
        os.dup2(log_file, 2)
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {name} %(message)s")
        status = (run_manager if role == "manager" else run_worker)(folder, port, name, **options)
    except BaseException:
        logging.exception("ended by")
    finally:
        os._exit(status)


def run_manager(folder: Path, port: int, name: str, lease_s: float = LEASE_S, has_settable_clock: bool = False) -> int:
    """The real manager. The file `days` sets a settable clock ahead, at any time."""
    from fedsweep.manager import ExperimentManager, service

    service.TELL_DONE_S = 2.0  # workers that were killed are not waited for long
    Plug(folder / "points", name).install_in_manager()
    if has_settable_clock:
        make_settable(folder / "days")
    os.chdir(folder)
    options: dict[str, Any] = {"heartbeat_s": HEARTBEAT_S, "lease_s": lease_s, "refresh_s": 0.5}
    return ExperimentManager(["sweep.yaml"], port=port, **options).start()


def run_worker(
    folder: Path, port: int, name: str, together: int = TOGETHER, patience_s: float = 3600.0, **options: str
) -> int:
    """The real worker, with a trainer that computes nothing; for options see `instant.install`."""
    from instant import install

    from fedsweep.worker import worker_loop

    os.chdir(folder)
    Plug(folder / "points", name).install_in_worker()
    Recorder(folder / "history", name).listen_in()
    install(folder, together, **options)
    worker_id = f"{name}-{os.getpid()}-{uuid.uuid4().hex[:6]}"  # as if each were on a host of that name
    return worker_loop(f"127.0.0.1:{port}", "cpu", worker_id=worker_id, threads=1, patience_s=patience_s)


def make_settable(days: Path) -> None:
    """Let the time of day of this process be as many days ahead as a file says."""
    import time
    from datetime import datetime, timedelta

    from fedsweep.manager import clock

    def ahead() -> int:
        return int(days.read_text()) if days.exists() else 0

    class Datetime(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(days=ahead())

    real = time.time
    time.time = lambda: real() + 86_400 * ahead()
    clock.datetime = Datetime  # type: ignore[misc]


def import_everything(role: str) -> None:
    """What the forked processes shall find imported."""
    if role == "manager":
        import fedsweep.manager.results
        import fedsweep.manager.service  # noqa: F401
    else:
        import instant

        instant.load()


def main(role: str) -> NoReturn:
    """Obey until standard input ends."""
    for kind in (signal.SIGTERM, signal.SIGINT):  # whoever stops the storm ends our input, too
        signal.signal(kind, signal.SIG_IGN)
    import_everything(role)
    running: set[int] = set()

    def ended(pid: int, options: int) -> int | None:
        found, status = os.waitpid(pid, options)
        if not found:
            return None
        running.discard(pid)
        return os.waitstatus_to_exitcode(status)

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        answer: int | None = None
        match json.loads(line):
            case ["start", folder, port, name, options]:
                answer = start(role, Path(folder), port, name, options)
                running.add(answer)
            case ["kill", pid]:
                os.kill(pid, signal.SIGKILL)
                answer = ended(pid, 0)
            case ["ended", pid]:
                answer = ended(pid, os.WNOHANG)
            case command:
                raise SystemExit(f"this is no command: {command}")
        print(json.dumps(answer), flush=True)
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
