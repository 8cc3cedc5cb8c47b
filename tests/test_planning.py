"""What `fedsweep plan` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsweep.planning import PhasePlan, Plan, make_plan, show_plan
from fedsweep.worker.probe import CohortEstimate, Estimate, Missing


def cohort(plan: str | None) -> CohortEstimate:
    return CohortEstimate(f"shape of {plan}", 3, plan, 0.5, 1_000_000)


def plan_of(
    *plans: str | None, duplicates: int = 0, failed: int = 0, cancelled: int = 0, missing: tuple[Missing, ...] = ()
) -> Plan:
    phases = {"p": PhasePlan(6, duplicates, {"p": duplicates} if duplicates else {}, 0)}
    estimate = Estimate(None, "cpu", {}, (), missing=missing, cohorts=tuple(map(cohort, plans)))
    return Plan(6, 6 - duplicates, duplicates, 0, failed, cancelled, phases, estimate)


def lines(plan: Plan, capsys, monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "100")
    show_plan(plan)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_no_column_is_empty(capsys, monkeypatch):
    assert lines(plan_of(), capsys, monkeypatch)[0].split() == ["phase", "experiments", "duplicates", "complete"]
    head, row, *_ = lines(plan_of(duplicates=2), capsys, monkeypatch)
    assert head.endswith("complete  the same as in")
    assert row.endswith("itself (2)")


@pytest.mark.parametrize(
    ("plans", "words"),
    [
        (("native x4", "native x16"), "(native xN: compiled kernels, N experiments at a time)"),
        (
            ("loop", None),
            "(loop: plain PyTorch, one experiment after another; not timed: estimated from the most similar one)",
        ),
        (("stacked grouped 8x16",), "(stacked: PyTorch operators, many experiments at a time)"),
        (("reference",), "(reference: the slow engine, as the configuration asks)"),
    ],
)
def test_the_plans_that_are_shown_are_explained(plans, words, capsys, monkeypatch):
    assert words in lines(plan_of(*plans), capsys, monkeypatch)


def test_a_data_set_that_is_missing_is_told_before_the_estimate(capsys, monkeypatch):
    reason = "the data set mnist is in no folder\n  what to do: put it into data/[mnist]"
    shown = lines(plan_of("loop", missing=(Missing("mnist", 3, reason),)), capsys, monkeypatch)
    place = shown.index("Missing: mnist, for 3 of them; `fedsweep run` does not start without it.")
    assert shown[place - 1] == "6 of 6 distinct experiments are still to be run."
    assert shown[place + 1 : place + 3] == reason.splitlines()


def test_what_failed_for_good_or_was_cancelled_is_not_still_to_be_run(capsys, monkeypatch):
    said = lines(plan_of("loop", failed=2, cancelled=1), capsys, monkeypatch)
    place = said.index("3 of 6 distinct experiments are still to be run.")
    assert said[place + 1 : place + 3] == [
        "2 failed for good and are not run again, unless by `fedsweep retry`.",
        "1 is cancelled, unless by `fedsweep retry cancelled`.",
    ]


def test_a_plan_asks_the_ledger_what_failed(swept):
    def plan(state_dir: Path) -> Plan:
        options = {"data_dir": None, "device": "cpu", "max_tasks": 9, "with_probe": False, "quiet": True}
        return make_plan(["a.yaml"], state_dir=state_dir, **options)

    made = plan(swept.state_dir)
    assert (made.unique, made.failed, made.cancelled, made.waiting) == (4, 2, 2, 0)
    assert (plan(Path("none")).failed, plan(Path("none")).waiting) == (0, 4)
