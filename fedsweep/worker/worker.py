"""The worker: deliver what waits, ask for a task, run it, ask again."""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedsweep.errors import Preempted, ProtocolError, UsageError
from fedsweep.worker import spool
from fedsweep.worker.client import ManagerClient, TaskReply, request_task_from_manager, submit_result_to_manager
from fedsweep.worker.device import Device, claim_device, device_name, prepare_torch
from fedsweep.worker.gpu import LOCK_DIR
from fedsweep.worker.stopping import StopSignals
from fedsweep.worker.task import give_back, run_task

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5  # while the manager is away
LONGEST_PAUSE_S = 10.0
LONGEST_WAIT_S = 60.0  # that a manager can ask us to wait
PATIENCE_S = 3600.0  # for a manager that has never answered


def worker_loop(
    manager: str = "127.0.0.1:5000",
    device: str = "auto",
    token_file: str | Path | None = None,
    state_dir: str | Path = ".fedsweep",
    data_dir: str | Path | None = None,
    worker_id: str | None = None,
    *,
    lock_dir: str | Path = LOCK_DIR,
    patience_s: float = PATIENCE_S,
) -> int:
    """Run tasks until the manager says that all is done, or until SIGTERM or SIGINT.

    A manager that does not answer is not one that has nothing to do: the worker tries again for as long as it takes,
    and takes no new task meanwhile. What it has computed waits in the spool.

    Args:
        manager: HOST:PORT.
        device: `auto`, `cpu` or `cuda:N`.
        token_file: file with the manager's token; `token` in `state_dir` if not given.
        state_dir: where undelivered results wait, in `spool`.
        data_dir: folder with the official data files.
        worker_id: what the manager calls this worker; made of host, PID and chance if not given.
        lock_dir: where the GPU locks are.
        patience_s: how long to try a manager that has never answered.

    Returns:
        The exit status: 0 at the end of the sweep or when asked to stop, 1 if no manager ever answered.

    Raises:
        GpuUnavailable: the GPU that was asked for cannot be had.
        UsageError: an argument is wrong, or the manager does not accept the token.
    """
    host, port = _address(manager)
    claimed = claim_device(device, lock_dir)
    prepare_torch()
    loop = _Loop(
        worker_id=worker_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
        device=claimed,
        client=ManagerClient(host, port, None),
        token_file=Path(token_file or Path(state_dir) / "token"),
        spool_dir=Path(state_dir) / "spool",
        data_dir=data_dir,
        give_up_at=time.monotonic() + patience_s,
    )
    log.info("worker %s on %s asks %s", loop.worker_id, device_name(claimed.torch_name), manager)
    try:
        with loop.stop, loop.client:
            return loop.run()
    except Preempted:
        log.info("stopped as asked")
        return 0
    finally:
        claimed.release()


def _address(manager: str) -> tuple[str, int]:
    host, _, port = manager.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--manager {manager}: expected HOST:PORT, as in 127.0.0.1:5000")
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclass
class _Loop:
    """What a worker is, and what it knows of its manager."""

    worker_id: str
    device: Device
    client: ManagerClient
    token_file: Path
    spool_dir: Path
    data_dir: str | Path | None
    give_up_at: float  # monotonic, while no manager has ever answered
    stop: StopSignals = field(default_factory=StopSignals)
    has_answered: bool = False
    is_spool_due: bool = True  # whether to look for results that wait before asking
    pause_s: float = FIRST_PAUSE_S

    def run(self) -> int:
        """Ask and do until the end; the exit status."""
        while True:
            reply = self._ask()
            if reply.kind == "unreachable":
                if not self.has_answered and time.monotonic() >= self.give_up_at:
                    log.error("no manager has ever answered at %s:%d; giving up", self.client.host, self.client.port)
                    return 1
                self._pause()
                continue
            self.has_answered, self.pause_s = True, FIRST_PAUSE_S
            if reply.task is not None:
                self.is_spool_due = not run_task(
                    reply.task,
                    self.client,
                    worker_id=self.worker_id,
                    spool_dir=self.spool_dir,
                    device=self.device,
                    data_dir=self.data_dir,
                    stop=self.stop,
                )
            elif reply.kind == "wait":
                # What a worker of this host left when it was killed is delivered before it is computed again.
                self.is_spool_due = True
                self.stop.sleep(min(max(reply.retry_after, 0.0), LONGEST_WAIT_S))
            else:
                log.info("all experiments are done")
                return 0

    def _pause(self) -> None:
        """Wait for a manager that is away, longer each time."""
        if self.pause_s == FIRST_PAUSE_S:
            log.warning("no manager answers at %s:%d; trying again until one does", self.client.host, self.client.port)
        self.is_spool_due = True
        self.stop.sleep(self.pause_s * (0.5 + random.random()))
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)

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
        if self.stop.requested and reply.task is not None:
            self.stop.settle()
            give_back(reply.task, self.client, self.worker_id)
        self.stop.check()
        return reply

    def _deliver_and_request(self) -> TaskReply:
        if self.is_spool_due and not deliver_spool(self.spool_dir, self.client, self.worker_id):
            return TaskReply("unreachable")
        self.is_spool_due = False
        name = device_name(self.device.torch_name)
        return request_task_from_manager(self.client, self.worker_id, self.device.gpu_id, self.device.kind, name)

    def _read_token(self) -> str | None:
        """The token; None where there is none, as before the first start of a manager, or for a manager of old."""
        try:
            return self.token_file.read_text(encoding="utf-8").strip() or None
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
                f"the manager at {self.client.host}:{self.client.port} asks for its token, and {found} ({refusal}); "
                "copy it from the manager's state directory and name it by --token-file"
            )
        self.client.token = token


def deliver_spool(spool_dir: Path, client: ManagerClient, worker_id: str) -> bool:
    """Deliver what lies in the spool, of this worker or of another; False where the manager is away.

    A result that the manager refuses for good is set aside in the spool with a line in the log.

    Raises:
        ProtocolError: the manager does not accept our token.
    """
    for waiting in spool.pending(spool_dir):
        try:
            delivered = submit_result_to_manager(
                client, waiting.task_id, worker_id, waiting.result_data, waiting.attempt
            )
        except ProtocolError as error:
            if error.code == "unauthorized":
                raise
            spool.set_aside(waiting.path, error)
            continue
        if not delivered:
            return False
        spool.remove(waiting)
        log.info("%s: the result that waited is delivered", waiting.task_id)
    return True
