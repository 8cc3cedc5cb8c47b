"""Make each mistake of `mutants.py` in a copy of the tree, and see its tests go red; without it they must be green.

As a script: `python tests/mutants/kill_mutants.py [NAME …]`, all of them if none is named. Exit status 1 if one lives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mutants import MUTANTS, Edit, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fedsweep", "tests", "configs", "docs", "pyproject.toml", "README.md")
RED, TIMEOUT_S = 1, 300


def edited(text: str, edit: Edit) -> str:
    """The text with the edit made.

    Raises:
        ValueError: the old text does not stand there exactly once.
    """
    if (count := text.count(edit.old)) != 1:
        raise ValueError(f"{edit.path}: this stands there {count} times, and must once: {edit.old!r}")
    return text.replace(edit.old, edit.new)


def mutated(mutant: Mutant, root: Path = ROOT) -> Mapping[str, str]:
    """The files that a mutant changes, as they are then."""
    texts: dict[str, str] = {}
    for edit in mutant.edits:
        texts[edit.path] = edited(texts.get(edit.path) or (root / edit.path).read_text(), edit)
    return texts


def copy_tree(folder: Path) -> Path:
    """A copy of the tree, in which anything may be changed."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """The exit status of pytest in a tree, and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stdout + done.stderr


def survives(mutant: Mutant, tree: Path) -> str | None:
    """Why a mutant is not caught by its tests in this tree; None where it is. The tree is left as it was."""
    texts = mutated(mutant, tree)
    before = {path: (tree / path).read_text() for path in texts}
    try:
        for path, text in texts.items():
            (tree / path).write_text(text)
        status, output = run_tests(tree, mutant.tests)
    finally:
        for path, text in before.items():
            (tree / path).write_text(text)
    if status == RED and " failed" in output:
        return None
    return f"pytest {' '.join(mutant.tests)} ended with status {status} and not with failed tests:\n{output[-2000:]}"


def chosen(names: Iterable[str]) -> Iterator[Mutant]:
    """The mutants with these names; all if there are none."""
    wanted = list(names)
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in wanted or known:
        if name not in known:
            raise SystemExit(f"no mutant is called {name!r}; there are: {', '.join(known)}")
        yield known[name]


def main(names: Iterable[str]) -> int:
    """Run mutants and print a line for each; the exit status."""
    mutants, alive = list(chosen(names)), 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_tree(Path(folder))
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            status, output = run_tests(tree, tests)
            if status != 0:
                print(f"pytest {' '.join(tests)} is not green without any mistake:\n{output[-2000:]}")
                return 1
        for mutant in mutants:
            began = time.monotonic()
            reason = survives(mutant, tree)
            alive += reason is not None
            verdict = "killed" if reason is None else f"ALIVE: {reason}"
            print(f"{mutant.name}: {verdict} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
