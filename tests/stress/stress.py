"""The long forms of the tests of reliability, one after another, and what they hit. `make stress` runs this.

A line that begins with `figures:` is passed on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = ("-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Part:
    """One long form."""

    name: str
    arguments: tuple[str, ...]  # for Python
    env: tuple[tuple[str, str], ...] = ()
    minutes: float = 5


def _tests(name: str, path: str, minutes: float = 5, **env: str) -> Part:
    return Part(name, (*PYTEST, path), tuple(env.items()), minutes)


PARTS = (
    Part("storm", ("tests/stress/storm.py", "--seeds", "1-2"), minutes=20),
    _tests("every crash point", "tests/manager/test_crashes.py", minutes=15, FEDSWEEP_STRIDE="1"),
    _tests("power loss", "tests/manager/test_power_loss.py", minutes=10, FEDSWEEP_EXAMPLES="5000"),
    _tests("bad network", "tests/network/test_bad_network.py", FEDSWEEP_EXAMPLES="2"),
    _tests("workers on a bad network", "tests/network/test_workers_on_a_bad_network.py", FEDSWEEP_EXAMPLES="3"),
    _tests("state machine", "tests/manager/test_ledger_machine.py", FEDSWEEP_EXAMPLES="2000"),
    _tests("parsers", "tests/fuzz", FEDSWEEP_EXAMPLES="2000"),
)


def run(part: Part) -> bool:
    """Run a part and say how it went; whether it was in order."""
    began = time.monotonic()
    env = {**os.environ, "PYTHONPATH": str(ROOT), **dict(part.env)}
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * part.minutes,
        )
    except subprocess.TimeoutExpired:
        print(f"{part.name}: FAILED, not over after {part.minutes:g} minutes", flush=True)
        return False
    verdict = "ok" if done.returncode == 0 else f"FAILED\n{done.stdout[-4000:]}"
    print(f"{part.name}: {verdict} ({time.monotonic() - began:.0f} s)")
    for line in done.stdout.splitlines():
        if line.startswith(("figures:", "=")) and ("figures:" in line or "passed" in line):
            print(f"  {line}")
    sys.stdout.flush()
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(0 if all([run(part) for part in PARTS]) else 1)
