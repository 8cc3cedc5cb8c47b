"""`python -m fedsweep` is `fedsweep`."""

from fedsweep.cli import main

main()
