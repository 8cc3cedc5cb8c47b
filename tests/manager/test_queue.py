"""Which tasks go out next: the order, who goes with whom, how much a worker gets, and what is kept apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsweep.manager.ledger import Ledger
from fedsweep.manager.queue import KEPT_AT_A_BOUNDARY, portion
from fedsweep.manager.records import Counts, Task
from fedsweep.plan.cohort import cohort_key, expected_cost, sharing_key
from fedsweep.plan.experiment import from_config

DEFAULTS = "defaults: {model_type: lr, depth: 1, num_clients: 2}\n"
# Two shapes; of each two attacks times two aggregators for each of three seeds.
MIXED = f"""\
{DEFAULTS}
seeds: [7, 8, 9]
p:
  combinations:
    - width_factor: [2, 4]
    - poison_ratio: [0.1, 0.2]
    - aggregator: [fedavg, median]
"""
FORTY = DEFAULTS + "p: {combinations: [{seed: [1, 2, 3, 4]}, {lr: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]}]}"


@pytest.fixture
def fresh(ledgers, make_grid) -> Callable[[str], Ledger]:
    def make(text: str) -> Ledger:
        ledger = ledgers()
        ledger.store_plan(make_grid(text).tasks)
        return ledger

    return make


def values(tasks: list[Task], *names: str) -> list[tuple[object, ...]]:
    return [tuple(task.config[name] for name in names) for task in tasks]


def lose_all(ledger: Ledger, clock) -> list[Task]:
    clock.advance(61)
    return ledger.lose_stale()


# ---- the order


def test_the_most_expensive_go_first_then_in_the_order_of_the_grid(fresh):
    ledger = fresh(
        "a: {combinations: [{width_factor: [1, 8]}, {global_rounds: [2, 30, 3]}]}\n"
        "b: {defaults: {dataset: mnist, model_type: lr, depth: 0}, combinations: [{lr: [0.1, 0.2, 0.3]}]}"
    )
    out: list[Task] = []
    while tasks := ledger.hand_out("w", 60):
        out += tasks
    costs = [expected_cost(from_config(task.config)) for task in out]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 7
    assert values([task for task in out if task.phase == "b"], "lr") == [(0.1,), (0.2,), (0.3,)]


def test_several_tasks_are_of_one_cohort_and_bear_its_key(fresh):
    ledger = fresh(MIXED)
    seen: set[str] = set()
    for width in (4, 2):
        tasks = ledger.hand_out("w", 60, max_tasks=100)
        assert {task.config["width_factor"] for task in tasks} == {width}
        assert {task.cohort for task in tasks} == {cohort_key(from_config(task.config)) for task in tasks}
        assert len({task.attempt for task in tasks}) == len(tasks) == 12
        seen |= {task.cohort for task in tasks}
    assert len(seen) == 2
    assert ledger.hand_out("w", 60, max_tasks=100) == []


def test_experiments_that_share_their_images_go_out_together(fresh):
    ledger = fresh(MIXED)
    assert values(ledger.hand_out("w", 60, max_tasks=4), "seed") == [(7,)] * 4
    assert values(ledger.hand_out("w", 60, max_tasks=6), "seed") == [(8,)] * 4 + [(9,)] * 2
    assert values(ledger.hand_out("w", 60, max_tasks=6), "seed", "width_factor") == [(9, 4)] * 2
    assert values(ledger.hand_out("w", 60, max_tasks=6), "seed", "width_factor") == [(7, 2)] * 4 + [(8, 2)] * 2


def test_those_that_share_go_together_even_where_some_have_fewer_rounds(fresh):
    ledger = fresh(DEFAULTS + "p: {combinations: [{seed: [7, 8]}, {global_rounds: [5, 10]}, {lr: [0.1, 0.2]}]}")
    tasks = ledger.hand_out("w", 60, max_tasks=6)
    assert values(tasks, "seed", "global_rounds") == [(7, 10), (7, 10), (7, 5), (7, 5), (8, 10), (8, 10)]


def test_tasks_with_a_setback_go_last_however_expensive(fresh):
    ledger = fresh(MIXED)
    for _ in range(3):
        (task,) = ledger.hand_out("w", 60)
        ledger.fail(task.task_id, "w", "ValueError", task.attempt)
    widths = [ledger.hand_out("w", 60)[0].config["width_factor"] for _ in range(24)]
    assert widths == [4] * 9 + [2] * 12 + [4] * 3


def test_a_task_of_the_reference_engine_goes_with_no_other(fresh):
    ledger = fresh(MIXED.replace("num_clients: 2", "num_clients: 2, engine: reference"))
    for _ in range(24):
        (task,) = ledger.hand_out("w", 60, max_tasks=100)
        assert task.cohort.startswith("reference|")
        assert ledger.hand_out("v", 60, max_tasks=100, cohort=task.cohort) == []


def test_another_engine_in_the_configuration_holds_for_the_tasks_that_wait(fresh, make_grid):
    ledger = fresh(MIXED)
    ledger.store_plan(make_grid(MIXED.replace("num_clients: 2", "num_clients: 2, engine: reference")).tasks)
    assert len(ledger.hand_out("w", 60, max_tasks=100)) == 1
    ledger.store_plan(make_grid(MIXED).tasks)
    assert len(ledger.hand_out("w", 60, max_tasks=100)) == 11


# ---- more of the same


def test_a_worker_may_ask_for_more_of_the_same(fresh):
    ledger = fresh(MIXED)
    narrow = cohort_key(from_config({**ledger.view.task("p_0_7").config}))
    assert values(ledger.hand_out("w", 60, 3, cohort=narrow), "width_factor") == [(2,)] * 3
    assert values(ledger.hand_out("w", 60, 1, cohort=narrow), "width_factor") == [(2,)]
    assert len(ledger.hand_out("w", 60, 100, cohort=narrow)) == 8
    assert ledger.hand_out("w", 60, 100, cohort=narrow) == []
    assert ledger.hand_out("w", 60, 100, cohort="digits|lr|3|1|32|1|2") == []
    assert len(ledger.hand_out("w", 60, 100)) == 12


@pytest.mark.parametrize("setback", ["failed", "lost"])
def test_what_had_a_setback_joins_nothing_that_is_under_way(fresh, clock, setback):
    ledger = fresh(MIXED)
    tasks = ledger.hand_out("v", 60, 12)
    if setback == "lost":
        lose_all(ledger, clock)
    else:
        for task in tasks:
            ledger.fail(task.task_id, "v", "ValueError", task.attempt)
    assert ledger.hand_out("w", 60, 100, cohort=tasks[0].cohort) == []


# ---- the portion of a worker


def test_one_worker_gets_all_that_it_asks_for(fresh):
    ledger = fresh(FORTY)
    assert len(ledger.hand_out("w", 60, 100, workers=1)) == 40


@pytest.mark.parametrize("workers", [2, 3, 4, 7, 40, 100])
def test_workers_that_ask_one_after_another_get_the_same_and_all_is_handed_out(fresh, workers):
    ledger = fresh(FORTY)
    sizes = [len(ledger.hand_out(f"w{number}", 60, 100, workers=workers)) for number in range(workers)]
    assert sum(sizes) == 40
    assert max(sizes) <= -(-40 // workers)  # never more than a fair share
    assert sum(size > 0 for size in sizes) == min(workers, 40)


def test_asking_again_and_again_brings_no_more_than_a_fair_share(fresh):
    ledger = fresh(FORTY)
    cohort = ledger.view.task("p_0_1").cohort
    held = []
    for _ in range(100):
        held += ledger.hand_out("greedy", 60, 5, cohort=cohort, workers=2)
    assert len(held) == 20
    for task in held[:10]:
        ledger.accept(task.task_id, "greedy", {"mean_test_acc": 0.5}, task.attempt)
    assert len(ledger.hand_out("greedy", 60, 100, cohort=cohort, workers=2)) == 5  # half of the 30 that are unfinished
    assert len(ledger.hand_out("other", 60, 100, workers=2)) == 15


def test_a_worker_that_holds_nothing_gets_one_task_at_least(fresh):
    ledger = fresh(FORTY)
    ledger.hand_out("w", 60, 38)
    assert len(ledger.hand_out("v", 60, 100, workers=100)) == 1
    assert ledger.hand_out("v", 60, 100, workers=100) == []
    assert len(ledger.hand_out("v", 60, 100, workers=1)) == 1


def test_costs_are_shared_not_numbers(fresh):
    ledger = fresh(DEFAULTS + "p: {combinations: [{global_rounds: [1000, 10]}, {seed: [1, 2, 3, 4]}]}")
    assert values(ledger.hand_out("w", 60, 100, workers=4), "global_rounds") == [(1000,), (10,)]
    # The other with the same seed came along: it trains on the same images and costs next to nothing.
    assert values(ledger.hand_out("v", 60, 100, workers=4), "global_rounds") == [(1000,), (10,)]


def test_a_cut_keeps_those_that_share_their_images_together(fresh):
    ledger = fresh(FORTY)
    assert values(ledger.hand_out("w", 60, 100, workers=3), "seed") == [(1,)] * 10 + [(2,)] * 4  # 10 are too few
    groups = [str(number // 9) for number in range(36)]
    assert portion([1.0] * 36, groups, 21) == 18
    assert portion([1.0] * 36, groups, 5) == 5  # there is no boundary before it


@given(
    costs=st.lists(st.integers(1, 1000), max_size=40),
    sizes=st.lists(st.integers(1, 12), min_size=40, max_size=40),
    room=st.one_of(st.just(0), st.floats(-10, 30_000)),
)
def test_a_portion_fills_the_room_and_at_most_one_task_reaches_beyond(costs, sizes, room):
    groups = [str(number) for number, size in enumerate(sizes) for _ in range(size)][: len(costs)]
    count = portion(costs, groups, room)
    assert 0 <= count <= len(costs)
    assert sum(costs[: count - 1]) < room or count == 0
    whole = next((n for n in range(len(costs)) if sum(costs[:n]) >= room), len(costs))
    is_boundary = 0 < count < len(costs) and groups[count - 1] != groups[count]
    assert count == whole or is_boundary
    assert sum(costs[:count]) >= KEPT_AT_A_BOUNDARY * sum(costs[:whole])


# ---- what is kept apart


def test_a_task_that_failed_is_tried_alone(fresh):
    ledger = fresh(FORTY)
    tasks = ledger.hand_out("w", 60, 40)
    for task in tasks[:3]:
        ledger.fail(task.task_id, "w", "ValueError", task.attempt)
    for task in tasks[3:]:
        ledger.release(task.task_id, "w", task.attempt)
    assert len(ledger.hand_out("w", 60, 40)) == 37
    for number in range(3):
        assert len(ledger.hand_out(f"v{number}", 60, 40)) == 1


def test_a_task_that_was_lost_is_tried_once_more_with_others_then_alone(fresh, clock):
    ledger = fresh(FORTY)
    ledger.hand_out("w", 60, 10)
    assert len(lose_all(ledger, clock)) == 10
    assert len(ledger.hand_out("v", 60, 100)) == 30  # those that never were lost come first, and by themselves
    again = ledger.hand_out("w", 60, 100)
    assert len(again) == 10
    lose_all(ledger, clock)
    sizes = [len(ledger.hand_out(f"w{number}", 60, 100)) for number in range(11)]
    assert sizes == [30, *[1] * 10]


def test_a_task_that_is_tried_alone_goes_to_a_worker_that_holds_nothing_and_stays_alone(fresh):
    ledger = fresh(FORTY)
    tasks = ledger.hand_out("w", 60, 20)
    ledger.fail(tasks[0].task_id, "w", "ValueError", tasks[0].attempt)
    ledger.hand_out("v", 60, 20)
    assert ledger.hand_out("w", 60, 20) == []  # it holds 19, which the one that failed could harm
    (alone,) = ledger.hand_out("x", 60, 20)
    for task in tasks[1:]:
        ledger.release(task.task_id, "w", task.attempt)
    assert ledger.hand_out("x", 60, 20) == []
    assert ledger.hand_out("x", 60, 20, cohort=alone.cohort) == []
    ledger.release(alone.task_id, "x", alone.attempt)
    assert len(ledger.hand_out("x", 60, 20)) == 19


def test_the_task_that_kills_its_workers_fails_and_its_neighbours_do_not(fresh, clock):
    """Whoever holds the culprit dies; all others finish what they hold."""
    ledger = fresh(FORTY)
    culprit = "p_3_2"
    assert ledger.view.task(culprit)
    for number in range(200):
        tasks = ledger.hand_out(f"w{number}", 60, 40)
        if not tasks:
            break
        if culprit in {task.task_id for task in tasks}:
            lose_all(ledger, clock)
            continue
        for task in tasks:
            ledger.accept(task.task_id, f"w{number}", {"mean_test_acc": 0.5}, task.attempt)
    assert ledger.view.counts() == Counts(complete=39, failed=1)
    assert ledger.view.failed()[0][0] == culprit
    assert ledger.view.task(culprit).losses == 5
    assert {task.losses for task in ledger.view.all_tasks() if task.task_id != culprit} == {2}


def test_the_task_that_fails_its_whole_cohort_fails_and_its_neighbours_do_not(fresh):
    ledger = fresh(FORTY)
    culprit = "p_3_2"
    while tasks := ledger.hand_out("w", 60, 40):
        if culprit in {task.task_id for task in tasks}:
            for task in tasks:
                ledger.fail(task.task_id, "w", "CUDA error", task.attempt)
        else:
            for task in tasks:
                ledger.accept(task.task_id, "w", {"mean_test_acc": 0.5}, task.attempt)
    assert ledger.view.counts() == Counts(complete=39, failed=1)
    assert {task.failures for task in ledger.view.all_tasks()} == {1, 4}


def test_forgiven_tasks_go_out_together_again(fresh):
    ledger = fresh(FORTY)
    tasks = ledger.hand_out("broken", 60, 40)
    ledger.forgive([ledger.fail(task.task_id, "broken", "CUDA error", task.attempt) for task in tasks])
    assert len(ledger.hand_out("w", 60, 40)) == 40


# ---- the file


def test_what_the_queue_is_ordered_by_is_that_of_the_experiment(fresh):
    ledger = fresh(MIXED)
    for row in ledger._db.execute("SELECT number, cohort, sharing, cost FROM tasks"):
        experiment = from_config(ledger.view.task_number(row["number"]).config)
        assert row["cohort"] == cohort_key(experiment)
        assert row["sharing"] == sharing_key(experiment)
        assert row["cost"] == expected_cost(experiment)


def test_choosing_uses_indices_and_sorts_nothing(fresh):
    ledger = fresh(MIXED)
    cohort = ledger.view.task("p_0_7").cohort
    steps: list[str] = []
    ledger._db.set_trace_callback(steps.append)
    ledger.hand_out("w", 60)
    ledger.hand_out("w", 60, 2, workers=2)
    ledger.hand_out("w", 60, 2, cohort=cohort, workers=2)
    ledger._db.set_trace_callback(None)
    selects = [step for step in steps if step.startswith("SELECT") and ("tasks" in step or "attempts" in step)]
    assert len(selects) >= 10
    for statement in selects:
        plan = [step["detail"] for step in ledger._db.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert not [step for step in plan if "TEMP B-TREE" in step or ("SCAN" in step and "INDEX" not in step)], plan
