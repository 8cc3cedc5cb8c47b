"""Fuzz the parsers, guided by coverage, each in a process of its own: `make fuzz`.

    python tests/fuzz/fuzz.py [PARSER ...]      # protocol, sweep, results, report, state; all of them without a name

FUZZ_SECONDS is how long each runs (600), FUZZ_JOBS how many at a time (the number of CPUs). At the end a line for each:
executions, seconds of a CPU, coverage, and what failed. An input that breaks a promise is kept in
`corpus/PARSER/failed-…`, the shortest for each place in the code, and is replayed by the tests from then on. What a run
has found worth keeping lies in `.fuzz/PARSER`, where the next run goes on. Exit status: 0 nothing failed, 1 something
did, 2 wrong usage. Needs atheris, which exists for CPython up to 3.13 on Linux.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
FOUND = HERE.parent.parent / ".fuzz"
PARSERS = ("protocol", "sweep", "results", "report", "state")
SECONDS = int(os.environ.get("FUZZ_SECONDS", "600"))
JOBS = int(os.environ.get("FUZZ_JOBS", str(os.cpu_count() or 1)))
MAX_INPUT = 8192  # bytes
MAX_CPU_S = 2.0  # for one input, in code that is slowed by counting what it covers
HANGS_CPU_S = 20.0  # after which an input is given up
MAX_MEMORY_MB = 2048
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # in memory, where a sync costs nothing


def main(parsers: list[str]) -> int:
    """Fuzz these parsers; the exit status."""
    if unknown := [name for name in parsers if name not in PARSERS]:
        print(f"{unknown[0]} is none of {', '.join(PARSERS)}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(JOBS) as pool:
        reports = list(pool.map(_run_apart, parsers or PARSERS))
    return 1 if any(reports) else 0


def _run_apart(parser: str) -> int:
    """Fuzz one parser in a process of its own; how many failures there were."""
    work = FOUND / parser
    work.mkdir(parents=True, exist_ok=True)
    log = work.with_suffix(".log")
    with log.open("wb") as stream, tempfile.TemporaryDirectory(prefix="fedsweep-fuzz-", dir=SCRATCH) as scratch:
        command = [sys.executable, str(HERE / "fuzz.py"), "--inside", parser, str(work)]
        env = {**os.environ, "TMPDIR": scratch}  # removed here: the process ends at once
        status = subprocess.run(command, stdout=stream, stderr=stream, cwd=work.parent, env=env).returncode
    words = log.read_text(errors="replace")
    failed = set(re.findall(r"^FAILED (.*)", words, re.MULTILINE))
    for kept in work.parent.glob(f"{parser}-*-*"):  # what ended the process: out of memory, or a crash
        failed.add(_keep(parser, kept.name.removeprefix(f"{parser}-"), kept.read_bytes()))
        kept.unlink()
    if status and not failed:
        failed.add(f"exit status {status}; the end of {log}:\n{words[-1000:]}")
    executions, cpu_s = (re.findall(r"^executions: (\d+) cpu: (\d+)", words, re.MULTILINE) or [("0", "0")])[-1]
    edges, features = (re.findall(r"cov: (\d+) ft: (\d+)", words) or [("0", "0")])[-1]
    print(
        f"{parser}: {int(executions):,} executions in {cpu_s} s of a CPU, {edges} edges, {features} features, "
        f"{len(failed)} failures",
        flush=True,
    )
    for words in sorted(failed):
        print(f"  {words}", flush=True)
    return len(failed)


def _keep(parser: str, place: str, data: bytes) -> str:
    """Keep an input that failed, if none shorter is known that failed in the same place; its name and the place."""
    path = CORPUS / parser / f"failed-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    if not path.exists() or path.stat().st_size > len(data):
        path.write_bytes(data)
    return f"{path.name}: {place}"


def _place(error: BaseException) -> str:
    """What tells one failure from another: the type, and the innermost calls."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    calls = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    return f"{type(error).__name__}: {calls}"


def _fuzz_inside(parser: str, work: Path) -> None:
    """Fuzz one parser in this process, which ends here."""
    import atheris

    with atheris.instrument_imports(include=["fedsweep", "ruamel.yaml"]):
        import targets

    target = targets.TARGETS[parser]

    def give_up(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, give_up)
    executions, left_s, seen_at = 0, float(SECONDS), time.monotonic()
    failed: set[str] = set()

    def fail(place: str, data: bytes) -> None:
        known = len(failed)
        failed.add(_keep(parser, place, data))
        if len(failed) > known:
            traceback.print_exc()
            print(f"FAILED {_keep(parser, place, data)}", file=sys.stderr, flush=True)

    def run(data: bytes) -> None:
        nonlocal executions, left_s, seen_at
        executions += 1
        left_s -= min(1.0, time.monotonic() - seen_at)  # while it was stopped it did not fuzz
        seen_at = time.monotonic()
        started = time.process_time()
        if left_s < 0:
            print(f"executions: {executions} cpu: {started:.0f}", file=sys.stderr, flush=True)
            os._exit(0)
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, HANGS_CPU_S)
            target.run(data)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except Exception as error:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            fail(_place(error), data)
        if time.process_time() - started > MAX_CPU_S:
            fail("takes too long", data)

    words = work.with_suffix(".words")
    quoted = ("".join(f"\\x{byte:02x}" for byte in word.encode()) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    options = {
        "max_len": MAX_INPUT,
        # Both by the clock on the wall, which goes on where a process waits or was stopped.
        "timeout": 24 * 3600,
        "report_slow_units": 24 * 3600,
        "rss_limit_mb": MAX_MEMORY_MB,
        "dict": words,
        "artifact_prefix": f"{work.parent}/{parser}-",
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(work), str(CORPUS / parser)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        _fuzz_inside(sys.argv[2], Path(sys.argv[3]))
    sys.exit(main(sys.argv[1:]))
