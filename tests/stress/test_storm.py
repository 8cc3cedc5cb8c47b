"""Sixty kills of the manager and of workers while a sweep runs: nothing lost, nothing doubled, nothing torn."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from storm import plan_of, run_storm


def test_sixty_kills_lose_nothing_and_double_nothing(tmp_path):
    figures = run_storm(tmp_path, seed=1, tasks=400, kills=60)
    print("figures:", figures)
    assert figures["wrong"] == []
    assert figures["never hit"] == []
    assert (figures["hits"]["manager killed"], figures["hits"]["worker killed"]) == (42, 18)


def test_a_plan_has_its_shares_and_differs_from_seed_to_seed():
    plan = plan_of(500, random.Random(1))
    assert Counter(kill.victim for kill in plan) == {"manager": 350, "worker": 150}
    assert sum(kill.point is not None for kill in plan) == 150
    for before, kill in itertools.pairwise(plan):
        assert not kill.is_early or (before.victim == "manager" and not before.is_early)
    assert plan == plan_of(500, random.Random(1)) != plan_of(500, random.Random(2))
