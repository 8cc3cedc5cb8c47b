"""The time left: no word of it without ground, then by cost, by the workers there are, and by what each holds."""

from __future__ import annotations

import pytest

from fedsweep.manager.pace import Pace, has_ground, time_of


@pytest.mark.parametrize(
    ("waiting", "held", "time"),
    [
        (0.0, [], 0.0),
        (10.0, [], 10.0),  # by the one that will come
        (10.0, [0.0, 0.0], 5.0),
        (12.0, [4.0, 4.0], 10.0),
        (0.0, [8.0, 2.0], 8.0),  # nobody helps with what another holds
        (4.0, [8.0, 0.0], 8.0),
    ],
)
def test_workers_share_what_waits_and_do_what_they_hold(waiting, held, time):
    assert time_of(waiting, held) == time


@pytest.mark.parametrize(
    ("seconds", "results", "done", "left", "is_enough"),
    [
        (9.9, 100, 99.0, 1.0, False),
        (10.0, 3, 5.0, 95.0, True),
        (10.0, 2, 50.0, 50.0, False),
        (119.0, 100, 4.9, 95.1, False),
        (120.0, 0, 0.1, 1000.0, True),
    ],
)
def test_ground_is_a_few_results_that_are_a_share_or_a_long_look(seconds, results, done, left, is_enough):
    assert has_ground(seconds, results, done, left) == is_enough


def work(pace: Pace, begin: float, end: float, *, results: int, workers: int = 2) -> None:
    """From `begin` to `end` every two seconds so many results of cost 1, and a sample."""
    now = begin
    while now < end:
        now += 2
        for _ in range(results):
            pace.finish(1.0)
        pace.sample(now, 0.0, workers)


def test_the_seconds_in_which_workers_start_say_nothing():
    pace = Pace()
    work(pace, 0, 100, results=0)
    assert pace.seconds_left(100, [0, 0]) is None
    work(pace, 100, 110, results=2)  # the first of these results are the end of the start
    assert pace.seconds_left(90, [0, 0]) is None
    work(pace, 110, 112, results=2)
    assert pace.seconds_left(90, [0, 0]) == pytest.approx(90)  # one result a second


def test_with_fewer_workers_it_takes_longer():
    pace = Pace()
    work(pace, 0, 20, results=2)
    assert pace.seconds_left(90, [0, 0]) == pytest.approx(90)
    assert pace.seconds_left(90, [0]) == pytest.approx(180)
    work(pace, 20, 40, results=1, workers=1)  # no slower than before, for one
    assert pace.seconds_left(90, [0]) == pytest.approx(180, rel=0.1)


def test_an_expensive_experiment_takes_as_long_as_several_cheap_ones():
    pace = Pace()
    work(pace, 0, 20, results=1, workers=1)
    assert pace.seconds_left(10 * 4.0, [2.0]) == pytest.approx(2 * 42)


def test_while_nobody_is_there_no_time_passes():
    pace = Pace()
    work(pace, 0, 20, results=2)
    pace.sample(100, 0.0, 0, is_idle=True)
    assert pace.seconds_left(10, [0]) is None
    work(pace, 1000, 1020, results=2)
    assert pace.seconds_left(20, [0, 0]) == pytest.approx(20)


def test_the_pace_is_that_of_the_last_ten_minutes():
    pace = Pace()
    work(pace, 0, 1000, results=8)
    work(pace, 1000, 1700, results=2)
    assert pace.seconds_left(100, [0, 0]) == pytest.approx(100)


def test_rounds_that_are_lost_with_their_worker_leave_no_pace():
    pace = Pace()
    for second in range(0, 200, 2):
        pace.sample(second, second / 100, 1)
    assert pace.seconds_left(10, [0]) == pytest.approx(1000)
    pace.sample(200, 0.0, 0)
    assert pace.seconds_left(10, [0]) is None
