"""A small sweep that loses power at any moment, with any part of what was not synced. Run by `test_power_loss.py`.

A sweep is recorded once; then, seed by seed, the power goes at some moment of it, the disk keeps some mixture of what
was not synced, and what was promised until then must be there: acknowledged results, results in the spool,
checkpoints, rows of others, and, once the sweep was over, every row of every file. Then the sweep goes on to its end.
Some of these second halves are recorded as well, and lose power in their turn. What is wrong goes to standard output,
as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conftest
import torch
from recording import recording
from simulated_disk import Event, image, put_on_disk

from fedsweep.manager import ExperimentManager, file_systems
from fedsweep.manager.invariants import check
from fedsweep.manager.protocol import parse_request
from fedsweep.worker import spool
from fedsweep.worker.checkpoints import Checkpoint, Checkpoints, Origin

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 2, depth: 1, num_clients: 2, output_dir: "out/{phase}"}
seeds: [1]
first:
  combinations:
    - poison_ratio: [0.0, 0.5]
    - poison_type: [label_flip, random_noise]
second:
  combinations:
    - poison_ratio: [0.0, 0.25]
    - lr: [0.01, 0.02]
"""
EDITED = SWEEP.replace("0.25", "0.75") + "third: {combinations: [{width_factor: [1, 4]}]}\n"
STRANGE = "older,mnist,lr,2,1,0.5,label_flip,1.0,shuffle,fedavg,32,0.5,0,0.25,0,0.5,0,0.5,0,650,7,1"
OLD_ROWS = f"""\
{",".join(conftest.RESULT_COLUMNS)}
first,digits,lr,2,1,0.5,label_flip,1.0,shuffle,fedavg,32,0.875,0,0.25,0,0.5,0,0.5,0,650,7,1
{STRANGE}
first,digits,lr,2,1,0.5,ran"""
BEFORE_THE_EDIT = 4  # results
STATE, SPOOL, CHECKPOINTS = Path(".fedsweep"), Path(".fedsweep/spool"), Path(".fedsweep/checkpoints")
SEEDS_OF_A_TRACE = 50


@dataclass
class Promised:
    """What has been promised until some moment."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # acknowledged, by signature
    spooled: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task_id, not delivered yet
    rounds: dict[str, float] = field(default_factory=dict)  # of the checkpoint of each signature
    config: str = "sweep.yaml"
    has_ended: bool = False

    def hear(self, event: Event) -> None:
        match event:
            case ("promise", "acknowledged", signature, result):
                self.results[signature] = result
            case ("promise", "spooled", task_id, result):
                self.spooled[task_id] = result
            case ("promise", "removing", task_id):
                self.spooled.pop(task_id, None)
            case ("promise", "checkpoint", signature, seconds):
                self.rounds[signature] = seconds
            case ("promise", "forgetting", signature):
                self.rounds.pop(signature, None)
            case ("promise", "config", name):
                self.config, self.has_ended = name, False
            case ("promise", "ended"):
                self.has_ended = True

    def events(self) -> list[Event]:
        """Events that lead here."""
        return [
            *(("promise", "acknowledged", *each) for each in self.results.items()),
            *(("promise", "spooled", *each) for each in self.spooled.items()),
            *(("promise", "checkpoint", *each) for each in self.rounds.items()),
            ("promise", "config", self.config),
        ]


Say = Callable[..., None]


def run_sweep(config: str, say: Say, limit: int | None = None) -> None:
    """Run the sweep of this folder, to its end or for so many results."""
    say("config", config)
    manager = ExperimentManager([config], port=0)
    try:
        manager.load_all_configs()
        if not manager.load_state():
            manager.generate_all_tasks()
        manager.load_completed_tasks()
        deliver_what_waits(manager, say)
        while limit is None or limit > 0:
            task = next(iter(manager.assigned_tasks.values()), None) or ask(manager, "request_task").get("task")
            if task is None:
                break
            work(manager, task, say)
            limit = None if limit is None else limit - 1
        if limit is None:
            manager._finish()
            say("ended")
    finally:
        manager.close()


def ask(manager: ExperimentManager, kind: str, **fields: Any) -> dict[str, Any]:
    return manager.answer(parse_request({"type": kind, "worker_id": "w", **fields}), False)


def work(manager: ExperimentManager, task: dict[str, Any], say: Say) -> None:
    """Do a task as a worker does: on from its checkpoint, then the result into the spool and to the manager."""
    checkpoints = Checkpoints(CHECKPOINTS)
    origin = Origin(task["signature"], "loop", "cpu", "1", "1")
    found = checkpoints.find(origin)
    before = 0.0 if found is None else found.seconds
    for seconds in (before + 1.0, before + 2.0):
        if checkpoints.write(Checkpoint(origin, seconds, {"weights": torch.ones(2)})):
            say("checkpoint", task["signature"], seconds)
    result = conftest.result_of(task)
    spool.put(SPOOL, task["task_id"], task.get("attempt"), result)
    say("spooled", task["task_id"], result)
    deliver_what_waits(manager, say)
    say("forgetting", task["signature"])
    checkpoints.remove(task["signature"])


def deliver_what_waits(manager: ExperimentManager, say: Say) -> None:
    for waiting in spool.pending(SPOOL):
        fields = {"task_id": waiting.task_id, "attempt": waiting.attempt, "result_data": waiting.result_data}
        status = ask(manager, "submit_result", **fields)["status"]
        if status == "accepted":
            say("acknowledged", manager.sweep.ledger.view.task(waiting.task_id).signature, waiting.result_data)
        say("removing", waiting.task_id)
        spool.remove(waiting)


# ---- recording


@dataclass(frozen=True)
class Trace:
    """What was done to the files of a folder, and what was promised meanwhile."""

    events: list[Event]
    begin: int  # how many of them had happened before anyone did anything

    def promised(self, moment: int) -> Promised:
        promised = Promised()
        for event in self.events[:moment]:
            promised.hear(event)
        return promised

    def tell(self, moment: int) -> str:
        return f"after event {moment} of {len(self.events)}: {self.events[moment - 1][:3]!r:.80}"


def record(folder: Path, before: Promised, *sessions: tuple[str, int | None]) -> Trace:
    """Record sessions of a sweep: the configuration of each, and after how many results it is cut short."""
    os.chdir(folder)
    with recording(folder) as recorder:
        recorder.events += before.events()
        begin = len(recorder.events)
        for config, limit in sessions:
            run_sweep(config, recorder.promise, limit)
    return Trace(recorder.events, begin)


def first_trace(root: Path) -> Trace:
    folder = root / "recorded"
    (folder / "out/first").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "edited.yaml").write_text(EDITED)
    (folder / "out/first/final_results.csv").write_text(OLD_ROWS)
    return record(folder, Promised(), ("sweep.yaml", BEFORE_THE_EDIT), ("edited.yaml", None))


def without(events: Sequence[Event], kind: str) -> list[Event]:
    """The events as they would be if syncs of this kind were forgotten; but for those that came first."""
    names: dict[int, str] = {0: "/"}
    kept = []
    has_begun = False
    for event in events:
        if event[0] == "name":
            names[event[3]] = event[2]
        elif event[0] == "rename":
            names.update({node: event[3] for node, name in names.items() if name == event[2]})
        elif event[0] == "folder":
            names[event[1]] = "/"
        has_begun = has_begun or event[0] == "promise"
        if not (has_begun and event[0] == "sync" and KINDS[kind](names[event[1]], names, event[1])):
            kept.append(event)
    return kept


KINDS: dict[str, Callable[[str, dict[int, str], int], bool]] = {
    "anything": lambda *_: True,
    "the ledger's log": lambda name, *_: name.endswith("-wal"),
    "the ledger's journal": lambda name, *_: name.endswith("-journal"),
    "the ledger": lambda name, *_: name == "ledger.sqlite3",
    "results files": lambda name, *_: name.startswith((".final_results", "final_results")),
    "the spool": lambda name, *_: name.endswith((".part", ".result.json")),
    "checkpoints": lambda name, *_: name.endswith((".part", ".pt")),
    "folders": lambda name, *_: name in FOLDERS,
}
FOLDERS = ("/", ".fedsweep", "spool", "checkpoints", "out", "first", "second", "third")


# ---- losing power


def lose_power(folder: Path, trace: Trace, rng: random.Random) -> int:
    """Put into a folder what a power loss at some moment has left; the moment."""
    end = len(trace.events)
    match int(10 * rng.random()):  # moments that chance alone would seldom hit: the end, and the making of the ledger
        case 0:
            moment = end
        case 1:
            moment = rng.randint(trace.begin, trace.begin + (end - trace.begin) // 8)
        case _:
            moment = rng.randint(trace.begin, end)
    put_on_disk(folder, image(trace.events[:moment], rng))
    return moment


def check_image(promised: Promised) -> None:
    """What must be there before anyone has lifted a hand."""
    if promised.has_ended:
        violations = check(STATE, acknowledged=promised.results, has_ended=True)
        assert not violations, list(map(str, violations))
    waiting = {each.task_id: each.result_data for each in spool.pending(SPOOL)}
    for task_id, result in promised.spooled.items():
        assert waiting.get(task_id) == result, f"{task_id} is not in the spool"
    for signature, seconds in promised.rounds.items():
        found = Checkpoints(CHECKPOINTS).find(Origin(signature, "loop", "cpu", "1", "1"))
        assert found is not None, f"no checkpoint of {signature}"
        assert found.seconds >= seconds


def check_end(promised: Promised) -> None:
    """What must hold once the sweep has run to its end."""
    violations = check(STATE, acknowledged=promised.results, has_ended=True)
    assert not violations, list(map(str, violations))
    conftest.assert_sound(STATE / "ledger.sqlite3", promised.results)
    assert Path("out/first/final_results.csv").read_text().count("older,mnist") == 1, "a row of others is lost"
    left = [path.name for path in Path().rglob("*") if path.name.endswith((".tmp", ".new"))]
    assert not left, left


def go_on(promised: Promised) -> None:
    """Start again and run the sweep to its end."""

    def hear(*what: Any) -> None:
        promised.hear(("promise", *what))

    manager = ExperimentManager([promised.config], port=0)
    try:
        if promised.results:
            kept = manager.sweep.ledger.view.results()
            lost = set(promised.results) - {signature for signature, _ in kept}
            assert not lost, f"acknowledged, but not in the ledger: {lost}"
    finally:
        manager.close()
    run_sweep(promised.config, hear)


def problem_of(folder: Path, promised: Promised) -> str | None:
    os.chdir(folder)
    try:
        check_image(promised)
        go_on(promised)
        check_end(promised)
    except BaseException:
        return traceback.format_exc()
    return None


def lose_power_often(root: Path, seeds: range, forgotten: str | None) -> dict[str, Any]:
    """Lose power once for each seed; what was wrong afterwards, and which kinds of moments were hit."""
    traces = [first_trace(root)]
    problems, hits = [], Counter[str]()
    for seed in seeds:
        rng = random.Random(seed)
        trace = traces[0] if forgotten or seed % 2 else traces[-1]
        if forgotten:
            trace = Trace(without(trace.events, forgotten), trace.begin)
        folder = root / f"seed-{seed}"
        moment = lose_power(folder, trace, rng)
        promised = trace.promised(moment)
        hits[("second " if trace is not traces[0] else "") + trace.events[moment - 1][0]] += 1
        hits["ended"] += promised.has_ended
        hits["spooled"] += bool(promised.spooled)
        is_recorded = seed % SEEDS_OF_A_TRACE == 0 and not forgotten and not promised.has_ended
        copy = shutil.copytree(folder, root / f"recorded-{seed}") if is_recorded else None
        before = trace.promised(moment)
        if problem := problem_of(folder, promised):
            problems.append([seed, trace.tell(moment), problem])
        elif copy is not None:
            traces.append(record(copy, before, (before.config, None)))
        os.chdir(root)
        shutil.rmtree(folder)
    return {"problems": problems, "hits": hits, "traces": [len(trace.events) for trace in traces]}


def on_a_quick_disk() -> None:
    """Sync nothing for real, and leave summaries and histories out: nothing here is about them."""
    real = sqlite3.connect

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = real(*arguments, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    sqlite3.connect = connect  # type: ignore[assignment]
    os.fsync = lambda descriptor: None
    ExperimentManager.sweep.fget.__globals__["OpenSweep"].write_outputs = lambda self: None


if __name__ == "__main__":
    first, last, journal = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    on_a_quick_disk()
    if journal == "rollback":  # as on a network file system
        file_systems.mounts = lambda: [("/", "nfs4")]
    print(json.dumps(lose_power_often(Path(sys.argv[1]).resolve(), range(first, last), (sys.argv[5:] or [None])[0])))
