"""The same tiny tasks through our manager, RQ and Celery, each with worker processes of its own.

How it is fair: all have the same number of worker processes, which are there and idle before the tasks are; the same
number of tasks with parameters and results of the same length; results are kept by all. A queue in Redis is filled
under another name and put in its place by one RENAME, so that filling it does not count; our tasks lie in the ledger.
The time runs from then until the last result is there. Redis runs as it is by default, which may lose what it said was
there, and with every write synced before its answer, which is what our manager does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import venvs
from served import ServingManager, write_sweep

PEERS = Path(venvs.__file__).resolve().parent / "peers"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(PEERS), str(Path(__file__).resolve().parent)])}
DEFAULTS, DURABLE = "defaults", "every write synced"
REDIS = {DEFAULTS: (), DURABLE: ("--appendonly", "yes", "--appendfsync", "always")}
READY_S, LONGEST_S = 60.0, 300.0
LOOK_S = 0.02
WAITING = "waiting"  # a queue that nobody takes from


class RedisServer:
    """A Redis of our own, in an empty folder; gone at the end."""

    def __init__(self, folder: Path, mode: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        folder.mkdir(parents=True)
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), *REDIS[mode]]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(lambda: self.said("PING") == "PONG", "redis-server")

    def said(self, *words: str) -> str:
        """The answer to a command, one line of it."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=LONGEST_S) as line:
                parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
                line.sendall("".join(parts).encode())
                return line.makefile("rb").readline().decode().strip().lstrip("+:")
        except ConnectionRefusedError:
            return ""

    def memory_mb(self) -> float:
        """RSS of its process."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Peer:
    """A queue that a user could take instead."""

    title: str
    venv: str
    script: Path
    workers: Callable[[Path, int, int], list[list[str]]]  # (folder of the venv's programs, port of Redis, how many)
    takes_from: str  # Redis key of its queue
    waits_in: str
    done: tuple[str, ...]  # the command that says how many results there are
    enqueued: dict[str, int]  # mode of Redis -> tasks, where the time of filling is asked for

    def python(self, folder: Path) -> Path:
        return venvs.python_of(self.venv, folder)


def _rq_workers(programs: Path, port: int, number: int, *options: str) -> list[list[str]]:
    command = [str(programs / "rq"), "worker", "--quiet", "--url", f"redis://127.0.0.1:{port}", *options, "default"]
    return [command] * number


def _simple_rq_workers(programs: Path, port: int, number: int) -> list[list[str]]:
    return _rq_workers(programs, port, number, "--worker-class", "rq.SimpleWorker")


def _celery_workers(programs: Path, port: int, number: int) -> list[list[str]]:
    command = [str(programs / "celery"), "--app", "queue_celery", "--quiet", "worker", "--loglevel", "ERROR"]
    return [[*command, "--concurrency", str(number)]]


RQ = Peer(
    **{"title": "RQ", "venv": "rq", "script": PEERS / "queue_rq.py", "workers": _rq_workers},
    **{"takes_from": "rq:queue:default", "waits_in": f"rq:queue:{WAITING}"},
    **{"done": ("ZCARD", f"rq:finished:{WAITING}"), "enqueued": {DEFAULTS: 100_000, DURABLE: 100_000}},
)
SIMPLE_RQ = Peer(**{**RQ.__dict__, "title": "RQ, without a fork a task", "workers": _simple_rq_workers, "enqueued": {}})
CELERY = Peer(
    **{"title": "Celery", "venv": "celery", "script": PEERS / "queue_celery.py", "workers": _celery_workers},
    **{"takes_from": "celery", "waits_in": WAITING, "done": ("results",)},
    **{"enqueued": {DEFAULTS: 100_000, DURABLE: 5_000}},
)
ALL = (RQ, SIMPLE_RQ, CELERY)


def is_possible() -> bool:
    """Whether there is a Redis to run."""
    return shutil.which("redis-server") is not None


def wait_for(is_so: Callable[[], bool], what: str, patience_s: float = READY_S) -> None:
    end = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > end:
            sys.exit(f"{what}: not there after {patience_s:g} s")
        time.sleep(LOOK_S)


def _run(peer: Peer, folder: Path, port: int, *arguments: str) -> dict[str, Any]:
    """What the script of a peer says."""
    with_port = [] if peer is CELERY else ["--port", str(port)]
    done = subprocess.run(
        [str(peer.python(folder)), str(peer.script), *arguments, *with_port],
        env=ENVIRONMENT | {"REDIS_PORT": str(port)},
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    if done.returncode != 0:
        sys.exit(f"{peer.title} ended with {done.returncode}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def enqueue(peer: Peer, mode: str, count: int, folder: Path, venv_folder: Path) -> dict[str, Any]:
    """How long it takes to enqueue so many tasks, and what memory Redis has with them."""
    with RedisServer(folder, mode) as redis:
        empty = redis.memory_mb()
        filled = _run(peer, venv_folder, redis.port, "fill", "--count", str(count))
        return {"tasks": count, **filled, "redis_mb": redis.memory_mb(), "redis_mb_empty": empty}


def end_to_end(peer: Peer, mode: str, count: int, processes: int, folder: Path, venv_folder: Path) -> dict[str, Any]:
    """Tasks a second, from when they are there until the last has its result."""
    with RedisServer(folder, mode) as redis:
        filled = _run(peer, venv_folder, redis.port, "fill", "--queue", WAITING, "--count", str(count))
        programs = peer.python(venv_folder).parent
        workers = [
            subprocess.Popen(
                command,
                env=ENVIRONMENT | {"REDIS_PORT": str(redis.port)},
                cwd=PEERS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            for command in peer.workers(programs, redis.port, processes)
        ]
        try:
            expected = len(workers)
            wait_for(lambda: _run(peer, venv_folder, redis.port, "ready")["ready"] == expected, peer.title)
            time.sleep(1.0)  # its pool has started, too
            began = time.perf_counter()
            redis.said("RENAME", peer.waits_in, peer.takes_from)
            wait_for(lambda: _results(redis, peer) >= count, f"{peer.title}, {mode}: {count} results", LONGEST_S)
            took = time.perf_counter() - began
        finally:
            for worker in workers:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    return {"per_s": count / took, "seconds": took, "versions": filled["versions"]}


def _results(redis: RedisServer, peer: Peer) -> int:
    """How many results are there. Celery has one key each in a database that holds nothing else."""
    if peer.done == ("results",):
        with socket.create_connection(("127.0.0.1", redis.port), timeout=LONGEST_S) as line:
            line.sendall(b"SELECT 1\r\nDBSIZE\r\n")
            answers = line.makefile("rb")
            answers.readline()
            return int(answers.readline().decode().strip().lstrip(":"))
    return int(redis.said(*peer.done))


def ours_end_to_end(count: int, processes: int, folder: Path) -> dict[str, Any]:
    """Likewise, for our manager: until the last result is acknowledged, which is then in its file, too."""
    write_sweep(folder, count)
    with ServingManager(folder) as manager:
        command = [sys.executable, str(PEERS / "queue_ours.py"), f"--port={manager.port}", f"--processes={processes}"]
        path = os.pathsep.join([str(Path(__file__).resolve().parent), str(PEERS.parents[1])])
        workers = subprocess.Popen(
            [*command, f"--token-file={manager.token_file}"],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert workers.stdin is not None
        assert workers.stdout is not None
        if workers.stdout.readline().strip() != "ready":
            sys.exit("our workers did not start")
        time.sleep(1.0)
        told, _ = workers.communicate("go\n", timeout=LONGEST_S)
    found = json.loads(told.strip().splitlines()[-1])
    rows = (folder / "results" / "final_results.csv").read_text().count("\n") - 1
    if found["done"] != count or rows < count:
        sys.exit(f"of {count} tasks {found['done']} were done, and {rows} rows were written")
    return {"per_s": count / found["seconds"], "seconds": found["seconds"]}


def redis_version() -> str:
    """What Redis says of itself."""
    said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("v=")[1].split()[0]
