"""What is on disk, and not only on its way there, when a manager ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FILES = ("out/first/final_results.csv", "out/second/final_results.csv")


@pytest.fixture
def disk(managers, monkeypatch):
    """Every write and every sync of a results file in order, as pairs of what was done and to which file."""
    write, sync = os.write, os.fsync
    seen: list[tuple[str, str]] = []

    def note(what: str, descriptor: int) -> None:
        path = os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path in FILES:
            seen.append((what, path))

    def noted_write(descriptor, content):
        note("write", descriptor)
        return write(descriptor, content)

    def noted_sync(descriptor):
        note("sync", descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "write", noted_write)
    monkeypatch.setattr(os, "fsync", noted_sync)
    return seen


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc to tell files by")
def test_every_row_is_on_disk_before_a_manager_says_that_all_is_complete(managers, make_result, disk):
    manager = managers()
    while (task := manager.get_next_task("w")) is not None:
        manager.save_result(task["task_id"], "w", make_result(task), task["attempt"])
    written = {path: [what for what, of in disk if of == path] for path in FILES}
    assert all(what[-1] == "write" for what in written.values()), "nothing was left for the end to sync"
    assert manager.start() == 0
    assert {of: what for what, of in disk} == dict.fromkeys(FILES, "sync")
