"""When, where and with what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def about() -> dict[str, Any]:
    """The moment, the commit, the machine and its system."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The processor, by Linux's name for it, which in a virtual machine may be a vague one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(part for line in lines if len(part := [each.strip() for each in line.split(":", 1)]) == 2)
    return ", ".join(f"{name} {facts[name]}" for name in ("model name", "cpu family", "model") if name in facts)
