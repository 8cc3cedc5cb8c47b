"""Environments of their own for the peers, made when first needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "peers"


def default_folder() -> Path:
    """Where the environments are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fedsweep" / "benchmarks" / "venvs"


def python_of(name: str, folder: Path) -> Path:
    """The Python of the environment `name`, with what `peers/{name}.txt` lists."""
    wanted = (REQUIREMENTS / f"{name}.txt").read_text()
    home = folder / name
    python, made = home / "bin" / "python", home / "made-from.txt"
    if not made.exists() or made.read_text() != wanted:
        print(f"making the environment {home} (once) …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--requirement", str(REQUIREMENTS / f"{name}.txt")], check=True)
        made.write_text(wanted)
    return python
