"""A manager and its workers as processes on this machine, restarted when they die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsweep.address import ADDRESS_FILE, Address
from fedsweep.errors import FedsweepError, StateError
from fedsweep.files import open_plain, read_word

# A process that dies this often within its first seconds will not live by being started once more.
QUICK_DEATHS = 5
QUICK_S = 10.0
RESTART_PAUSE_S = 1.0
STOP_NOW_S = 3.0  # after a second signal
ASK_AGAIN_S = 0.3
WRONG_USAGE = 2


class ProcessGivenUp(FedsweepError):
    """A process of this sweep died again and again."""


@dataclass
class Child:
    """One process that is kept alive: its command line after `fedsweep`, its log file, how often it died young."""

    name: str
    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    quick_deaths: int = 0
    restart_at: float = 0.0

    def start(self) -> None:
        """Start the process; its output is appended to the log file.

        Raises:
            StateError: that cannot be written.
        """
        self._close_pipe()
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            descriptor = open_plain(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            raise StateError(f"{self.log} cannot be written ({error.strerror}); name another --state-dir") from None
        with os.fdopen(descriptor, "ab") as log:
            # A session of its own: Ctrl-C in the terminal reaches `fedsweep run` alone, which ends the others in order.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fedsweep", *self.arguments, "--exit-with-parent"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started_at = time.monotonic()

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while it runs or before it started."""
        return None if self.process is None else self.process.poll()

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of the log, for an error message."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def keep_alive(self) -> bool:
        """Start the process again after it died; False once it is not worth it."""
        now = time.monotonic()
        if self.is_running:
            return True
        if self.restart_at == 0.0:
            self.quick_deaths = self.quick_deaths + 1 if now - self.started_at < QUICK_S else 1
            self.restart_at = now + RESTART_PAUSE_S * self.quick_deaths
        if self.quick_deaths >= QUICK_DEATHS or self.returncode == WRONG_USAGE:
            return False
        if now >= self.restart_at:
            self.restart_at = 0.0
            self.start()
        return True

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        if self.is_running and self.process is not None:
            self.process.terminate()

    def wait(self, timeout_s: float) -> None:
        """Wait for its end; kill it when the time is up."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close_pipe()

    def _close_pipe(self) -> None:
        """Close our end of the pipe to a process that has ended (closing it earlier would end the process)."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()


@dataclass
class LocalSweep:
    """The processes of one sweep on this machine.

    `manager_arguments` and `worker_arguments` are command lines after `fedsweep manager` and `fedsweep worker`,
    without the address, which is added here.
    """

    manager_arguments: Sequence[str]
    worker_arguments: Sequence[str]
    num_workers: int
    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 0
    address: Address = field(init=False)
    manager: Child = field(init=False)
    workers: list[Child] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.address = Address(self.host, self.port)
        self.manager = self._child("manager", self._manager_command())

    def _manager_command(self) -> list[str]:
        return ["manager", *self.manager_arguments, "--host", self.host, "--port", str(self.port)]

    def _child(self, name: str, arguments: Sequence[str]) -> Child:
        return Child(name, arguments, self.state_dir / "logs" / f"{name}.log")

    def start(self, timeout_s: float = 60.0, pause_s: float = 0.05) -> None:
        """Start the manager, wait until it listens (or ends), then start the workers.

        Raises:
            ProcessGivenUp: the manager does not listen in time.
        """
        self.manager.start()
        deadline = time.monotonic() + timeout_s
        while not self._read_address():
            if not self.manager.is_running:
                return  # it had nothing to do, or could not start: its exit status says which
            if time.monotonic() > deadline:
                raise ProcessGivenUp(f"the manager did not start in {timeout_s:.0f} s\n{self.manager.log_tail()}")
            time.sleep(pause_s)
        for index in range(self.num_workers):
            address = ["--manager" if self.address.pin is None else "--join", str(self.address)]
            self.workers.append(self._child(f"worker-{index}", ["worker", *address, *self.worker_arguments]))
            self.workers[-1].start()

    def _read_address(self) -> bool:
        """Learn the port from the file that a listening manager leaves; one of an earlier manager does not count."""
        address = read_word(self.state_dir / ADDRESS_FILE)
        process = self.manager.process
        if process is None or address.get("pid") != process.pid:
            return False
        self.port = int(address["port"])
        self.address = Address(self.host, self.port, address.get("pin"))
        # A manager that is started again must listen where the workers look for it.
        self.manager.arguments = self._manager_command()
        return True

    def keep_alive(self) -> bool:
        """Start again what died; False when the sweep has ended (the manager ended by itself).

        Raises:
            ProcessGivenUp: the manager, or every worker, dies again and again; the message has the end of the log.
        """
        code = self.manager.returncode
        if code is not None and code >= 0:
            return False
        if not self.manager.keep_alive():
            raise ProcessGivenUp(f"the manager died {QUICK_DEATHS} times\n{self.manager.log_tail()}")
        alive = [worker.returncode == 0 or worker.keep_alive() for worker in self.workers]
        if alive and not any(alive):
            raise ProcessGivenUp(f"no worker stays alive; the last lines of one:\n{self.workers[0].log_tail()}")
        return True

    def stop(self, worker_grace_s: float = 8.0, manager_grace_s: float = 40.0) -> None:
        """End the workers, then the manager, each in order: tasks are given back, files are written.

        Raises:
            KeyboardInterrupt: a second signal came meanwhile; all were ended at once.
        """
        try:
            for worker in self.workers:
                worker.terminate()
            for worker in self.workers:
                worker.wait(worker_grace_s)
            self.manager.terminate()
            self.manager.wait(manager_grace_s)
        except KeyboardInterrupt:
            self._stop_now()
            raise

    def _stop_now(self) -> None:
        """Ask every process again, and again: the second time it leaves everything as it is. Kill what does not."""
        deadline = time.monotonic() + STOP_NOW_S
        children = [*self.workers, self.manager]
        while any(child.is_running for child in children) and time.monotonic() < deadline:
            for child in children:
                child.terminate()
            time.sleep(ASK_AGAIN_S)
        for child in children:
            child.wait(0.0)
