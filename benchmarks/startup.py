"""How long the commands take that a person waits for: `fedsweep --help` beside `python -c pass`, in turn.

python benchmarks/startup.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime

REPEATS = 15
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "fedsweep --help": [sys.executable, "-m", "fedsweep", "--help"],
    "import fedsweep.manager": [sys.executable, "-c", "import fedsweep.manager"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPEATS):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    found = {name: {"median_s": statistics.median(runs), "max_s": max(runs)} for name, runs in times.items()}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "at": datetime.now(UTC).isoformat()}
    print(json.dumps({"commands": found, "repeats": REPEATS, **machine}, indent=2))


if __name__ == "__main__":
    main()
