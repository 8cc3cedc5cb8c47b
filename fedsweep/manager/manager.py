"""`ExperimentManager`: reads configurations, hands out experiments, keeps every result, ends when all is done."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shlex
import threading
from collections.abc import Awaitable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsweep import __version__
from fedsweep.errors import StateError, UsageError
from fedsweep.manager import answers, file_systems, service
from fedsweep.manager.clock import Clock
from fedsweep.manager.columns import FILE_NAME
from fedsweep.manager.failures import Failure
from fedsweep.manager.fleet import LIVE_S
from fedsweep.manager.gathering import CHANGING, Gathering
from fedsweep.manager.output_roots import check_known_dirs, check_output_dirs
from fedsweep.manager.protocol import Request
from fedsweep.manager.records import PlanChange, Verdict, orphans_words
from fedsweep.manager.refresher import Refresher
from fedsweep.manager.server import serve_connection
from fedsweep.manager.sources import read_sources
from fedsweep.manager.state_dir import LEDGER_FILE, write_last_status
from fedsweep.manager.state_json import read_state, write_state
from fedsweep.manager.sweep import LEGACY_LEASE_S, OpenSweep
from fedsweep.manager.tls import Identity
from fedsweep.manager.views import CompletedSignatures, Tasks
from fedsweep.plan.config import SweepConfig, parse
from fedsweep.plan.experiment import from_config
from fedsweep.plan.grid import Grid, expand

log = logging.getLogger(__name__)

LEASE_HEARTBEATS = 12  # a task goes to another worker after this many heartbeats were missed
ALL_COMPLETE, SOME_FAILED, INTERRUPTED = 0, 1, 130
SHOWN_FOLDERS = 8
ENDED_AS_ASKED = 0  # with tasks left: by SIGTERM, `drain` or `stop`


class ExperimentManager:
    """Runs a sweep: makes tasks of a grid, hands them to workers over TCP, and writes every result to disk.

    `start` does it all and blocks until the sweep is over. The state directory belongs to one manager at a time and
    is opened when it is first needed; `close` (or `with`) lets it go. Every method may be called from any thread.

    Args:
        configs: YAML files, folders or globs; none goes on with what the state directory holds.
        host: address to listen on.
        port: port to listen on; 0 picks a free one, found in `port` once `running`.
        state_dir: where the ledger, the token and the address of this manager lie.
        overrides: `KEY=VALUE` strings that replace defaults of the configurations.
        allow_legacy: serve old clients, which send no token, on loopback.
        insecure_plaintext: do without TLS on an address that other machines reach.
        heartbeat_s: how often workers shall say that they live.
        lease_s: after how long a silent worker loses its task; twelve heartbeats if None.
        refresh_s: how often the results files are looked at for rows that others wrote.
        max_tasks: a grid with more points is refused.
        output_roots: folders in which output folders may lie, besides the current one.
        expected_workers: how many workers will come within the first minute; the first leaves the others their share.
        stay: serve on when all is done.
        grace_s: how long a manager that is stopped still takes results of open attempts.
        clock: replaces the clocks of this machine, for tests.
    """

    def __init__(
        self,
        configs: Sequence[str | Path] = (),
        host: str = "127.0.0.1",
        port: int = 5000,
        state_dir: str | Path = ".fedsweep",
        *,
        overrides: Sequence[str] = (),
        allow_legacy: bool = False,
        insecure_plaintext: bool = False,
        heartbeat_s: float = 10.0,
        lease_s: float | None = None,
        refresh_s: float = 5.0,
        max_tasks: int = 1_000_000,
        output_roots: Sequence[str | Path] = (),
        expected_workers: int = 1,
        stay: bool = False,
        grace_s: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self.configs = tuple(configs)
        self.host = host
        self.port = port
        self.state_dir = Path(state_dir)
        self.state_file = str(self.state_dir / LEDGER_FILE)
        self.overrides = tuple(overrides)
        self.allow_legacy = allow_legacy
        self.insecure_plaintext = insecure_plaintext
        self.heartbeat_s = heartbeat_s
        self.lease_s = LEASE_HEARTBEATS * heartbeat_s if lease_s is None else lease_s
        self.refresh_s = refresh_s
        self.max_tasks = max_tasks
        self.output_roots = tuple(map(Path, output_roots))
        self.expected_workers = expected_workers
        self.stay = stay
        self.grace_s = grace_s
        self.clock = clock or Clock()
        self.lock = threading.RLock()
        self.running = False
        self.identity: Identity | None = None  # what it shows on an address that other machines reach
        self.stops = 0  # how often it was told to stop
        self.ended_as_asked = False  # whether to end with tasks left is no interruption
        self._open_sweep: OpenSweep | None = None
        self._gathering = Gathering(self.answer_together)
        self._config: SweepConfig | None = None
        self._digest = ""

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def sweep(self) -> OpenSweep:
        """The sweep in the state directory, which this opens.

        Raises:
            StateError: the state cannot be used, or another manager holds it.
        """
        with self.lock:
            if self._open_sweep is None:
                self._open_sweep = OpenSweep(
                    self.state_dir,
                    self.lock,
                    self.clock,
                    heartbeat_s=self.heartbeat_s,
                    lease_s=self.lease_s,
                    expected_workers=self.expected_workers,
                )
            return self._open_sweep

    @property
    def tasks(self) -> Tasks:
        """Every task of the grid by its id. A read-only view of the ledger."""
        return Tasks(self.sweep.ledger.view, self.lock)

    @property
    def assigned_tasks(self) -> Tasks:
        """The tasks that workers hold, by id. A read-only view of the ledger."""
        return Tasks(self.sweep.ledger.view, self.lock, "assigned")

    @property
    def completed_tasks(self) -> CompletedSignatures:
        """The signatures of the tasks that have a result. A read-only view of the ledger."""
        return CompletedSignatures(self.sweep.ledger.view, self.lock)

    def close(self) -> None:
        """Let the state directory go."""
        with self.lock:
            if self._open_sweep is not None:
                self._open_sweep.close()
                self._open_sweep = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save_state(self, path: str | Path | None = None) -> None:
        """Bring the ledger's file up to date, or write the state to a `.json` file for people and other programs."""
        with self.lock:
            if path is None:
                self.sweep.ledger.checkpoint()
            else:
                write_state(_json_path(path), self.sweep.ledger.view, self.clock.now())

    def load_state(self, path: str | Path | None = None) -> bool:
        """Open the ledger; bring the tasks of a `.json` state into it, ours or an old manager's, if one is named.

        Returns:
            Whether the tasks are those of the configurations, so that none need to be generated.

        Raises:
            StateError: the state cannot be used, or another manager holds it.
            ConfigError: a JSON state has tasks that are no experiments of ours; nothing was changed.
        """
        if path is not None:
            self._take_over(_json_path(path))
        with self.lock:
            view = self.sweep.ledger.view
            return view.counts().total > 0 and (not self.configs or view.meta("plan_digest") == self._digest)

    def _take_over(self, path: Path) -> None:
        state = read_state(path)
        folders = (cell.output_dir for task in state.tasks for cell in task.planned.cells)
        check_known_dirs(folders, self.output_roots, str(path))
        with self.lock:
            brought = self.sweep.ledger.take_over(state, LEGACY_LEASE_S)
            self.load_completed_tasks()
            unproven = sum(1 for signature in brought.called_complete if signature not in self.completed_tasks)
        log.info(
            "%s: %d tasks taken over, %d known already, %d still with their workers",
            path,
            brought.added,
            brought.known,
            brought.still_assigned,
        )
        if unproven:
            log.warning("%s calls %d tasks complete of which no result is found; they will run again", path, unproven)

    # ---- tasks ----------------------------------------------------------------------------------------------------

    def load_all_configs(self) -> SweepConfig:
        """Read and check every configuration.

        Raises:
            ConfigError: with every problem of every file.
        """
        sources = read_sources(self.configs)
        self._config = parse(sources, self.overrides)
        content = [__version__, self.overrides, [source.text for source in sources]]
        self._digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return self._config

    def generate_experiments(self) -> Grid:
        """Every experiment that the configurations ask for, each once, with all its cells.

        Raises:
            ConfigError: there are more than `max_tasks`, or rows would go outside the folders that are allowed.
        """
        config = self._config or self.load_all_configs()
        grid = expand(config, self.max_tasks)
        check_output_dirs(config, grid, self.output_roots)
        return grid

    def generate_all_tasks(self) -> PlanChange:
        """Make the experiments of the configurations the tasks of the ledger; what is known of them is kept."""
        return self._store(self.generate_experiments())

    def _store(self, grid: Grid) -> PlanChange:
        with self.lock:
            change = self.sweep.ledger.store_plan(grid.tasks, self._digest)
            self.sweep.ledger.set_meta("duplicates", str(grid.duplicates))
        self._note(change)
        return change

    def _note(self, change: PlanChange) -> None:
        with self.lock:
            self.sweep.ledger.set_meta("plan_change", json.dumps(change.as_dict()))
            orphaned = self.sweep.ledger.view.counts().orphaned
        words = "; ".join(filter(None, (str(change), orphans_words(orphaned))))
        log.info("%d experiments: %s", change.added + change.kept + change.restored, words)

    @staticmethod
    def _create_task_signature(config: Mapping[str, Any]) -> str:
        """What identifies the computation that a task's config asks for."""
        return from_config(config).signature

    def load_completed_tasks(self) -> int:
        """Read every results file: adopt rows that others wrote, repair the rest; how many tasks this completed."""
        return self.sweep.sync(patient=False)

    def refresh_completed(self) -> int:
        """Look again at the results files that changed; how many tasks this completed."""
        return self.sweep.sync(patient=True)

    def check_stale_assignments(self) -> list[str]:
        """Take back the tasks of workers that were silent for too long; their ids."""
        return self.sweep.take_back_stale()

    def get_next_task(self, worker_id: str) -> dict[str, Any] | None:
        """The next task for a worker, which now holds it; None if there is none."""
        tasks = self.sweep.hand_out(worker_id)
        return self.sweep.task_message(tasks[0]) if tasks else None

    def save_result(
        self, task_id: str, worker_id: str, result_data: Mapping[str, Any], attempt: int | None = None
    ) -> Verdict:
        """Keep a result: in the ledger on disk, then as a row in every output folder; see `OpenSweep.save_result`."""
        return self.sweep.save_result(task_id, worker_id, result_data, attempt)

    def mark_complete(self, task_id: str, worker_id: str) -> bool:
        """Whether the result of the task is here, as a worker says."""
        return self.sweep.has_result(task_id, worker_id)

    def mark_failed(self, task_id: str, worker_id: str, error: str | Failure, attempt: int | None = None) -> bool:
        """Note that the task's code failed; False if this was not its open attempt and changes nothing."""
        return self.sweep.mark_failed(task_id, worker_id, error, attempt)

    def check_all_complete(self) -> bool:
        """Whether every task is complete or failed for good."""
        return self.sweep.is_over()

    def get_status(self) -> dict[str, Any]:
        """How the sweep is getting on, see docs/protocol.md."""
        return self.sweep.status()

    # ---- serving --------------------------------------------------------------------------------------------------

    def answer(self, request: Request, legacy: bool) -> dict[str, Any]:
        """The answer to a request; `legacy` says that an old client sent it.

        Raises:
            ProtocolError: the request cannot be served; the code says why.
        """
        return answers.answer(self.sweep, request, legacy)

    def answer_together(self, asked: Sequence[tuple[Request, bool]]) -> list[dict[str, Any] | Exception]:
        """The answers to several requests, as `answer` gives them, or what it would raise; see `OpenSweep.together`."""
        return answers.answer_together(self.sweep, asked)

    def _answer_in_time(self, request: Request, legacy: bool) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """The answer to a request, or, where that waits for the disk, what it can be awaited from."""
        return (self._gathering.answer if isinstance(request, CHANGING) else self.answer)(request, legacy)

    async def handle_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        await serve_connection(
            reader,
            writer,
            self._answer_in_time,
            token=self.sweep.token,
            tls=None if self.identity is None else self.identity.context,
            allow_legacy=self.allow_legacy,
        )

    def run_server(self) -> None:
        """Serve until the sweep is over or the manager is told to stop.

        Raises:
            UsageError: the address cannot be listened on.
        """
        with self.lock:
            if not self._ended_in_order():
                self._expect_workers()
            self.sweep.ledger.set_meta("ended_in_order", "no")
        asyncio.run(service.serve(self, stay=self.stay, grace_s=self.grace_s))
        with self.lock:
            self.sweep.ledger.set_meta("ended_in_order", "yes")

    def _ended_in_order(self) -> bool:
        return self.sweep.ledger.view.meta("ended_in_order") != "no"

    def _expect_workers(self) -> None:
        """Count workers that an earlier manager served just now as live: they wait to hear that all is done."""
        since = self.clock.now() - timedelta(seconds=LIVE_S)
        for worker_id in self.sweep.ledger.view.workers_since(since):
            self.sweep.fleet.see(worker_id)

    def stop(self, is_expected: bool = False) -> None:
        """Hand out nothing more and end: once no attempt is open or the grace is over; at once if told twice.

        Args:
            is_expected: whether a manager that ends so, with tasks left, has done what it was asked to (status 0).
        """
        self.stops += 1
        self.ended_as_asked = is_expected
        with self.lock:
            if self._open_sweep is not None:
                self._open_sweep.hands_out = False
        log.info("stopping%s", " now" if self.stops > 1 else "; results of running tasks are still taken")

    def start(self) -> int:
        """Run the sweep to its end; the exit status: 0 all complete, or ended before as asked (SIGTERM, `drain`,
        `stop`); 1 some failed for good; 130 interrupted before.

        The state directory is let go at the end; to look at the tasks afterwards opens it again.

        Raises:
            ConfigError: a configuration is wrong; nothing was started.
            StateError: the state directory cannot be used, or another manager holds it.
            UsageError: there is nothing to run, or the address cannot be listened on.
        """
        try:
            return self._run()
        finally:
            self.close()

    def _run(self) -> int:
        if self.configs:
            self.load_all_configs()
        is_first_start = not Path(self.state_file).exists()
        grid = self.generate_experiments() if self.configs and is_first_start else None  # or refused: nothing is made
        if self.load_state():
            self._note(PlanChange(added=0, kept=len(self.tasks), removed=0, restored=0))
        elif grid is not None:
            self._store(grid)
        elif self.configs:
            self.generate_all_tasks()
        else:
            raise UsageError(f"{self.state_dir} has no tasks and no configuration is named; name a YAML file")
        check_known_dirs(self.sweep.ledger.view.output_dirs(), self.output_roots, str(self.state_dir))
        if words := file_systems.warning(self.state_dir):
            log.warning(words)
        self.load_completed_tasks()
        self.save_state()
        if self.stay or not self.check_all_complete() or not self._ended_in_order():
            refresher = Refresher(self.sweep, self.refresh_s)
            refresher.start()
            try:
                self.run_server()
            finally:
                refresher.stop()
        return self._finish()

    def _finish(self) -> int:
        """Bring every file up to date and on disk; the exit status."""
        self.load_completed_tasks()
        with self.lock:
            self.sweep.projection.flush()
            counts = self.sweep.ledger.view.counts()
            cancelled = self.sweep.ledger.failures.cancelled()
            folders = self.sweep.ledger.view.output_dirs()
        if self.stops < 2:
            self.sweep.write_outputs()
        self.save_state()
        try:
            write_last_status(self.state_dir, self.get_status())
        except OSError as error:
            log.warning("%s: the last status could not be written: %s", self.state_dir, error)
        left = counts.pending + counts.assigned
        further = "; the same command goes on from there" if left else ""
        not_run = f", {cancelled} cancelled" if cancelled else ""
        log.info(
            "%d complete, %d failed%s, %d left%s", counts.complete, counts.failed - cancelled, not_run, left, further
        )
        if counts.complete:
            log.info(report_words([folder for folder, is_active in folders.items() if is_active]))
        if not counts.is_terminal:
            return ENDED_AS_ASKED if self.ended_as_asked or self.sweep.ending is not None else INTERRUPTED
        return SOME_FAILED if counts.failed else ALL_COMPLETE


def report_words(folders: Sequence[str]) -> str:
    """Where results are, and how to look at them."""
    shown = shlex.join(folders[:SHOWN_FOLDERS])
    more = f", and {len(folders) - SHOWN_FOLDERS} folders more" if len(folders) > SHOWN_FOLDERS else ""
    return f"rows are in each folder's {FILE_NAME}; tables and plots: fedsweep report {shown}{more}"


def _json_path(path: str | Path) -> Path:
    if Path(path).suffix != ".json":
        raise StateError(f"{path} is not a .json file; the ledger itself is opened by --state-dir")
    return Path(path)
