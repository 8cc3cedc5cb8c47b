"""Mistakes that the tests must find: three here, all of them by `make mutants`."""

from __future__ import annotations

import pytest
from kill_mutants import copy_tree, mutated, run_tests, survives
from mutants import MUTANTS

QUICK = ("no attempt check", "wall clock", "shutdown before the last fsync")
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mistake_can_still_be_made(mutant):
    """The text that it replaces stands there exactly once, and what comes of it is Python."""
    for path, text in mutated(mutant).items():
        compile(text, path, "exec")


def test_the_tests_go_red_for_a_mistake_and_for_nothing_else(tmp_path):
    tree = copy_tree(tmp_path)
    tests = {tests for name in QUICK for tests in [BY_NAME[name].tests]}
    for each in tests:
        status, output = run_tests(tree, each)
        assert status == 0, output
    assert {name: survives(BY_NAME[name], tree) for name in QUICK} == dict.fromkeys(QUICK)
