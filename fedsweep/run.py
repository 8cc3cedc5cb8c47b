"""`fedsweep run`: a manager and its workers on this machine, shown while they work, and a report at the end."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsweep.address import Address, known_address, parse_address
from fedsweep.datasets import prepare
from fedsweep.errors import FedsweepError, ManagerUnreachable, StateError, UsageError
from fedsweep.files import read_word
from fedsweep.launch.local import WRONG_USAGE, LocalSweep
from fedsweep.manager import file_systems
from fedsweep.manager.at_rest import failed_groups, is_cancelled, standing
from fedsweep.manager.failures import Group
from fedsweep.manager.output_roots import check_output_dirs
from fedsweep.manager.records import orphans_words
from fedsweep.manager.results import finished_signatures
from fedsweep.manager.sources import read_sources, split_arguments
from fedsweep.manager.state_dir import STATUS_FILE, refuse_if_held
from fedsweep.manager.token import read_token
from fedsweep.plan.config import parse
from fedsweep.plan.grid import Grid, expand
from fedsweep.report.display import choose, duration, panel
from fedsweep.worker.client import ManagerClient
from fedsweep.worker.cpus import available_cpus

INTERRUPTED = 130
POLL_S = 0.25
LOCAL_HEARTBEAT_S = 1.0
SHOWN_CAUSES = 5
SHOWN_CANCELLED = 3


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
    output_roots: tuple[Path, ...] = ()
    quiet: bool
    as_json: bool


def run_sweep(request: RunRequest) -> int:
    """Run the sweep to its end, or to Ctrl-C; the exit status.

    Raises:
        ConfigError: the configuration is wrong; nothing was started.
        FedsweepError: the manager could not start, or no worker stays alive.
    """
    paths, overrides = split_arguments(request.arguments)
    config = parse(read_sources(paths), overrides)
    grid = expand(config, request.max_tasks)
    check_output_dirs(config, grid, request.output_roots)
    refuse_if_held(request.state_dir)
    say = _no_words if request.quiet or request.as_json else partial(Console().print, soft_wrap=True, highlight=False)
    say(_headline(grid))
    if words := file_systems.warning(request.state_dir):
        say(f"Note: {words}.")
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
            _watch(sweep, request, say)
    except KeyboardInterrupt:
        is_told = sweep.manager.returncode in (0, 1, INTERRUPTED)
        return _say_stopped(_last_status(request.state_dir) if is_told else {}, request, say)
    code = sweep.manager.returncode
    if code == WRONG_USAGE:  # it said why in one line, as every command does
        raise UsageError(sweep.manager.log_tail(1).removeprefix("fedsweep: "))
    status = _last_status(request.state_dir)
    if code in (0, INTERRUPTED) and not status.get("done", code == 0):  # `fedsweep drain`, `stop`, a signal to it
        return _say_stopped(status, request, say)
    if code not in (0, 1):
        raise FedsweepError(f"the manager could not run the sweep:\n{sweep.manager.log_tail()}")
    _finish(grid, status, request, time.monotonic() - started_at, int(code))
    return int(code)


def _say_stopped(status: Mapping[str, Any], request: RunRequest, say: Callable[[str], object]) -> int:
    how_far = ""
    if status.keys() >= {"total", "complete", "failed"}:  # it may not have been written
        cancelled = status.get("cancelled", 0)
        counts = {"failed": status["failed"] - cancelled, "cancelled": cancelled}
        others = "".join(f", {count} {word}" for word, count in counts.items() if count)
        how_far = f": {status['complete']} of {status['total']} experiments are complete{others}"
    say(
        f"Stopped{how_far}. What has finished, and the rounds of what was running, are kept in {request.state_dir}; "
        "the same command goes on from there."
    )
    return INTERRUPTED


def _stopping_words(status: Mapping[str, Any]) -> str:
    """What is waited for after a first Ctrl-C, and what a second would do."""
    count = status.get("assigned", 0)
    running = f"{count} running experiment{'s' * (count != 1)} to be saved"
    what = running if count else "the workers and the manager to end"
    return (
        f"Stopping: waiting some seconds for {what}. Ctrl-C again stops at once; results are kept then too, "
        "and rounds up to the last checkpoint."
    )


def _no_words(*_: object) -> None:
    """Say nothing."""


def _workers_and_device(request: RunRequest, say: Callable[[str], object]) -> tuple[int, str]:
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
    options += [word for root in request.output_roots for word in ("--allow-output-root", str(root))]
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


def _watch(sweep: LocalSweep, request: RunRequest, say: Callable[[str], object]) -> None:
    """Show the sweep until its manager ends."""
    status: dict[str, Any] = {}
    try:
        sweep.start()
        has_ended = sweep.manager.returncode in (0, 1)  # it had nothing to do
        first = _last_status(request.state_dir) if has_ended else _status_or_none(sweep, request.state_dir)
        _say_what_is_not_run(first or {}, say)
        if sweep.address.pin is not None:
            say(f"Workers elsewhere: fedsweep worker --token-file TOKEN --join '{sweep.address.for_others()}'")
        with choose(quiet=request.quiet, as_json=request.as_json) as display:
            while sweep.keep_alive():
                if answered := _status_or_none(sweep, request.state_dir):
                    status = answered
                    display.update(status)
                time.sleep(POLL_S)
            if sweep.manager.returncode in (0, 1) and (last := _last_status(request.state_dir)):
                display.update(last)
    except KeyboardInterrupt:
        say(_stopping_words(status))
        raise
    finally:
        sweep.stop()


def _say_what_is_not_run(status: Mapping[str, Any], say: Callable[[str], object]) -> None:
    if words := orphans_words(status.get("orphaned", 0)):
        say(f"{words}.")


def _status_or_none(sweep: LocalSweep, state_dir: Path) -> dict[str, Any] | None:
    try:
        token = read_token(state_dir / "token")
        status: dict[str, Any] = _ask({"type": "status"}, sweep.address, token)["status"]
        return status
    except FedsweepError:
        return None  # the manager is being started again


def _last_status(state_dir: Path) -> dict[str, Any]:
    """How the sweep stood when its manager ended; empty where that could not be written."""
    return read_word(state_dir / STATUS_FILE)


def _finish(grid: Grid, status: Mapping[str, Any], request: RunRequest, seconds: float, code: int) -> None:
    """Report what was found: the table, the plots, what failed."""
    from fedsweep.report import has_results, report, words_without_results
    from fedsweep.report.tables import show_report

    folders = [Path(folder) for folder in _output_dirs(grid)]
    empty = [folder for folder in folders if not has_results(folder)]
    made = report([folder for folder in folders if folder not in empty], state_dir=request.state_dir)
    if request.as_json:
        counts = {name: status.get(name) for name in ("total", "complete", "failed")}
        files = [str(path) for path in made.files]
        print(json.dumps({"event": "end", **counts, "exit_code": code, "seconds": round(seconds, 3), "files": files}))
    elif not request.quiet:
        show_report(made)
        for words in words_without_results(empty, request.state_dir) if empty else ():
            print(words)
        print(f"Finished in {duration(seconds)}.")
    if code == 1:
        print(_not_complete(status, request.state_dir), file=sys.stderr)


def _not_complete(status: Mapping[str, Any], state_dir: Path) -> str:
    """What failed for good, one line for each cause, and what was cancelled."""
    cancelled = status.get("cancelled", 0)
    failed = status.get("failed", 0) - cancelled
    try:
        groups = failed_groups(state_dir)
    except StateError:  # the counts are known all the same
        groups = []
    option = state_option(state_dir)
    lines = []
    if failed:
        causes = [group for group in groups if not is_cancelled(group)]
        lines.append(f"{_experiments(failed)} failed for good:")
        lines += [f"  {_some_task(each)}: {each.cause}" for each in causes[:SHOWN_CAUSES]]
        if more := len(causes[SHOWN_CAUSES:]):
            lines.append(f"  and {more} more cause{'s' * (more != 1)}")
        lines.append(f"`fedsweep failures{option}` says more, `fedsweep retry{option}` lets them be tried again.")
        lines.append(f"Each has a log in its output folder's logs/; those of the workers are in {state_dir}/logs.")
    if cancelled:
        names = [name for group in groups if is_cancelled(group) for name in group.task_ids][:SHOWN_CANCELLED]
        more_names = [f"{cancelled - len(names)} more"] if names and cancelled > len(names) else []
        which = f" ({', '.join([*names, *more_names])})" if names else ""
        verb, them = ("was", "it") if cancelled == 1 else ("were", "them")
        lines.append(
            f"{_experiments(cancelled)}{which} {verb} cancelled; `fedsweep retry cancelled{option}` brings {them} back."
        )
    return "\n".join(lines)


def _some_task(group: Group) -> str:
    """How many tasks failed so, and one of them."""
    return group.task_ids[0] if group.failed == 1 else f"{group.failed}, such as {group.task_ids[0]}"


def _experiments(count: int) -> str:
    return f"{count} experiment{'s' * (count != 1)}"


def state_option(state_dir: Path) -> str:
    """What a command needs to find this state directory."""
    return "" if state_dir == Path(".fedsweep") else f" --state-dir {shlex.quote(str(state_dir))}"


def ask_status(
    state_dir: Path,
    manager: str | None = None,
    token_file: Path | None = None,
    *,
    insecure_plaintext: bool = False,
) -> dict[str, Any]:
    """The answer of a running manager to `status`.

    Args:
        state_dir: of a manager on this machine, with its address and its token.
        manager: HOST:PORT, or a join string; in place of the address there.
        token_file: in place of the token there.
        insecure_plaintext: send the token to another machine although nothing is encrypted.

    Raises:
        ManagerUnreachable: none answers there.
        ManagerNotTrusted: what answers there is not that manager.
    """
    found: dict[str, Any] = ask_manager(
        {"type": "status"}, state_dir, manager, token_file, insecure_plaintext=insecure_plaintext
    )["status"]
    return found


def ask_manager(
    message: Mapping[str, Any],
    state_dir: Path,
    manager: str | None = None,
    token_file: Path | None = None,
    *,
    timeout: float = 5.0,
    insecure_plaintext: bool = False,
) -> dict[str, Any]:
    """The answer of a running manager to a message; see `ask_status`.

    Raises:
        ManagerUnreachable: none answers there.
        ManagerNotTrusted: what answers there is not that manager.
        ProtocolError: it refuses.
    """
    address = known_address(state_dir) if manager is None else parse_address(manager)
    if address is None:
        raise ManagerUnreachable(
            f"no manager is running on {state_dir}; name another --state-dir, or its address by --manager HOST:PORT"
            f"{_as_it_stands(state_dir)}"
        )
    token = read_token(token_file or state_dir / "token")
    return _ask(message, address, token, timeout, insecure_plaintext=insecure_plaintext)


def _as_it_stands(state_dir: Path) -> str:
    """How far a sweep is that no manager runs, on a line of its own; empty where that is not known."""
    try:
        found = standing(state_dir)
    except StateError:  # none, or `fedsweep doctor` says what is wrong with it
        return ""
    next_step = "; the command that started it goes on from there" if not found.counts.is_terminal else ""
    return f"\nAs it was left on {found.seen_at:%d %b %H:%M}: {found}{next_step}."


def _ask(
    message: Mapping[str, Any], address: Address, token: str, timeout: float = 5.0, *, insecure_plaintext: bool = False
) -> dict[str, Any]:
    client = ManagerClient(
        address.host, address.port, token, timeout=timeout, pin=address.pin, insecure_plaintext=insecure_plaintext
    )
    with client:
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
