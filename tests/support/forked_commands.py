"""Runs `fedsweep` commands as processes of their own in milliseconds: everything is imported once, then forked.

Reads lines of JSON, `[FOLDER, [ARGUMENT, ...]]`, and answers each with `[STATUS, STANDARD OUTPUT, STANDARD ERROR]`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import IO, NoReturn

from permissions import bound_by_permissions

from fedsweep.cli import main

LONGEST_S = 20.0
HUNG, RAISED = 124, 70


def become(folder: str, arguments: list[str], out: IO[bytes], error: IO[bytes]) -> NoReturn:
    """Be that command, in that folder, as somebody whom the permissions of files bind."""
    status = RAISED
    try:
        os.chdir(folder)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out.fileno(), 1), (error.fileno(), 2)):
            os.dup2(descriptor, target)
        sys.argv = ["fedsweep", *arguments]
        with bound_by_permissions():
            main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else RAISED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    """The status of that process; one that does not end is killed."""
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HUNG


if __name__ == "__main__":
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
            status = wait(os.fork() or become(folder, arguments, out, error))
            said = []
            for stream in (out, error):
                stream.seek(0)
                said.append(stream.read().decode())
        print(json.dumps([status, *said]), flush=True)
