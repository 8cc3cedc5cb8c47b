"""Write docs/configuration.md from the definitions of the parameters; with --check, only say whether it is current."""

from __future__ import annotations

import sys
from pathlib import Path

from fedsweep.plan.reference import render

PAGE = Path(__file__).with_name("configuration.md")


def main(arguments: list[str]) -> int:
    """Write the page, or compare it; the exit status."""
    if arguments not in ([], ["--check"]):
        print("usage: make_configuration.py [--check]", file=sys.stderr)
        return 2
    if not arguments:
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != render():
        print(f"docs/{PAGE.name} is not what the parameters say; run `make docs` and commit it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
