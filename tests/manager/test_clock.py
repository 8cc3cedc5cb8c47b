"""The real clock while someone sets the time of day, as time servers and people do."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from fedsweep.manager import clock as clock_module
from fedsweep.manager.clock import Clock
from fedsweep.manager.ledger import Ledger


@pytest.fixture
def set_the_clock(monkeypatch):
    """Set the time of day of this process so many days ahead."""

    def ahead(days: int) -> None:
        class Datetime(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(days=days)

        jump, real = 86_400 * days, time.time
        monkeypatch.setattr(clock_module, "datetime", Datetime)
        monkeypatch.setattr(time, "time", lambda: real() + jump)

    return ahead


@pytest.mark.parametrize("days", [1, -1])
def test_a_day_more_or_less_ends_no_lease_and_prolongs_none(tmp_path, make_grid, set_the_clock, days):
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    ledger.store_plan(make_grid("p: {combinations: [{lr: [0.1, 0.2]}]}").tasks)
    ledger.hand_out("long", 3600.0)
    ledger.hand_out("over", 0.0)
    set_the_clock(days)
    assert abs(Clock().now() - datetime.now(UTC) - timedelta(days=days)) < timedelta(minutes=1)
    assert [task.losses for task in ledger.lose_stale()] == [1]
    assert [task.status for task in ledger.view.all_tasks()] == ["assigned", "pending"]
    ledger.close()
