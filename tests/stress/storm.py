"""A sweep of many tiny tasks while its manager and its workers are killed, again and again, and how it ended.

Run as a script for the long form: `python tests/stress/storm.py` (one storm, of 2,000 tasks and 500 kills: two to three
minutes on two cores). The processes are real ones, with the real code; see `zygote` for what is not. Which kills, of
whom, at which points and in which order follows from the seed; the moment of each does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facts import Ledger, read_ledger
from histories import SUFFIX, Exchange, Recorder, read_history
from judge import handouts, is_ack, of_type
from plug import MANAGER_POINTS, REPAIR_POINTS, WORKER_POINTS
from processes import PARTING_S, Process, Zygote, arm, free_port, prepare, wrong_at_the_end
from zygote import LEASE_S

from fedsweep.errors import ManagerUnreachable, ProtocolError
from fedsweep.worker.client import ManagerClient

WORKERS = 8
MANAGER_SHARE, POINT_SHARE = 0.7, 0.3
KILLED_UNTIL = 0.9  # of the rows are there
ROOM, END = 24, float("inf")  # rows that may be written while one kill is awaited
DUE_S = 3.0  # within which an armed process comes to its point
CALM_EVERY = 12  # kills; then leases have the time to end
END_S = 60.0  # for the manager to end after the last kill
SWEEP = """\
defaults:
  {{dataset: digits, model_type: lr, width_factor: 1, depth: 0, num_clients: 2, global_rounds: 2}}
first:
  defaults: {{output_dir: out/first}}
  combinations:
    - lr: [0.01, 0.02]
    - seed: {first}
second:
  defaults: {{output_dir: out/second, lr: 0.02}}
  combinations:
    - momentum: [0.9, 0.5]
    - seed: {second}
"""


@dataclass(frozen=True)
class Kill:
    """A kill that is to come."""

    victim: str  # `manager` or `worker`
    point: str | None = None  # None: at any moment
    is_early: bool = False  # the manager dies while it starts, with a torn file before it


def sweep_of(tasks: int) -> str:
    """A sweep of so many tasks (a multiple of 8) in two folders; a quarter of the tasks has cells in both."""
    seeds = list(range(3 * tasks // 8))
    return SWEEP.format(first=seeds, second=seeds[-tasks // 4 :])


def cells_of(tasks: int) -> int:
    """How many rows both files have in the end."""
    return tasks + tasks // 4


def plan_of(kills: int, dice: random.Random) -> list[Kill]:
    """So many kills in a random order, with every point among those that are at points, if they are enough."""
    managers = round(MANAGER_SHARE * kills)
    at_points = round(POINT_SHARE * managers)
    early = [Kill("manager", point, is_early=True) for point in _cycle(REPAIR_POINTS, at_points // 3, dice)]
    plan = [Kill("manager", point) for point in _cycle(MANAGER_POINTS, at_points - len(early), dice)]
    plan += [Kill("manager")] * (managers - at_points - len(early))
    workers = kills - managers
    at_points = min(workers, max(round(POINT_SHARE * workers), len(WORKER_POINTS)))
    plan += [Kill("worker", point) for point in _cycle(WORKER_POINTS, at_points, dice)]
    plan += [Kill("worker")] * (workers - at_points)
    dice.shuffle(plan)
    for kill in early:  # not before there are rows to be torn, and after a kill that lets the manager start again
        place = dice.randrange(len(plan) // 5, len(plan) + 1)
        while 0 < place < len(plan) and plan[place].is_early:
            place += 1
        plan[place:place] = [Kill("manager"), kill]
    return plan


def _cycle(points: Sequence[str], count: int, dice: random.Random) -> list[str]:
    repeated = [points[place % len(points)] for place in range(count)]
    dice.shuffle(repeated)
    return repeated


@dataclass
class Storm:
    """One storm, under way."""

    folder: Path
    seed: int
    tasks: int
    kills: int
    hits: Counter[str] = field(default_factory=Counter)
    killed_at: list[tuple[float, str]] = field(default_factory=list)  # when, and whom
    wrong: list[str] = field(default_factory=list)
    _missed: dict[str, list[Kill]] = field(default_factory=lambda: {"manager": [], "worker": []})
    _counts: Counter[str] = field(default_factory=Counter)  # of managers and workers that were started

    def run(self) -> dict[str, Any]:
        """Run it to the end; its figures, and what is wrong."""
        began = time.monotonic()
        prepare(self.folder, sweep_of(self.tasks))
        self.dice, self.port = random.Random(self.seed), free_port()
        self.recorder = Recorder(self.folder / "history", "driver")
        with contextlib.ExitStack() as stack:
            self.zygotes = {role: Zygote(role, self.folder / f"{role}.zygote.log") for role in ("manager", "worker")}
            for zygote in self.zygotes.values():
                stack.callback(zygote.close)
            for zygote in self.zygotes.values():
                zygote.wait_ready()
            self.manager = self._start("manager")
            self.working = [self._start("worker") for _ in range(WORKERS)]
            self._kill_all()
            self._see_the_end()
        return self._figures(time.monotonic() - began)

    def _next_name(self, role: str) -> str:
        return f"{role}-{self._counts[role] + 1}"

    def _start(self, role: str) -> Process:
        name = self._next_name(role)
        self._counts[role] += 1
        return self.zygotes[role].start(self.folder, self.port, name)

    # ---- while it lasts

    def _kill_all(self) -> None:
        """Kill, spread over the whole sweep: workers train while it has fewer rows than by its share of the kills."""
        plan = plan_of(self.kills, self.dice)
        for number, kill in enumerate(plan):
            target = KILLED_UNTIL * cells_of(self.tasks) * number / len(plan)
            if not kill.is_early:
                deadline = time.monotonic() + DUE_S
                while self._steer(target) and time.monotonic() < deadline:
                    time.sleep(0.005)
                time.sleep(self.dice.choice([0.0, 0.0, 0.01, 0.03, 0.1]))
            self._carry_out(kill, plan[number + 1] if number + 1 < len(plan) else None)
            if number % CALM_EVERY == CALM_EVERY - 1:
                self._be_calm()
            self._look_in()
        self._steer(END)

    def _steer(self, rows: float) -> bool:
        """Let the workers train if there are fewer rows than these; whether that is so."""
        gate, is_short = self.folder / "gate", self._rows() < rows
        if is_short:
            gate.touch()
        else:
            gate.unlink(missing_ok=True)
        return is_short

    def _carry_out(self, kill: Kill, following: Kill | None) -> None:
        """Carry out a kill, and start its victim again. A point that was missed is the next one's of that victim."""
        if kill.point is None and self._missed[kill.victim] and not (following and following.is_early):
            kill = self._missed[kill.victim].pop(0)
        if kill.victim == "worker":
            index = self.dice.randrange(WORKERS)
            self._end(kill, self.working[index])
            self.working[index] = self._start("worker")
            return
        self._end(kill, self.manager)
        if following and following.is_early:
            self._tear_a_file()
            arm(self.folder, self._next_name("manager"), str(following.point))
        self.manager = self._start("manager")

    def _end(self, kill: Kill, process: Process) -> None:
        """Have a process killed: at the point, if it comes there in time."""
        status = None
        if kill.point is not None:
            if not kill.is_early:
                count = 1 if kill.victim == "worker" else self.dice.choice([1, 1, 2, 3])
                arm(self.folder, process.name, kill.point, count)
            status = self._status_within(process, DUE_S, self._rows() + ROOM)
        if status is None:
            process.kill()
        elif status != -signal.SIGKILL:
            self.wrong.append(f"{process.name} ended with status {status} in the middle of the storm")
        at_point = status == -signal.SIGKILL
        self.hits[f"{kill.victim} killed"] += 1
        self.hits[f"{kill.victim} killed {kill.point if at_point else 'at any moment'}"] += 1
        if kill.point is not None and not at_point:
            self.hits["points that were missed"] += 1
            self._missed[kill.victim] += [] if kill.is_early else [kill]
        self.killed_at.append((time.monotonic(), process.name))

    def _tear_a_file(self) -> None:
        """Cut a results file somewhere in its last row, while no manager holds it."""
        written = [path for path in self._files() if path.exists() and path.read_bytes().count(b"\n") > 1]
        if written:
            path = self.dice.choice(written)
            content = path.read_bytes()
            start = content.rstrip(b"\n").rfind(b"\n") + 1
            os.truncate(path, self.dice.randrange(start, len(content)))
            self.hits["files torn"] += 1

    def _be_calm(self) -> None:
        """Kill nobody for longer than a lease; one worker is stopped meanwhile, and comes back with what it held."""
        worker = self.dice.choice(self.working)
        self._steer(0)
        worker.signal(signal.SIGSTOP)
        time.sleep(LEASE_S + 0.5)
        self._steer(self._rows() + ROOM)
        worker.signal(signal.SIGCONT)
        self.hits["workers stopped and continued"] += 1

    def _look_in(self) -> None:
        """Ask for the status, and say once more what some worker has said already."""
        with ManagerClient("127.0.0.1", self.port, self._token(), timeout=1.0, retries=0) as client:
            self._ask(client, {"type": "status"})
            if (said := self._something_said()) is not None:
                result = said["result_data"] | {"plan": f"said again {self.dice.getrandbits(64):x}"}
                self._ask(client, {**said, "worker_id": "echo", "result_data": result})

    def _ask(self, client: ManagerClient, request: dict[str, Any]) -> None:
        number = self.recorder.sent(request)
        with contextlib.suppress(ManagerUnreachable):
            try:
                self.recorder.heard(number, client.ask(request))
            except ProtocolError as error:
                self.wrong.append(f"{request['type']} was refused: {error}")

    def _something_said(self) -> dict[str, Any] | None:
        path = self.dice.choice(sorted((self.folder / "history").glob(f"worker-*{SUFFIX}")))
        said = [line for line in path.read_bytes().split(b"\n")[:-1] if b'"type": "submit_result"' in line]
        return json.loads(self.dice.choice(said))["request"] if said else None

    def _token(self) -> str | None:
        path = self.folder / ".fedsweep/token"
        return path.read_text().strip() if path.exists() else None

    def _files(self) -> list[Path]:
        return [self.folder / f"out/{phase}/final_results.csv" for phase in ("first", "second")]

    def _rows(self) -> int:
        return sum(path.read_bytes().count(b"\n") - 1 for path in self._files() if path.exists())

    # ---- when it is over

    def _see_the_end(self) -> None:
        """Wait until the manager ends by itself, and the workers. Those who came too late to hear of it are told."""
        self._expect_end(self.manager, END_S)
        for worker in self.working:
            if self._status_within(worker, PARTING_S) is None:
                worker.signal(signal.SIGTERM)
            self._expect_end(worker, PARTING_S)

    def _expect_end(self, process: Process, seconds: float) -> None:
        status = self._status_within(process, seconds)
        if status is None:
            self.wrong.append(f"{process.name} did not end")
        elif status != 0:
            self.wrong.append(f"{process.name} ended with status {status}")

    def _status_within(self, process: Process, seconds: float, rows: float = END) -> int | None:
        """The exit status of a process that ends in time, while workers train until there are so many rows."""
        deadline = time.monotonic() + seconds
        while process.status is None and time.monotonic() < deadline:
            self._steer(rows)
            time.sleep(0.005)
        return process.status

    def _figures(self, seconds: float) -> dict[str, Any]:
        history = read_history(self.folder / "history")
        ledger = read_ledger(self.folder / ".fedsweep/ledger.sqlite3")
        self.wrong += wrong_at_the_end(self.folder, history, ledger)
        self.wrong += [f"{task} did not complete" for task in ledger.tasks if task.status != "complete"]
        if len(ledger.tasks) != self.tasks:
            self.wrong.append(f"the ledger has {len(ledger.tasks)} tasks, not {self.tasks}")
        self.hits.update(what_was_hit(history, ledger, self.killed_at))
        return {
            "seed": self.seed,
            "tasks": self.tasks,
            "seconds": round(seconds, 1),
            "hits": dict(sorted(self.hits.items())),
            "never hit": never_hit(self.hits),
            "wrong": self.wrong,
        }


def what_was_hit(history: Sequence[Exchange], ledger: Ledger, killed_at: Sequence[tuple[float, str]]) -> Counter[str]:
    """How often the storm brought about what it is there to bring about."""
    hits: Counter[str] = Counter()
    unanswered = [(each.sent, each.client) for each in history if each.heard is None]
    for moment, name in killed_at:
        hits[f"{name.partition('-')[0]} kills with a request in flight"] += any(
            moment - 1 < sent < moment and (name.startswith("manager") or client == name) for sent, client in unanswered
        )
    submitted = list(of_type(history, "submit_result"))
    hits["requests"] = len(history)
    hits["requests without an answer"] = len(unanswered)
    hits["results acknowledged as accepted"] = sum(is_ack(each, "accepted") for each in submitted)
    hits["results acknowledged as duplicate"] = sum(is_ack(each, "duplicate") for each in submitted)
    hits["attempts"] = len(ledger.attempts)
    hits["attempts that nobody heard of"] = len(ledger.attempts) - len(handouts(history))
    ended = Counter(attempt.ended_as for attempt in ledger.attempts)
    hits["leases lost"], hits["failures"] = ended["lost"], ended["failed"]
    in_order = {attempt.number for attempt in ledger.attempts if attempt.ended_as == "result"}
    hits["results taken of attempts that were over"] = sum(
        is_ack(each, "accepted") and each.request["attempt"] not in in_order for each in submitted
    )
    hits["heartbeats told to drop a task"] = sum(
        bool((each.answer or {}).get("drop")) for each in of_type(history, "heartbeat")
    )
    return hits


def never_hit(hits: Counter[str]) -> list[str]:
    """Kinds of faults that a storm has shown nothing about."""
    wanted = [f"manager killed {point}" for point in (*MANAGER_POINTS, *REPAIR_POINTS)]
    wanted += [f"worker killed {point}" for point in WORKER_POINTS]
    wanted += ["manager killed at any moment", "worker killed at any moment"]
    wanted += ["manager kills with a request in flight", "results acknowledged as duplicate", "files torn"]
    wanted += ["leases lost", "failures", "results taken of attempts that were over", "heartbeats told to drop a task"]
    return [kind for kind in wanted if not hits[kind]]


def run_storm(folder: Path, seed: int, tasks: int, kills: int) -> dict[str, Any]:
    """Run a storm in an empty folder; its figures, and under `wrong` all that is wrong."""
    return Storm(folder, seed, tasks, kills).run()


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def _main() -> Iterator[bool]:
    parser = argparse.ArgumentParser(description="Storms of SIGKILLs over sweeps of tiny tasks.")
    parser.add_argument("--seeds", type=_seeds, default=_seeds("1"), help="as in 1-5")
    parser.add_argument("--tasks", type=int, default=2000, help="of each storm, a multiple of 8")
    parser.add_argument("--kills", type=int, default=500, help="in each storm")
    chosen = parser.parse_args()
    for seed in chosen.seeds:
        with tempfile.TemporaryDirectory(prefix="storm-") as folder:
            figures = run_storm(Path(folder), seed, chosen.tasks, chosen.kills)
            print("figures:", json.dumps(figures), flush=True)
            yield not figures["wrong"] and not figures["never hit"]


if __name__ == "__main__":
    sys.exit(0 if all(list(_main())) else 1)
