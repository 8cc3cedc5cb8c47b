"""The parts of `benchmarks/manager.py` that could lie: what is said to a manager, and what is counted as waiting."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from figures import Requirement, due_times, latencies, percentile
from simulated import HEARTBEATS, SimulatedWorker, config, encoded
from swarm import Swarm

from fedsweep.manager.protocol import TaskMessage, decode, encode, parse_request

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_percentiles_are_values_that_occurred():
    values = [float(number) for number in range(1, 1001)]
    assert [percentile(values, share) for share in (0.5, 0.99, 0.999, 1.0)] == [500.0, 990.0, 999.0, 1000.0]
    assert percentile([7.0], 0.5) == 7.0
    assert latencies([0.003, 0.001, 0.002]) == {
        **{"count": 3, "p50_ms": 2.0, "p99_ms": 3.0, "p99.9_ms": 3.0, "max_ms": 3.0}
    }
    assert latencies([]) == {"count": 0}


def test_requests_are_due_at_the_rate_that_is_asked_for():
    due = due_times(4.0, 2.0)
    assert due == [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


@pytest.mark.parametrize(
    ("found", "at_least", "is_reached"),
    [
        *[(10.0, False, True), (10.1, False, False), (10.0, True, True), (9.9, True, False)],
        *[(math.nan, False, False), (math.nan, True, False)],
    ],
)
def test_a_requirement_is_missed_unless_it_is_reached(found, at_least, is_reached):
    requirement = Requirement("x", found, 10, "ms", at_least=at_least)
    assert requirement.is_reached is is_reached
    assert ("reached" in requirement.line(), "MISSED" in requirement.line()) == (is_reached, not is_reached)


def test_a_simulated_worker_says_what_the_manager_understands(managers, check_sound):
    """From the first request to the end of a sweep; a tenth of it fails or is given back."""
    manager = managers()
    worker, said = SimulatedWorker("simulated-1-0", seed=3), []
    while not worker.heard_done:
        message = decode(encoded(worker.next(), "token"))
        said.append(message["type"])
        worker.hear(json.loads(json.dumps(manager.answer(parse_request(message), False))))
        assert len(said) < 1000
    assert not worker.refused
    assert worker.done == manager.get_status()["complete"] == 8
    assert said.count("heartbeat") == HEARTBEATS * (said.count("request_task") - 1)
    manager.close()
    check_sound(".fedsweep/ledger.sqlite3")


def test_the_tasks_of_other_queues_are_as_long_as_ours(managers):
    manager = managers()
    ours = TaskMessage.model_validate(SimulatedWorker("w").next() and manager.get_next_task("w")).config
    assert 0.5 < len(json.dumps(config(1))) / len(json.dumps(ours)) < 1.5


def test_a_pause_of_the_manager_is_counted_against_all_that_was_due_meanwhile():
    """The omission that load generators are known for: to ask nothing while nothing is answered.

    Nothing is answered here before all is due, so the first request has waited for the whole schedule at least, and
    each that follows for one interval less.
    """
    rate, count = 200.0, 40

    async def run():
        all_was_due = asyncio.Event()

        async def serve(reader, writer):
            while await reader.readline():
                while swarm.unanswered < count and not all_was_due.is_set():
                    await asyncio.sleep(0.001)
                all_was_due.set()
                writer.write(b'{"type":"no_task","done":false}\n')
            writer.close()

        async def stay(*_):
            """Ask nothing beforehand."""

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            swarm = Swarm(server.sockets[0].getsockname()[1], "token", num_workers=5, seed=0)
            swarm._come_to_different_places = stay
            told = await swarm.open_loop(rate, count / rate)
            return told, sorted(swarm.waits["request_task"], reverse=True)

    told, waits = asyncio.run(run())
    assert (told["lost"], told["refused"]) == (0, {})
    assert len(waits) == count
    assert all(wait >= (count - 1 - place) / rate for place, wait in enumerate(waits))


def test_from_the_first_second_all_kinds_of_requests_are_mixed(managers):
    """Else a short run would measure a thousand first requests."""
    manager = managers()

    async def run():
        async def serve(reader, writer):
            while line := await reader.readline():
                writer.write(encode(manager.answer(parse_request(decode(line)), False)))
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            swarm = Swarm(server.sockets[0].getsockname()[1], "token", num_workers=8, seed=0)
            return await swarm.open_loop(rate=80.0, seconds=0.1)

    told = asyncio.run(run())
    assert {"request_task", "heartbeat", "submit_result"} <= set(told["by_request"])


def test_a_connection_that_ends_without_an_answer_is_told():
    async def run():
        async def hang_up(reader, writer):
            await reader.readline()
            writer.close()

        server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        async with server:
            return await Swarm(server.sockets[0].getsockname()[1], "token", num_workers=3, seed=0).at_once()

    told = asyncio.run(run())
    assert told["lost"] == 3
    assert told["answered"] == 0


@pytest.fixture(scope="module")
def script():
    """The benchmark itself."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_of_the_manager", BENCHMARKS / "manager.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def run_of(p99_ms, *, rate=1100.0, lost=0, **refused):
    return {
        **{"all": {"p50_ms": 1.0, "p99_ms": p99_ms, "p99.9_ms": p99_ms, "max_ms": p99_ms}, "answered_per_s": rate},
        **{"lost": lost, "refused": refused, "manager_rss_mb": 150.0, "manager_open_files": 1010, "all_served_s": 1.0},
    }


def load_of(**changes):
    runs = {"calm_early": [run_of(10.0)] * 3, "calm_late": [run_of(15.0)] * 3, "busy": [run_of(90.0)] * 3}
    rest = {"most": run_of(900.0), "at_once": [run_of(900.0)] * 3, "store_s": [9.0], "store_peak_mb": [240.0]}
    return {**runs, **rest, "peak_mb": {"early": 200.0, "late": 300.0}, **changes}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"busy": [run_of(90.0, rate=999.0)] * 3}, ["mixed requests"]),
        ({"calm_early": [run_of(51.0)] * 3, "calm_late": [run_of(60.0)] * 3}, ["p99 at 150"]),
        ({"calm_late": [run_of(21.0)] * 3}, ["p99 with 90%"]),
        ({"at_once": [run_of(9.0), run_of(9.0) | {"all_served_s": 5.1}]}, ["all workers connect"]),
        ({"at_once": [run_of(9.0, lost=1)]}, ["… of whom"]),
        ({"busy": [run_of(9.0, retry_later=1)]}, ["… of whom"]),
        ({"store_s": [16.0, 14.0, 16.0]}, ["all tasks expanded"]),
        ({"store_peak_mb": [401.0]}, ["memory"]),
    ],
)
def test_the_benchmark_says_what_is_missed(script, changes, missed):
    requirements = script.judge({"load": load_of(**changes), "queues": {"ours": [{"per_s": 300.0}]}})
    found = [each.name for each in requirements if not each.is_reached]
    assert len(found) == len(missed)
    assert all(name.startswith(start) for name, start in zip(found, missed, strict=True))
    assert script.latency_table(load_of(**changes)).count("\n") == 5
