"""Fixtures for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsweep.manager import ExperimentManager

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real MNIST and CIFAR-10 images; skips where there is none."""
    folder = Path(os.environ.get("FEDSWEEP_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "mnist" / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"the real images are not here: no mnist/ in {folder} (name a folder by FEDSWEEP_DATA)")
    return folder


@pytest.fixture
def fedsweep(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the real command in an empty folder; the finished process with its output."""

    def command(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedsweep", *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return command


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExperimentManager:
    """A sweep of four tasks at rest: two failed for good of one cause, two were cancelled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("bad: {combinations: [{alpha: [1, 2]}]}\ngone: {combinations: [{alpha: [3, 4]}]}")
    manager = ExperimentManager(["a.yaml"])
    manager.generate_all_tasks()
    manager.sweep.cancel(["gone"])
    while task := manager.get_next_task("w"):
        manager.mark_failed(task["task_id"], "w", f"ValueError: {task['config']['alpha']} is\nnot\nenough")
    manager.close()
    return manager
