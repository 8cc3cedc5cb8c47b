"""Tasks of one cohort, trained together: each is delivered when it ends, and others join in its place."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from fedsweep.datasets import load_global_dataset
from fedsweep.errors import Preempted, ProtocolError
from fedsweep.fl.candidates import arithmetic
from fedsweep.fl.data import ImageData
from fedsweep.fl.engine import Cohort, Saved
from fedsweep.fl.engine import Progress as RoundEnd
from fedsweep.fl.lanes import Trainer
from fedsweep.manager.protocol import TaskMessage
from fedsweep.plan.cohort import cohort_key
from fedsweep.plan.experiment import Experiment, from_config
from fedsweep.worker.checkpoints import Checkpoint, Origin
from fedsweep.worker.held import HeldTasks
from fedsweep.worker.plans import choose_trainer
from fedsweep.worker.result import Progress, records, result_of
from fedsweep.worker.room import bytes_per_experiment, free_memory, how_many_fit
from fedsweep.worker.station import Station

log = logging.getLogger(__name__)

REFILL_SHARE = 4  # one part of so many of the room has to be free
# Remembering where experiments stand may take one part of so many of the time. On a GPU it copies their weights.
REMEMBER_SHARE = 20
LAST_SAVES_S = 2.0  # for saving all when asked to stop


@dataclass(frozen=True)
class _Joined:
    """An experiment that trains."""

    task_id: str
    experiment: Experiment
    signature: str
    since: float  # when it joined
    before: float  # seconds that it had taken until then


class CohortRun:
    """Experiments that train together in this worker."""

    def __init__(self, station: Station, held: HeldTasks, key: str, data: ImageData, trainer: Trainer, room: int):
        """Train experiments with cohort key `key` on `data`, which lies on the device; `room` of them fit at once."""
        self.station = station
        self.held = held
        self.key = key
        self.room = room
        self.strangers: list[TaskMessage] = []  # what the manager gave us besides, of another cohort
        self._data = data
        self._cohort = self._new_cohort(trainer)
        self._waiting: deque[TaskMessage] = deque()  # held, and not in memory yet
        self._joined: dict[str, _Joined] = {}
        self._remembered: dict[str, Checkpoint] = {}  # where each stood after a round that is not long ago
        self._remember_at = station.clock()
        self._save_at = station.clock() + station.checkpoint_s
        self._manager_key: str | None = None  # what the manager calls this cohort

    def run(self, tasks: Sequence[TaskMessage]) -> None:
        """Train these tasks and those that join them until none is left.

        Raises:
            Preempted: a stop signal came; the tasks that have not ended are still held.
        """
        self._waiting.extend(tasks)
        self._fill()
        while self._cohort.names:
            try:
                with self.station.stop.interruptible():
                    ends = self._cohort.run_round()
            except Preempted:
                raise
            except Exception as error:
                self._go_back(error)
            else:
                self._after_round(ends)

    def save_all(self) -> None:
        """Save every experiment as it stood after the last round, in a short time: this worker was asked to stop."""
        deadline = time.monotonic() + LAST_SAVES_S
        for checkpoint in list(self._remembered.values()):
            if time.monotonic() > deadline:
                log.warning("not all experiments could be saved in %g s; some will begin again", LAST_SAVES_S)
                return
            self.held.checkpoints.write(checkpoint)

    # ---- joining

    def _fill(self) -> None:
        """Let those that wait join while there is room."""
        while self._waiting and len(self._cohort.names) < self.room:
            task = self._waiting.popleft()
            self._manager_key = task.cohort
            experiment = from_config({**task.config, "seed": task.seed})
            signature = task.signature or experiment.signature
            found = self.held.checkpoints.find(self._origin(signature))
            try:
                with self.station.stop.interruptible():
                    self._join_one(task.task_id, experiment, found)
            except Preempted:
                raise
            except Exception as error:
                self.held.fail(task.task_id, error)
                continue
            before = 0.0 if found is None else found.seconds
            self._joined[task.task_id] = _Joined(task.task_id, experiment, signature, self.station.clock(), before)

    def _join_one(self, task_id: str, experiment: Experiment, found: Checkpoint | None) -> None:
        if found is None:
            self._cohort.join(task_id, experiment)
            return
        saved: Saved = found.saved
        self._cohort.join(task_id, experiment, saved)
        self._remembered[task_id] = found
        self.held.note(task_id, f"resumed after round {len(saved['history'])}")

    def _origin(self, signature: str) -> Origin:
        return Origin.of(signature, arithmetic(self._cohort.trainer.plan), self.station.device.torch_name)

    def _refill(self) -> None:
        """Let others join in the place of those that have ended; where none waits, ask for more."""
        self._fill()
        free = self.room - len(self._cohort.names)
        if self._manager_key is None or REFILL_SHARE * free < self.room or self.held.is_manager_away:
            return
        try:
            reply = self.station.request(free, self._manager_key)
        except ProtocolError as error:
            log.info("no more tasks are asked for this cohort: %s", error)
            self._manager_key = None
            return
        if reply.kind in ("done", "set_aside"):
            self._manager_key = None  # it has no more for us; "wait" may also mean that others have a share
        new = self.held.take(reply.tasks)
        self.station.stop.check()
        mine = [task for task in new if key_of(task, self.held) == self.key]
        self.strangers += [task for task in new if task not in mine and task.task_id in self.held]
        self._waiting.extend(mine)
        self._fill()

    # ---- a round that raised

    def _new_cohort(self, trainer: Trainer) -> Cohort:
        cohort = Cohort(self._data, trainer)
        cohort.most_at_once = self.room
        return cohort

    def _go_back(self, error: Exception) -> None:
        """Begin the round again with half as many at once: it raised in the middle, for want of memory most likely.

        What a trainer raises for one experiment comes back as the end of that one; this is about everything else.
        """
        names = self._cohort.names
        if self.room == 1 or len(names) == 1:
            for name in names:
                self._forget(name)
                self.held.fail(name, error)
        self.room = max(1, min(self.room, len(names)) // 2)
        log.warning("a round failed and is made again, %d experiments at once: %s", self.room, error)
        self._cohort = self._new_cohort(self._cohort.trainer)
        for name, joined in self._joined.items():
            checkpoint = self._remembered.get(name)
            self._cohort.join(name, joined.experiment, None if checkpoint is None else checkpoint.saved)
        self._fill()

    # ---- after a round

    def _after_round(self, ends: Sequence[RoundEnd]) -> None:
        for end in ends:
            if end.report is not None:
                rounds = self._joined[end.name].experiment.global_rounds
                self.held.tell(end.name, Progress.after(end.report, rounds))
        left = [self._end(end) for end in ends if end.error is not None or end.outcome is not None]
        left += self._leave_dropped()
        self._remember()
        self._save_when_due()
        self.held.deliver_waiting()
        if left:
            self._refill()

    def _leave_dropped(self) -> list[str]:
        """Leave what the manager no longer wants of this cohort; which these were."""
        left = []
        waiting = {task.task_id for task in self._waiting}
        for task_id in self.held.dropped():
            if task_id in self._joined:
                self._cohort.leave(task_id)
                self._forget(task_id)
            elif task_id in waiting:
                self._waiting = deque(task for task in self._waiting if task.task_id != task_id)
            else:
                continue
            self.held.drop(task_id)
            left.append(task_id)
        return left

    def _end(self, end: RoundEnd) -> str:
        """Deliver an experiment that has ended, or report why it could not be trained."""
        joined = self._forget(end.name)
        if end.outcome is None:
            self.held.fail(end.name, end.error or RuntimeError("the round gave no result"))
            return end.name
        result = result_of(
            end.outcome,
            device=self.station.device.torch_name,
            plan=self._cohort.trainer.plan,
            seconds=self._seconds(joined),
        )
        self.held.finish(end.name, result | {"history": records(end.outcome.history)})
        return end.name

    def _forget(self, task_id: str) -> _Joined:
        self._remembered.pop(task_id, None)
        return self._joined.pop(task_id)

    def _seconds(self, joined: _Joined) -> float:
        return joined.before + self.station.clock() - joined.since

    # ---- where experiments stand

    def _remember(self) -> None:
        """Note where every experiment stands: a stop signal comes in the middle of a round, which cannot be saved."""
        began = self.station.clock()
        if began < self._remember_at:
            return
        self._remembered = {name: self._checkpoint(self._joined[name]) for name in self._cohort.names}
        now = self.station.clock()
        self._remember_at = now + REMEMBER_SHARE * (now - began)

    def _checkpoint(self, joined: _Joined) -> Checkpoint:
        saved = self._cohort.save(joined.task_id)
        return Checkpoint(self._origin(joined.signature), self._seconds(joined), saved)

    def _save_when_due(self) -> None:
        """Save every experiment, from time to time."""
        if self.station.clock() < self._save_at:
            return
        for name in self._cohort.names:
            self.held.checkpoints.write(self._checkpoint(self._joined[name]))
        self._save_at = self.station.clock() + self.station.checkpoint_s


def run_cohort(station: Station, held: HeldTasks, key: str, tasks: Sequence[TaskMessage]) -> list[TaskMessage]:
    """Train tasks that are held and have the cohort key `key`, until each has ended.

    Returns:
        Tasks of other cohorts that the manager gave meanwhile.

    Raises:
        Preempted: a stop signal came; the experiments are saved, and the tasks still held.
    """
    experiments = [from_config({**task.config, "seed": task.seed}) for task in tasks]
    try:
        with station.stop.interruptible():
            data = load_global_dataset(experiments[0].dataset, station.data_dir).to(station.device.torch_name)
            trainer = choose_trainer(experiments, data, station.threads, prefer=_begun_plans(held, tasks, experiments))
            largest = max(experiments, key=lambda each: bytes_per_experiment(each, data))
            room = how_many_fit(largest, data, free_memory(station.device.torch_name), trainer)
    except Preempted:
        raise
    except Exception as error:
        for task in tasks:
            held.fail(task.task_id, error)
        return []
    if len(tasks) > 1:
        log.info("%d experiments train together: %s, %s", len(tasks), key, trainer.plan)
    elif not tasks[0].retry_count:  # of another try, only how it ends
        log.info("one experiment trains alone: %s, %s", key, trainer.plan)
    run = CohortRun(station, held, key, data, trainer, room)
    try:
        run.run(tasks)
    except BaseException:
        station.stop.settle()
        run.save_all()
        raise
    return run.strangers


def _begun_plans(held: HeldTasks, tasks: Sequence[TaskMessage], experiments: Sequence[Experiment]) -> list[str]:
    """The plans under which some of these tasks were begun, by an earlier worker."""
    signatures = [task.signature or each.signature for task, each in zip(tasks, experiments, strict=True)]
    plans = [held.checkpoints.plan(signature) for signature in signatures]
    return sorted({plan for plan in plans if plan is not None}, key=lambda plan: -plans.count(plan))


def key_of(task: TaskMessage, held: HeldTasks) -> str | None:
    """What this task can train together with; None, and it has failed, where its configuration cannot be read."""
    try:
        experiment = from_config({**task.config, "seed": task.seed})
    except ValueError as error:
        held.fail(task.task_id, error)
        return None
    return cohort_key(experiment, str(task.config.get("engine", "batched")))
