"""`fedsweep run` looks after its processes: what dies is started again, and nothing outlives it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedsweep.launch import local
from fedsweep.launch.local import Child
from fedsweep.manager import ExperimentManager

pytestmark = pytest.mark.acceptance

SWEEP = """\
defaults: {dataset: digits, model_type: lr, width_factor: 4, depth: 1, num_clients: 4, local_epochs: 3, output_dir: out}
tiny:
  combinations:
    - poison_ratio: [0.0, 0.25, 0.5, 0.75]
    - seed: [1, 2, 3, 4, 5]
"""


def run(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    (folder / "sweep.yaml").write_text(SWEEP)
    return subprocess.Popen(
        [sys.executable, "-m", "fedsweep", "run", "sweep.yaml", "--device", "cpu", *overrides],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def child(process: subprocess.Popen[str], command: str) -> psutil.Process | None:
    """The process of `fedsweep run` that runs `command`."""
    for each in psutil.Process(process.pid).children():
        try:
            if command in each.cmdline():
                return each
        except psutil.NoSuchProcess:
            continue
    return None


def rows(folder: Path) -> int:
    path = folder / "out" / "final_results.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def test_a_killed_worker_and_a_killed_manager_are_started_again(tmp_path, wait_until, read_rows):
    process = run(tmp_path)
    wait_until(lambda: rows(tmp_path) >= 1, 90, "a first row")
    for command in ("worker", "manager"):
        victim = child(process, command)
        assert victim is not None
        victim.kill()
        before = rows(tmp_path)
        wait_until(lambda before=before: rows(tmp_path) > before, 90, f"a row after the {command} was killed")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(read_rows(tmp_path / "out" / "final_results.csv")) == 20


def test_nothing_outlives_a_killed_run_and_the_same_command_goes_on(tmp_path, wait_until):
    process = run(tmp_path)
    wait_until(lambda: rows(tmp_path) >= 1, 90, "a first row")
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(each.is_running() for each in children), 30, "the end of manager and worker")
    assert rows(tmp_path) >= 1
    again = run(tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert rows(tmp_path) == 20


def test_a_second_sweep_on_the_same_state_says_who_holds_it(tmp_path, wait_until):
    process = run(tmp_path, "global_rounds=100000", "early_stopping_patience=null")  # so that it is still there
    wait_until(lambda: (tmp_path / ".fedsweep" / "manager.json").exists(), 60, "a manager")
    manager = json.loads((tmp_path / ".fedsweep" / "manager.json").read_text())["pid"]
    second = run(tmp_path)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    (line,) = output.splitlines()  # before anything else is said
    assert line.startswith(f"fedsweep: .fedsweep is in use by process {manager} on ")
    assert line.endswith("; `fedsweep status` shows its sweep, `fedsweep stop` ends it; or name another --state-dir")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    waiting, stopped = output.splitlines()[-2:]
    assert re.match(r"Stopping: waiting some seconds for .+\. Ctrl-C again stops at once; ", waiting)
    assert stopped.startswith("Stopped: 0 of 20 experiments are complete. ")
    assert stopped.endswith("; the same command goes on from there.")


def test_a_second_study_in_the_same_folder_says_what_becomes_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.yaml").write_text(SWEEP)
    with ExperimentManager(["first.yaml"], overrides=["global_rounds=1"]) as first:
        first.generate_all_tasks()
    second = run(tmp_path, "global_rounds=2")
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    words = "20 experiments of an earlier configuration are kept, with all results, but not run."
    assert words in output.splitlines()
    again = run(tmp_path, "global_rounds=2")  # all is done
    assert words in again.communicate(timeout=120)[0].splitlines()
    assert "removed" not in (tmp_path / ".fedsweep" / "logs" / "manager.log").read_text()


def test_what_dies_at_once_again_and_again_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "RESTART_PAUSE_S", 0.0)
    dying = Child("dying", ["no-such-command"], tmp_path / "dying.log")
    dying.start()
    deadline = time.monotonic() + 60
    while dying.keep_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    dying.wait(1)
    assert dying.returncode == local.WRONG_USAGE, "wrong usage is not tried again"
    assert "no-such-command" in dying.log_tail()
