"""The worker: deliver what waits, ask for tasks, run them, ask again."""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedsweep.address import DEFAULT, known_address, parse_address
from fedsweep.errors import Preempted, ProtocolError, UsageError
from fedsweep.files import WORD_BYTES, read_plain
from fedsweep.worker.absence import Absence
from fedsweep.worker.client import ManagerClient, TaskReply, leave_manager
from fedsweep.worker.cpus import available_cpus
from fedsweep.worker.delivery import deliver_spool, give_back, last_words
from fedsweep.worker.device import claim_device, device_name, prepare_torch
from fedsweep.worker.gpu import LOCK_DIR
from fedsweep.worker.room import MOST_TOGETHER
from fedsweep.worker.station import CHECKPOINT_S, Station
from fedsweep.worker.stopping import StopSignals
from fedsweep.worker.task import run_tasks

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5  # while the manager is away
LONGEST_PAUSE_S = 10.0
LONGEST_WAIT_S = 60.0  # that a manager can ask us to wait
PATIENCE_S = 3600.0  # for a manager that has never answered


def worker_loop(
    manager: str | None = None,
    device: str = "auto",
    token_file: str | Path | None = None,
    state_dir: str | Path = ".fedsweep",
    data_dir: str | Path | None = None,
    worker_id: str | None = None,
    *,
    insecure_plaintext: bool = False,
    threads: int | None = None,
    lock_dir: str | Path = LOCK_DIR,
    patience_s: float = PATIENCE_S,
    checkpoint_s: float = CHECKPOINT_S,
) -> int:
    """Run tasks until the manager says that all is done, or until SIGTERM or SIGINT.

    A manager that does not answer is not one that has nothing to do: the worker tries again for as long as it takes,
    and takes no new task meanwhile. What it has computed waits in the spool.

    Args:
        manager: HOST:PORT, or a join string HOST:PORT#sha256:… of a manager that speaks TLS; if not given, where the
            manager of `state_dir` listens, or 127.0.0.1:5000.
        device: `auto`, `cpu` or `cuda:N`.
        token_file: file with the manager's token; `token` in `state_dir` if not given.
        state_dir: where undelivered results wait, in `spool`, and experiments in the middle, in `checkpoints`.
        data_dir: folder with the official data files.
        worker_id: what the manager calls this worker; made of host, PID and chance if not given.
        insecure_plaintext: send the token to another machine although nothing is encrypted.
        threads: that train at the same time, on a CPU; as many as there are CPUs if not given. They change no row.
        lock_dir: where the GPU locks are.
        patience_s: how long to try a manager that has never answered.
        checkpoint_s: seconds of training that are lost at most when the worker is killed, besides the round under way.

    Returns:
        The exit status: 0 at the end of the sweep or when asked to stop, 1 if no manager ever answered, or if the
        manager set this worker aside because it failed whatever it was given.

    Raises:
        GpuUnavailable: the GPU that was asked for cannot be had.
        UsageError: an argument is wrong, or the manager does not accept the token.
        ManagerNotTrusted: what answers is not the manager that was named.
    """
    given = None if manager is None else parse_address(manager)
    address = given or known_address(Path(state_dir)) or DEFAULT
    claimed = claim_device(device, lock_dir)
    prepare_torch()
    station = Station(
        client=ManagerClient(address.host, address.port, None, pin=address.pin, insecure_plaintext=insecure_plaintext),
        worker_id=worker_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
        spool_dir=Path(state_dir) / "spool",
        device=claimed,
        data_dir=data_dir,
        threads=threads or available_cpus(),
        checkpoint_dir=Path(state_dir) / "checkpoints",
        checkpoint_s=checkpoint_s,
    )
    loop = _Loop(
        station,
        Path(token_file or Path(state_dir) / "token"),
        give_up_at=time.monotonic() + patience_s,
        state_dir=Path(state_dir) if given is None else None,
        absence=Absence(time.monotonic),
    )
    log.info("worker %s on %s asks %s", station.worker_id, device_name(claimed.torch_name), address.place)
    try:
        with station.stop, station.client:
            return loop.run()
    except Preempted:
        log.info("stopped as asked")
        return 0
    finally:
        claimed.release()


@dataclass
class _Loop:
    """What a worker is, and what it knows of its manager."""

    station: Station
    token_file: Path
    give_up_at: float  # monotonic, while no manager has ever answered
    absence: Absence
    has_answered: bool = False
    is_spool_due: bool = True  # whether to look for results that wait before asking
    pause_s: float = FIRST_PAUSE_S
    state_dir: Path | None = None  # where the manager leaves word of its address; None: one was given

    @property
    def client(self) -> ManagerClient:
        """Talks to the manager."""
        return self.station.client

    @property
    def stop(self) -> StopSignals:
        """Tells of stop signals."""
        return self.station.stop

    def run(self) -> int:
        """Ask and do until the end; the exit status."""
        while True:
            reply = self._ask()
            if reply.kind == "unreachable":
                if not self.has_answered and time.monotonic() >= self.give_up_at:
                    log.error("no manager has ever answered at %s; giving up", self.client.address.place)
                    return 1
                self._pause(reply.message)
                continue
            self.absence.end()
            self.has_answered, self.pause_s = True, FIRST_PAUSE_S
            if reply.tasks:
                self.is_spool_due = not run_tasks(reply.tasks, self.station)
            elif reply.kind == "wait":
                # What a worker of this host left when it was killed is delivered before it is computed again.
                self.is_spool_due = True
                self.stop.sleep(min(max(reply.retry_after, 0.0), LONGEST_WAIT_S))
            elif reply.kind == "set_aside":
                log.error("the manager gives this worker no more tasks: %s", reply.message)
                self._leave()
                return 1
            else:
                log.info("%s", reply.message or "all experiments are done")
                self._leave()
                return 0

    def _leave(self) -> None:
        """Tell the manager that the last answer was heard: without a word it must take it for lost."""
        with last_words(self.client) as client:
            leave_manager(client, self.station.worker_id)

    def _pause(self, reason: str) -> None:
        """Wait for a manager that is away, longer each time."""
        limit_s = None if self.has_answered else max(0.0, self.give_up_at - time.monotonic())
        self.absence.note(reason or f"no manager answers at {self.client.address.place}", limit_s)
        self.is_spool_due = True
        self.stop.sleep(self.pause_s * (0.5 + random.random()))
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)
        if self.state_dir and (moved := known_address(self.state_dir)):
            self.client.move_to(moved)

    def _ask(self) -> TaskReply:
        """Ask for a task, once everything is delivered that waits. A stop signal takes effect before and after."""
        self.stop.check()
        if self.client.token is None:
            self.client.token = self._read_token()
        try:
            reply = self._deliver_and_request()
        except ProtocolError as error:
            if error.code != "unauthorized":
                raise
            self._renew_token(error)
            return self._ask()
        if self.stop.requested and reply.tasks:
            self.stop.settle()
            with last_words(self.client) as client:
                for task in reply.tasks:
                    give_back(task, client, self.station.worker_id)
        self.stop.check()
        return reply

    def _deliver_and_request(self) -> TaskReply:
        if self.is_spool_due and not deliver_spool(self.station.spool_dir, self.client, self.station.worker_id):
            return TaskReply("unreachable")
        self.is_spool_due = False
        return self.station.request(MOST_TOGETHER)

    def _read_token(self) -> str | None:
        """The token; None where there is none, as before the first start of a manager, or for a manager of old."""
        try:
            return read_plain(self.token_file, WORD_BYTES).decode().strip() or None
        except (OSError, UnicodeDecodeError) as error:
            log.debug("no token: %s", error)
            return None

    def _renew_token(self, refusal: ProtocolError) -> None:
        """Read the token again: a manager that was set up anew has written another.

        Raises:
            UsageError: there is none, or it is the one that was refused.
        """
        token = self._read_token()
        if token == self.client.token:
            found = f"there is none in {self.token_file}" if token is None else f"not that in {self.token_file}"
            raise UsageError(
                f"the manager at {self.client.address.place} asks for its token, and {found} ({refusal}); "
                "copy it from the manager's state directory and name it by --token-file"
            )
        self.client.token = token


def leave_process(code: int) -> NoReturn:
    """End this process at once.

    After a stop signal, threads may still be in the middle of a round, and the end of a process waits for its threads.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
