"""Real clients and a real manager over a network that cuts, delays, repeats, reorders and swallows what they say.

Whatever it does, what every client said and heard, the ledger and the results files must agree (tests/stress/judge.py).
`FEDSWEEP_EXAMPLES` says how often each byte is cut at (by default some are, once).
"""

from __future__ import annotations

import itertools
import json
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bench import CHANGING, EXAMPLES, LEASE_S, WORKER, Bench, result_of, until
from proxy import CUTS, DELAYS, DROP, REPEATS, TURN, BadNetwork, Fault

from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker.client import (
    ManagerClient,
    _has_ended,
    notify_task_complete,
    notify_task_failed,
    release_task,
    request_task_from_manager,
)
from fedsweep.worker.delivery import deliver_spool, keep

# ---- every request, at every byte


def ask_for_task(bench: Bench, task: TaskMessage | None) -> TaskMessage | None:
    return request_task_from_manager(bench.bad, WORKER, worker_type="cpu", device="cpu").task


def beat(bench: Bench, task: TaskMessage) -> bool:
    held = [{"task_id": task.task_id, "attempt": task.attempt, "round": 1, "rounds": 2, "val_acc": 0.5}]
    return bench.bad.ask({"type": "heartbeat", "worker_id": WORKER, "tasks": held})["drop"] == []


def look(bench: Bench, task: TaskMessage) -> bool:
    return bench.bad.ask({"type": "status"})["status"]["total"] == bench.tasks


def end(bench: Bench, kind: str) -> bool:
    """Have it ended, and go on: while a task is held it does not end at once."""
    bench.bad.ask({"type": kind})
    sweep = bench.manager.sweep
    was_ended, sweep.ending, sweep.hands_out = sweep.ending == kind, None, True
    return was_ended


def deliver(bench: Bench, task: TaskMessage) -> bool:
    """By way of the spool, as workers do."""
    spool = Path("spool")
    kept = keep(task, result_of(task), spool)
    return kept is not None and deliver_spool(spool, bench.bad, WORKER) and not any(spool.iterdir())


ASK: dict[str, Callable[[Bench, Any], Any]] = {
    "request_task": ask_for_task,
    "submit_result": deliver,
    "task_complete": lambda bench, task: notify_task_complete(bench.bad, task.task_id, WORKER, task.attempt),
    "task_failed": lambda bench, task: notify_task_failed(bench.bad, task.task_id, WORKER, "it raised", task.attempt),
    "release": lambda bench, task: release_task(bench.bad, task.task_id, WORKER, task.attempt),
    "heartbeat": beat,
    "status": look,
    "show_task": lambda bench, task: bench.bad.ask({"type": "show_task", "task_id": task.task_id})["task"],
    "failures": lambda bench, task: bench.bad.ask({"type": "failures"})["groups"] == [],
    "cancel": lambda bench, task: bench.bad.ask({"type": "cancel", "names": [task.task_id]}),
    "retry": lambda bench, task: bench.bad.ask({"type": "retry", "names": [task.task_id]}),
    "drain": lambda bench, task: end(bench, "drain"),
    "stop": lambda bench, task: end(bench, "stop"),
}


def exchange(bench: Bench, kind: str, fault: Fault | None) -> tuple[int, Mapping[str, Any]]:
    """Ask over the bad line, with this fault; how often it was tried, and what was heard in the end."""
    task = None if kind == "request_task" else bench.task_for(kind)
    bench.faults[:] = [] if fault is None else [fault]
    tries, before = bench.notes.tries, bench.attempts
    got = ASK[kind](bench, task)
    assert got, f"{kind} came to nothing with {fault}"
    tried, answer = bench.notes.tries - tries, bench.notes.answer
    if kind == "request_task":
        task, answer = got, {**answer, "attempts": bench.attempts - before}
    if kind in CHANGING and kind not in ("submit_result", "task_complete"):
        bench.finish_task(task)
    if tried == 1 and fault is not None and fault.kind in itertools.chain(*CUTS.values()):
        until(lambda: bench.bad.connection is None or _has_ended(bench.bad.connection), "the client can see the end")
    return tried, answer


@pytest.fixture(scope="module")
def lengths(tmp_path_factory) -> Mapping[str, Mapping[str, int]]:
    """Of each kind of request, and of its answer: bytes."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("lengths"))
        patch.setattr(ManagerClient, "_exchange", ManagerClient._exchange)
        with Bench(16) as bench:
            for kind in ASK:
                exchange(bench, kind, None)
                found[kind] = bench.network.sizes[-1]
    return found


def what_was_done_twice(kind: str, answer: Mapping[str, Any]) -> bool | None:
    """Whether the answer says that the manager had acted on the same request before; None: it never says."""
    match kind:
        case "request_task":
            return answer["attempts"] > 1
        case "submit_result":
            return answer["status"] == "duplicate"
        case "task_failed" | "release":
            return "drop" in answer
        case "cancel":
            return answer["left"] == 1
        case "retry":
            return answer["retried"] == 0
    return None


@pytest.mark.parametrize("side", CUTS)
@pytest.mark.parametrize("kind", ASK)
def test_a_connection_may_end_at_any_byte(bench, figures, lengths, kind, side):
    """What did not arrive whole changes nothing; what did counts once, heard or not."""
    dice = random.Random(f"{kind} {side} {EXAMPLES}")
    length = lengths[kind][side] + 8  # numbers may be longer later on
    step = 1 if kind == "submit_result" or EXAMPLES > 1 else 7
    places = EXAMPLES * [*range(dice.randrange(step), length, step)]
    here = bench(8 * (len(places) // 4 + 1) if kind in CHANGING else 8)  # two for each place
    for at in places:
        cut = Fault(dice.choice(CUTS[side]), at)
        tries, answer = exchange(here, kind, cut)
        whole = here.network.sizes[-tries][side] - 1  # its newline adds nothing
        if not cut.kind.startswith("reset"):
            has_acted = side == "answer" or at >= whole
            has_heard = (side == "answer" and at >= whole) or (has_acted and cut.kind == "half close request")
            assert tries == (1 if has_heard else 2), cut
            assert what_was_done_twice(kind, answer) in (None, has_acted and not has_heard), cut
        figures[f"bytes of {kind} cut at"] += at <= whole + 1
    assert here.finish() == []


@pytest.mark.parametrize("side", CUTS)
def test_a_tls_connection_may_end_at_any_byte(bench, figures, side):
    """Also in its handshake, where a cut makes nobody a stranger."""
    dice = random.Random(f"TLS {side} {EXAMPLES}")
    step = 1 if EXAMPLES > 1 else 11
    here = bench(8 * (EXAMPLES * 2400 // step // 8), host="0.0.0.0")
    for _ in range(EXAMPLES):
        for at in itertools.count(dice.randrange(step), step):
            here.bad.close()
            cut, before = Fault(dice.choice(CUTS[side]), at), here.network.hits.total()
            here.faults[:] = [cut]
            assert deliver(here, here.take()), cut
            if here.network.hits.total() == before:
                break  # it has fewer bytes
            figures["bytes of a TLS connection cut at"] += 1
        assert at > 700
    assert here.finish() == []


# ---- what arrives twice, late, in another order, or not at all


@pytest.mark.parametrize("kind", [kind for kind in ASK if kind not in ("drain", "stop")])
def test_a_request_may_arrive_twice_or_late_and_its_answer_late_or_never(bench, kind):
    dice = random.Random(f"{kind} {EXAMPLES}")
    kinds = [*REPEATS, *DELAYS] * 3 * EXAMPLES
    if kind in ("request_task", "submit_result", "task_failed") or EXAMPLES > 1:
        kinds.append(DROP)  # this takes as long as a client is patient
    here = bench(8 * (len(kinds) // 2 + 1))
    for what in kinds:
        here.bad.timeout = 1.0 if what == DROP else 10.0
        at = dice.randrange(4) if what in REPEATS else dice.randrange(150)
        _, answer = exchange(here, kind, Fault(what, at, pause_s=0.002))
        if kind != "request_task":  # the answer tells of the exchange before, too, where that is repeated late
            assert what_was_done_twice(kind, answer) in (None, what in ("repeat elsewhere", DROP)), what
    assert here.finish() == []


def as_message(task: TaskMessage, kind: str) -> dict[str, Any]:
    said = {"type": kind, "task_id": task.task_id, "worker_id": task.assigned_to, "attempt": task.attempt}
    match kind:
        case "submit_result":
            return {**said, "result_data": result_of(task)}
        case "task_failed":
            return {**said, "error": "it raised"}
        case "heartbeat":
            held = [{"task_id": task.task_id, "attempt": task.attempt}]
            return {"type": kind, "worker_id": task.assigned_to, "tasks": held}
    return said


SAID = [*itertools.product(("submit_result", "task_failed", "release", "heartbeat"), ("old", "new"))]


def test_what_two_attempts_say_may_arrive_in_any_order(bench):
    """A worker that was given up, and the one that has its task now, say any two things at the same time."""
    pairs = [*itertools.permutations(SAID, 2)]
    here = bench(8 * (len(pairs) // 8 + 1))
    here.manager.sweep.lease_s = 0.3
    old = {task.task_id: task for task in [here.take("old") for _ in pairs]}
    until(lambda: not here.manager.assigned_tasks, "the old leases end")
    here.manager.sweep.lease_s = LEASE_S
    new = {}
    while len(new.keys() & old.keys()) < len(old):
        task = here.take("new")
        new[task.task_id] = task
        if task.task_id not in old:
            here.finish_task(task)
    clients = [here.client(here.network.port) for _ in range(2)]
    with clients[0], clients[1]:
        for task_id, pair in zip(old, pairs, strict=True):
            messages = [as_message({"old": old, "new": new}[whose][task_id], kind) for kind, whose in pair]
            answers = at_once(here.network, clients, messages)
            statuses = [answer["status"] for answer in answers if "status" in answer]
            assert statuses == ["accepted", "duplicate"][: len(statuses)], pair
            if not statuses:
                here.finish_task(new[task_id])
    assert here.finish() == []


def at_once(network: BadNetwork, clients: list[ManagerClient], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to messages that are on their way together, and arrive in this order."""
    contents = [{**message, "token": client.token} for message, client in zip(messages, clients, strict=True)]
    network.turn = 0
    network.choose = lambda request: Fault(TURN, contents.index(json.loads(request)))
    answers: list[dict[str, Any]] = [{}] * len(messages)

    def ask(place: int) -> None:
        answers[place] = clients[place].ask(messages[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in reversed(range(len(messages)))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return answers
