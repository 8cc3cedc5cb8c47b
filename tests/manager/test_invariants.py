"""The invariants: a sound state has none broken, and each one that is broken is found."""

from __future__ import annotations

from fedsweep.manager.invariants import check


def test_a_finished_sweep_breaks_none(managers, make_result):
    manager = managers()
    done = {}
    while (task := manager.get_next_task("w")) is not None:
        done[task["signature"]] = make_result(task)
        manager.save_result(task["task_id"], "w", done[task["signature"]], task["attempt"])
    assert check(".fedsweep", acknowledged=done, has_ended=True) == []  # with the log beside the ledger
    manager.close()
    assert check(".fedsweep", acknowledged=done, has_ended=True) == []
