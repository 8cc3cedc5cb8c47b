"""A sweep that is open: tasks go out, results come in, files follow."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fedsweep.files import fsync
from fedsweep.manager.clock import Clock
from fedsweep.manager.decisions import select
from fedsweep.manager.failures import Failure, SetAside
from fedsweep.manager.fleet import Fleet
from fedsweep.manager.ledger import Ledger
from fedsweep.manager.outputs import Outputs
from fedsweep.manager.projection import Projection
from fedsweep.manager.protocol import MAX_MESSAGE, TaskProgress, encode
from fedsweep.manager.records import LedgerUnwritable, Row, Task, UnknownTask, Verdict
from fedsweep.manager.state_dir import LEDGER_FILE, TOKEN_FILE, StateLock
from fedsweep.manager.status import StatusReporter, brief
from fedsweep.manager.token import ensure_token

log = logging.getLogger(__name__)

LEGACY_LEASE_S = 6 * 3600.0  # old clients send no heartbeats
MAX_HAND_OUT = 256  # tasks in one answer; each takes about 1.1 kB of it, more where its output folders are many or long
MAX_GROUPS = 100  # of failures, in one answer
ENVELOPE = 256  # bytes of an answer besides its tasks
LONGEST_WAIT_S = 5.0
SHOWN_HOLDERS = 8  # workers that are waited for, in the log

Consequence = Callable[[], Iterable[Row] | None]  # of a change that is on disk; the rows that it brings
Ending = Literal["drain", "stop"]
ENDINGS: dict[Ending, str] = {
    "drain": "no more tasks are handed out (fedsweep drain); everything finished is kept",
    "stop": "the sweep was stopped (fedsweep stop); everything finished is kept",
}
SET_ASIDE = (
    "this worker is set aside: it failed {} tasks and finished none in between, while others do not fail; its last "
    "failure: {}. See to this machine, then start the worker again"
)


class OpenSweep:
    """The state directory, held for this process, and everything that workers ask for.

    Every method takes the lock, so it may be called from any thread; each is one change or one look.

    Raises:
        StateError: the state cannot be used, or another manager holds it.
    """

    def __init__(
        self,
        state_dir: Path,
        lock: threading.RLock,
        clock: Clock,
        *,
        heartbeat_s: float,
        lease_s: float,
        expected_workers: int = 1,
    ) -> None:
        self.lock = lock
        self.clock = clock
        self.heartbeat_s = heartbeat_s
        self.lease_s = lease_s
        self.hands_out = True
        self.ending: Ending | None = None  # why workers are told that there is no more for them
        with contextlib.ExitStack() as opened:
            self._held = opened.enter_context(StateLock(state_dir))
            self.ledger = Ledger(state_dir / LEDGER_FILE, clock)
            opened.callback(self.ledger.close)
            self.token = ensure_token(state_dir / TOKEN_FILE)
            fsync(state_dir)  # workers elsewhere have this token
            opened.pop_all()
        self.projection = Projection(self.ledger, clock)
        self.fleet = Fleet(clock, expected_workers)
        self.fleet.set_aside = [SetAside.read(each) for each in json.loads(self.ledger.view.meta("set_aside") or "[]")]
        self.outputs = Outputs(self.ledger.view, lock)
        self._reporter = StatusReporter(self.ledger.view, self.ledger.failures, self.fleet, heartbeat_s)
        self._consequences: list[Consequence] | None = None  # of changes that are made together

    def close(self) -> None:
        """Let the state directory go."""
        self.ledger.close()
        self._held.release()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make what happens within this one change of the ledger: all of it is on disk when this ends, or nothing.

        What follows from a change (rows in files, what is known of workers) follows at the end, once it is on disk.

        Raises:
            LedgerUnwritable: the disk refused something; nothing has happened.
        """
        with self.lock:
            consequences: list[Consequence] = []
            self._consequences = consequences
            try:
                with self.ledger.together():
                    yield
            finally:
                self._consequences = None
            # All rows at once: a file that is made anew has those of every result that the ledger has.
            self.projection.add([row for follow in consequences for row in self._follow(follow)])

    @staticmethod
    def _follow(consequence: Consequence) -> Iterable[Row]:
        try:
            return consequence() or ()
        except Exception:  # the change is made, and the others have consequences of their own
            log.exception("what follows from a change could not be done")
            return ()

    def _once_on_disk(self, consequence: Consequence) -> None:
        """Do this, and write the rows that it returns, once the changes that are being made can not be undone."""
        if self._consequences is None:
            self.projection.add(consequence() or ())
        else:
            self._consequences.append(consequence)

    # ---- tasks ----------------------------------------------------------------------------------------------------

    def hand_out(
        self,
        worker_id: str,
        *,
        max_tasks: int = 1,
        cohort: str | None = None,
        device: str | None = None,
        legacy: bool = False,
    ) -> list[Task]:
        """Tasks for a worker, which may be trained together; empty if there are none for it now.

        See `queue.choose` for which. They fit into one message.
        """
        with self.lock:
            self.take_back_stale()
            worker = self.fleet.asks(worker_id, device)
            if not self.hands_out or self.fleet.is_set_aside(worker):
                return []
            tasks = self.ledger.hand_out(
                worker_id,
                LEGACY_LEASE_S if legacy else self.lease_s,
                1 if legacy else min(max_tasks, MAX_HAND_OUT),
                cohort=cohort,
                workers=1 if max_tasks == 1 and cohort is None else self.fleet.sharers(),
            )
            fitting = self._count_fitting(tasks)
            if tasks[fitting:]:
                self.ledger.take_back(tasks[fitting:])
            self._once_on_disk(partial(self.fleet.handed_out, worker, tasks[:fitting]))
            return tasks[:fitting]

    def _count_fitting(self, tasks: Sequence[Task]) -> int:
        """How many of these tasks fit into one answer; one at least. The first stands in it twice."""
        if len(tasks) < 2:
            return len(tasks)
        room = MAX_MESSAGE - ENVELOPE
        for count, task in enumerate(tasks):
            room -= len(encode(self.task_message(task))) * (2 if count == 0 else 1)
            if room < 0:
                return max(1, count)
        return len(tasks)

    def task_message(self, task: Task) -> dict[str, Any]:
        """A task as its worker gets it."""
        return {
            **task.as_dict(),
            "assigned_at": None if task.assigned_at is None else task.assigned_at.isoformat(),
            "last_error": None if task.last_error is None else brief(task.last_error),
            "cohort": task.cohort,
            "attempt": task.attempt,
            "lease_s": self.lease_s,
            "heartbeat_s": self.heartbeat_s,
        }

    def take_back_stale(self) -> list[str]:
        """Take back the tasks of workers that were silent for too long; their ids."""
        with self.lock:
            try:
                lost = self.ledger.lose_stale()
            except LedgerUnwritable as error:
                log.warning("tasks of silent workers could not be taken back: %s", error)
                return []
        for task in lost:
            log.warning("%s: no sign of its worker; lost %d times, now %s", task.task_id, task.losses, task.status)
        return [task.task_id for task in lost]

    def renew(self, worker_id: str, held: Sequence[TaskProgress], *, device: str | None = None) -> list[str]:
        """Renew the leases of the tasks that a worker holds; the ids of those that it should drop."""
        with self.lock:
            dropped = [task.task_id for task in held if not self._renew(worker_id, task)]
            worker = self.fleet.see(worker_id, device)
            worker.tasks = tuple(task for task in held if task.task_id not in dropped)
            if self.ending == "stop":
                self.fleet.told(worker, asks_again=False)  # while it holds tasks it is waited for anyway
            elif held:
                worker.knows_at = math.inf  # when these have ended, or it has dropped them, it asks again
            return dropped

    def _renew(self, worker_id: str, task: TaskProgress) -> bool:
        try:
            return self.ledger.renew(task.task_id, worker_id, task.attempt)
        except UnknownTask:
            return False

    def save_result(
        self, task_id: str, worker_id: str, result_data: Mapping[str, Any], attempt: int | None = None
    ) -> Verdict:
        """Keep a result: in the ledger on disk, then as a row in every output folder. Only then is it acknowledged.

        Raises:
            UnknownTask, UnknownAttempt: no such task was handed out.
            LedgerUnwritable: nothing was kept; the worker must try again.
        """
        with self.lock:
            verdict = self.ledger.accept(task_id, worker_id, result_data, attempt)
            self._once_on_disk(partial(self._has_succeeded, task_id, worker_id, verdict))
            return verdict

    def _has_succeeded(self, task_id: str, worker_id: str, verdict: Verdict) -> list[Row]:
        self.fleet.succeeded(worker_id, task_id)
        if verdict == "duplicate":
            return []
        self._reporter.pace.finish(self.ledger.view.cost(task_id))
        return self.ledger.view.rows_of(self.ledger.view.task(task_id).number)

    def has_result(self, task_id: str, worker_id: str) -> bool:
        """Whether the result of the task is here, as a worker says.

        Raises:
            UnknownTask: no task has this id.
        """
        with self.lock:
            self.fleet.see(worker_id)
            return self.ledger.view.task(task_id).status == "complete"

    def mark_failed(self, task_id: str, worker_id: str, error: str | Failure, attempt: int | None = None) -> bool:
        """Note that the task's code failed; False if this was not its open attempt and changes nothing."""
        failure = error if isinstance(error, Failure) else Failure.of(error)
        with self.lock:
            ended = self.ledger.fail(task_id, worker_id, failure, attempt)
            if ended is not None:
                self._once_on_disk(partial(self._has_failed, task_id, worker_id, ended, failure))
        return ended is not None

    def _has_failed(self, task_id: str, worker_id: str, attempt: int, failure: Failure) -> None:
        self._reporter.recount()
        forgiven = self.fleet.failed(worker_id, task_id, attempt, failure)
        if forgiven:
            self.ledger.forgive(forgiven)
            self.ledger.set_meta("set_aside", json.dumps([each.as_dict() for each in self.fleet.set_aside]))
            log.warning(
                "%s failed %d tasks in a row and is set aside; the tasks go to others", worker_id, len(forgiven)
            )

    def release(self, task_id: str, worker_id: str, attempt: int | None = None) -> bool:
        """Take a task back without blame; False if this was not its open attempt and changes nothing."""
        with self.lock:
            is_released = self.ledger.release(task_id, worker_id, attempt)
            self._once_on_disk(partial(self.fleet.gave_back, worker_id, task_id))
            return is_released

    # ---- where the sweep stands -----------------------------------------------------------------------------------

    def is_over(self) -> bool:
        """Whether every task is complete or failed for good."""
        with self.lock:
            return self.ledger.view.counts().is_terminal

    def status(self) -> dict[str, Any]:
        """How the sweep is getting on, see docs/protocol.md."""
        with self.lock:
            return self._reporter.status(self.projection.lagging, self.clock.monotonic(), self._why_ending)

    def look_at_pace(self) -> None:
        """Note how far all is, from time to time, so that the time left can be told."""
        with self.lock:
            self._reporter.look_at_pace(self.clock.monotonic(), self._why_ending)

    @property
    def _why_ending(self) -> str | None:
        """Why nothing more is handed out, if so."""
        return self.ending or (None if self.hands_out else "signal")

    def no_task(self, worker_id: str, *, legacy: bool = False) -> dict[str, Any]:
        """What a worker hears that gets no task: whether that is for good, and in words why.

        One that is told that all is done, or to end, need not be waited for once it has heard.
        """
        answer: dict[str, Any] = {"type": "no_task", "done": False, "retry_after": self.retry_after_s}
        with self.lock:
            worker = self.fleet.see(worker_id)
            if self.is_over():
                answer["done"] = True
            elif self.ending is not None:
                answer |= {"done": True, "message": ENDINGS[self.ending]}
            elif self.fleet.is_set_aside(worker):
                why = next(each for each in self.fleet.set_aside if each.worker_id == worker_id)
                answer |= {"set_aside": True, "message": SET_ASIDE.format(why.failures, why.reason)}
            if answer["done"] or "set_aside" in answer:
                self._once_on_disk(partial(self.fleet.told, worker, asks_again=not legacy))
        return answer

    def leave(self, worker_id: str) -> None:
        """Note that a worker ends, since it has heard that there is no more for it."""
        with self.lock:
            self.fleet.left(worker_id)

    def has_told_everyone(self) -> bool:
        """Whether every worker heard of lately knows that all is done."""
        with self.lock:
            return self.fleet.all_know()

    @property
    def retry_after_s(self) -> float:
        """After how long a worker that got no task may ask again."""
        return min(self.heartbeat_s, LONGEST_WAIT_S)

    # ---- what people ask for --------------------------------------------------------------------------------------

    def show_task(self, task_id: str) -> dict[str, Any]:
        """A task as it is.

        Raises:
            UnknownTask: no task has this id.
        """
        with self.lock:
            return self.task_message(self.ledger.view.task(task_id))

    def failures(self, *, earlier: bool = False) -> dict[str, Any]:
        """What failed and why, as `fedsweep failures --json` has it, as far as it fits into one message.

        Of the present tasks, or of those of an `earlier` configuration, which are not run any more.
        """
        with self.lock:
            groups = [group.as_dict() for group in self.ledger.failures.groups(orphaned=earlier)]
            set_aside = [each.as_dict() for each in self.fleet.set_aside]
            left_behind = self.ledger.failures.earlier()
            hands_out = self.hands_out
        room, fitting = MAX_MESSAGE - ENVELOPE - len(encode({"set_aside": set_aside})), 0
        for group in groups[:MAX_GROUPS]:
            room -= len(encode(group))
            if room < 0:
                break
            fitting += 1
        return {
            "groups": groups[:fitting],
            "left_out": len(groups) - fitting,
            "set_aside": set_aside,
            "earlier": left_behind,
            "hands_out": hands_out,
        }

    def retry(self, names: Sequence[str] = ()) -> dict[str, int]:
        """Let failed tasks wait again: all but the cancelled ones, or those of these tasks, phases and groups.

        Returns:
            `retried`, and how many tasks are `cancelled` still.

        Raises:
            UnknownName: a name means nothing; nothing was changed.
        """
        with self.lock:
            view, failures = self.ledger.view, self.ledger.failures
            tasks = select(view, failures, names, shared=True) if names else failures.failed_by_themselves()
            retried = self.ledger.retry(tasks)
            self._reporter.recount()
            cancelled = failures.cancelled()
        log.info("%d failed tasks wait again", retried)
        return {"retried": retried, "cancelled": cancelled}

    def cancel(self, names: Sequence[str]) -> dict[str, int]:
        """Let these tasks not be run, those of these phases that no other phase asks for, and those of these groups.

        Returns:
            `cancelled`; how many of these were `running`; and how many had ended before, `left`.

        Raises:
            UnknownName: a name means nothing; nothing was changed.
        """
        with self.lock:
            tasks = select(self.ledger.view, self.ledger.failures, names, shared=False)
            waited, running = self.ledger.cancel(tasks)
            self._reporter.recount()
        log.info("%d tasks are cancelled, %d of them were running", waited + running, running)
        return {"cancelled": waited + running, "running": running, "left": len(tasks) - waited - running}

    def end(self, ending: Ending) -> dict[str, float]:
        """Hand out nothing more and tell workers to end: when they have finished what they hold, or now.

        Returns:
            How many `workers` are waited for, the `tasks` that they hold, and the longest `lease_s` of these: after so
            long without a sign of its worker a task is waited for no more.
        """
        with self.lock:
            self.hands_out = False
            self.ending = ending
            holders = self.ledger.view.holders()
        log.info(ENDINGS[ending])
        lease_s = max((each.lease_s for each in holders), default=self.lease_s)
        if holders:
            names = [f"{each.worker_id} ({each.tasks} task{'s' * (each.tasks != 1)})" for each in holders]
            if more := len(names[SHOWN_HOLDERS:]):
                names[SHOWN_HOLDERS:] = [f"{more} more"]
            log.info("waiting for %s; a worker without a sign is given up after %.0f s", ", ".join(names), lease_s)
        return {"workers": len(holders), "tasks": sum(each.tasks for each in holders), "lease_s": lease_s}

    # ---- files ----------------------------------------------------------------------------------------------------

    def sync(self, *, patient: bool) -> int:
        """Look at the results files that are not as we left them; how many tasks rows of others completed.

        A patient look leaves a last line that may still be being written alone.
        """
        adopted = 0
        with self.lock:
            due = self.projection.due()
        for output_dir in due:
            with self.lock:  # for one folder at a time, so that requests are answered in between
                adopted += self.projection.sync(output_dir, patient=patient)
        if adopted:
            log.info("%d experiments were completed by rows that others wrote", adopted)
        return adopted

    def is_up_to_date(self) -> bool:
        """Whether every results file can be written."""
        return not self.projection.lagging

    def write_outputs(self) -> None:
        """Bring `summary.csv` and `history.parquet` of every output folder up to date."""
        with self.lock:
            output_dirs = self.ledger.view.output_dirs()
        self.outputs.write(output_dirs)
