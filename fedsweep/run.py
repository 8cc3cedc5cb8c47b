"""`fedsweep run`: a manager and its workers on this machine, shown while they work, and a report at the end."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsweep.datasets import prepare
from fedsweep.errors import FedsweepError, ManagerUnreachable, UsageError
from fedsweep.launch.local import WRONG_USAGE, LocalSweep
from fedsweep.manager.results import finished_signatures
from fedsweep.manager.server import read_token
from fedsweep.manager.sources import read_sources, split_arguments
from fedsweep.manager.state_dir import STATUS_FILE
from fedsweep.plan.config import parse
from fedsweep.plan.grid import Grid, expand
from fedsweep.report.display import choose, duration, panel
from fedsweep.worker.client import ManagerClient
from fedsweep.worker.cpus import available_cpus

INTERRUPTED = 130
POLL_S = 0.25
LOCAL_HEARTBEAT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What the command line of `fedsweep run` asks for."""

    arguments: tuple[str, ...]  # CONFIG and KEY=VALUE, mixed
    state_dir: Path
    data_dir: Path | None
    num_workers: int | None
    device: str
    host: str
    port: int
    max_tasks: int
    quiet: bool
    as_json: bool


def run_sweep(request: RunRequest) -> int:
    """Run the sweep to its end, or to Ctrl-C; the exit status.

    Raises:
        ConfigError: the configuration is wrong; nothing was started.
        FedsweepError: the manager could not start, or no worker stays alive.
    """
    paths, overrides = split_arguments(request.arguments)
    grid = expand(parse(read_sources(paths), overrides), request.max_tasks)
    say = _no_words if request.quiet or request.as_json else partial(Console().print, soft_wrap=True, highlight=False)
    say(_headline(grid))
    _fetch_data(grid, request.data_dir)
    num_workers, device = _workers_and_device(request, say)
    started_at = time.monotonic()
    sweep = LocalSweep(
        manager_arguments=_manager_arguments(request, num_workers),
        worker_arguments=_worker_arguments(request, device, num_workers),
        num_workers=num_workers,
        state_dir=request.state_dir,
        host=request.host,
        port=request.port,
    )
    try:
        with _stop_signals():
            _watch(sweep, request)
    except KeyboardInterrupt:
        return _say_stopped(request, say)
    code = sweep.manager.returncode
    if code == WRONG_USAGE:  # it said why in one line, as every command does
        raise UsageError(sweep.manager.log_tail(1).removeprefix("fedsweep: "))
    status = _last_status(request.state_dir)
    if code in (0, INTERRUPTED) and not status.get("done", code == 0):  # `fedsweep drain`, `stop`, a signal to it
        return _say_stopped(request, say)
    if code not in (0, 1):
        raise FedsweepError(f"the manager could not run the sweep:\n{sweep.manager.log_tail()}")
    _finish(grid, status, request, time.monotonic() - started_at, int(code))
    return int(code)


def _say_stopped(request: RunRequest, say: Any) -> int:
    say(f"Stopped. Everything finished is kept in {request.state_dir}; the same command goes on from there.")
    return INTERRUPTED


def _no_words(*_: object) -> None:
    """Say nothing."""


def _workers_and_device(request: RunRequest, say: Any) -> tuple[int, str]:
    """How many workers to start, and their device."""
    from fedsweep.worker.gpu import list_gpus

    gpus = [] if request.device == "cpu" else list_gpus()
    if request.device == "auto" and not gpus:
        count = request.num_workers or 1
        say(f"No GPU found: training on the CPU with {count} worker{'s' * (count > 1)}.")
        return count, "cpu"
    return request.num_workers or (len(gpus) if request.device == "auto" else 1), request.device


def _fetch_data(grid: Grid, data_dir: Path | None) -> None:
    """Download the data sets of the experiments that are still to be run, once, before the workers all want them.

    Raises:
        DataError: a data set can be found nowhere.
    """
    finished = finished_signatures(grid)
    for name in sorted({task.experiment.dataset for task in grid.tasks if task.signature not in finished}):
        prepare(name, data_dir)


def _headline(grid: Grid) -> str:
    dropped = ""
    if grid.duplicates:
        dropped = f" ({grid.total} asked for, {grid.duplicates} of them duplicates, which run once)"
    return f"{grid.unique} experiments{dropped}; rows go to {', '.join(_output_dirs(grid))}."


def _output_dirs(grid: Grid) -> list[str]:
    return sorted({folder for task in grid.tasks for folder in task.output_dirs})


def _manager_arguments(request: RunRequest, num_workers: int) -> list[str]:
    options = ["--state-dir", str(request.state_dir), "--max-tasks", str(request.max_tasks)]
    hidden = ["--heartbeat-s", str(LOCAL_HEARTBEAT_S), "--expected-workers", str(num_workers)]
    return [*options, *hidden, *request.arguments]


def _worker_arguments(request: RunRequest, device: str, num_workers: int) -> list[str]:
    threads = max(1, available_cpus() // num_workers)
    options = ["--state-dir", str(request.state_dir), "--device", device, "--threads", str(threads)]
    return options if request.data_dir is None else [*options, "--data-dir", str(request.data_dir)]


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Make SIGTERM and a closed terminal end the sweep as Ctrl-C does."""
    # SIGINT too: a shell that starts a command in the background has it ignored.
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _watch(sweep: LocalSweep, request: RunRequest) -> None:
    """Show the sweep until its manager ends."""
    try:
        sweep.start()
        with choose(quiet=request.quiet, as_json=request.as_json) as display:
            while sweep.keep_alive():
                if status := _status_or_none(sweep, request.state_dir):
                    display.update(status)
                time.sleep(POLL_S)
            if sweep.manager.returncode in (0, 1) and (last := _last_status(request.state_dir)):
                display.update(last)
    finally:
        sweep.stop()


def _status_or_none(sweep: LocalSweep, state_dir: Path) -> dict[str, Any] | None:
    try:
        token = read_token(state_dir / "token")
        status: dict[str, Any] = _ask({"type": "status"}, sweep.host, sweep.port, token, 5.0)["status"]
        return status
    except FedsweepError:
        return None  # the manager is being started again


def _last_status(state_dir: Path) -> dict[str, Any]:
    """How the sweep stood when its manager ended; empty where that could not be written."""
    try:
        status: dict[str, Any] = json.loads((state_dir / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return status


def _finish(grid: Grid, status: Mapping[str, Any], request: RunRequest, seconds: float, code: int) -> None:
    """Report what was found: the table, the plots, what failed."""
    from fedsweep.report import has_results, report
    from fedsweep.report.tables import show_report

    folders = [Path(folder) for folder in _output_dirs(grid)]
    made = report([folder for folder in folders if has_results(folder)])
    if request.as_json:
        counts = {name: status.get(name) for name in ("total", "complete", "failed")}
        files = [str(path) for path in made.files]
        print(json.dumps({"event": "end", **counts, "exit_code": code, "seconds": round(seconds, 3), "files": files}))
    elif not request.quiet:
        show_report(made)
        print(f"Finished in {duration(seconds)}.")
    if code == 1:
        print(_failures(status, request.state_dir), file=sys.stderr)


def _failures(status: Mapping[str, Any], state_dir: Path) -> str:
    count = status.get("failed", 0)
    lines = [f"{count} experiment{'s' * (count != 1)} failed for good:"]
    lines += [f"  {failure['task_id']}: {failure['error']}" for failure in status.get("failures", ())]
    lines.append(f"Each has a log in its output folder's logs/; those of the workers are in {state_dir}/logs.")
    lines.append("`fedsweep failures` tells causes apart, `fedsweep retry` lets them be tried again.")
    return "\n".join(lines)


def ask_status(state_dir: Path, manager: str | None = None, token_file: Path | None = None) -> dict[str, Any]:
    """The answer of a running manager to `status`.

    Raises:
        ManagerUnreachable: none answers there.
    """
    status: dict[str, Any] = ask_manager({"type": "status"}, state_dir, manager, token_file)["status"]
    return status


def ask_manager(
    message: Mapping[str, Any],
    state_dir: Path,
    manager: str | None = None,
    token_file: Path | None = None,
    *,
    timeout: float = 5.0,
) -> dict[str, Any]:
    """The answer of a running manager to a message.

    Raises:
        ManagerUnreachable: none answers there.
        ProtocolError: it refuses.
    """
    host, port = _address(state_dir, manager)
    return _ask(message, host, port, read_token(token_file or state_dir / "token"), timeout)


def _address(state_dir: Path, manager: str | None) -> tuple[str, int]:
    if manager is not None:
        host, _, port = manager.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"--manager {manager}: expected HOST:PORT, as in 127.0.0.1:5000")
        return host, int(port)
    try:
        address = json.loads((state_dir / "manager.json").read_text())
        return address["host"], address["port"]
    except (OSError, ValueError, KeyError):
        raise ManagerUnreachable(
            f"no manager is running on {state_dir}; name another --state-dir, or its address by --manager HOST:PORT"
        ) from None


def _ask(message: Mapping[str, Any], host: str, port: int, token: str, timeout: float) -> dict[str, Any]:
    with ManagerClient(host, port, token, timeout=timeout) as client:
        return client.ask(message)


def show_status(status: Mapping[str, Any], *, as_json: bool = False) -> None:
    """Print a status for people, or as one JSON object."""
    if as_json:
        print(json.dumps(status))
        return
    console = Console()
    console.print(panel(status))
    if status.get("failures"):
        table = Table("failed", "last error", box=None)
        for failure in status["failures"]:
            table.add_row(failure["task_id"], failure["error"])
        console.print(table)
        print("`fedsweep failures` puts them together by their cause, with tracebacks.")
