"""The worker: ask for a task, run it, keep its result until the manager has it, ask again."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from fedsweep.errors import FedsweepError, ManagerUnreachable, Preempted, ProtocolError, UsageError
from fedsweep.manager.protocol import TaskMessage
from fedsweep.worker import spool
from fedsweep.worker.client import (
    ManagerClient,
    TaskReply,
    notify_task_failed,
    release_task,
    request_task_from_manager,
    submit_result_to_manager,
)
from fedsweep.worker.gpu import GpuUnavailable, claim_gpu, get_available_gpu, list_gpus
from fedsweep.worker.runner import Progress, device_name, prepare_torch, run_single_experiment

log = logging.getLogger(__name__)

FIRST_AWAY_PAUSE_S = 1.0
LONGEST_AWAY_PAUSE_S = 30.0
RELEASE_GRACE_S = 4.0
ERROR_LINES = 30


class Dropped(FedsweepError):
    """The manager no longer wants the task from this worker."""


@dataclass
class Worker:
    """What one worker is, and what it is doing at this moment."""

    worker_id: str
    host: str
    port: int
    token: str | None
    device: str  # a torch device
    gpu_id: int | None
    state_dir: Path
    data_dir: Path | None
    stopping: threading.Event = field(default_factory=threading.Event)
    task: TaskMessage | None = None
    progress: Progress | None = None
    dropped: bool = False
    is_masked: bool = False  # a stop signal waits

    def client(self, timeout: float = 30.0, retries: int = 3) -> ManagerClient:
        """A connection to the manager."""
        return ManagerClient(self.host, self.port, self.token, timeout, retries=retries)

    @property
    def spool_dir(self) -> Path:
        """Where results wait that the manager does not have yet."""
        return self.state_dir / "spool"


def worker_loop(
    manager: str = "127.0.0.1:5000",
    device: str = "auto",
    token_file: Path | None = None,
    state_dir: Path = Path(".fedsweep"),
    data_dir: Path | None = None,
    worker_id: str | None = None,
) -> int:
    """Run tasks until the manager says that all is done, or until SIGTERM; the exit status, 0.

    A manager that does not answer is not a manager that has nothing to do: the worker tries again until it answers,
    and takes no new task meanwhile. What it has computed waits in the spool.

    Raises:
        GpuUnavailable: the GPU that was asked for cannot be had.
        ProtocolError: the manager does not accept the token.
    """
    worker = _make_worker(manager, device, token_file, state_dir, data_dir, worker_id)
    log.info("worker %s on %s asks %s:%d", worker.worker_id, worker.device, worker.host, worker.port)
    prepare_torch()
    with _stop_signals(worker), worker.client() as client:
        try:
            _work(worker, client)
        except Preempted:
            log.info("asked to stop")
    return 0


def _make_worker(
    manager: str,
    device: str,
    token_file: Path | None,
    state_dir: Path,
    data_dir: Path | None,
    worker_id: str | None,
) -> Worker:
    host, _, port = manager.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--manager {manager}: expected HOST:PORT, as in 127.0.0.1:5000")
    torch_device, gpu_id = claim_device(device)
    return Worker(
        worker_id=worker_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
        host=host,
        port=int(port),
        token=_read_token(token_file or state_dir / "token"),
        device=torch_device,
        gpu_id=gpu_id,
        state_dir=state_dir,
        data_dir=data_dir,
    )


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        raise UsageError(f"no token in {path}; copy it from the manager's state directory and name it by --token-file")
    return token


def claim_device(device: str) -> tuple[str, int | None]:
    """Claim what `--device` asks for: the torch device, and the NVML index of the GPU (None on a CPU).

    Raises:
        GpuUnavailable: the GPU that was asked for cannot be had.
    """
    if device == "cpu":
        return "cpu", None
    if device == "auto":
        gpu_id = get_available_gpu()
        if gpu_id is None:
            log.info("no free GPU found: training on the CPU")
            return "cpu", None
    elif device.startswith("cuda:") and device.removeprefix("cuda:").isdigit():
        gpu_id = int(device.removeprefix("cuda:"))
        if gpu_id not in [gpu.index for gpu in list_gpus()] or not claim_gpu(gpu_id):
            raise GpuUnavailable(f"--device {device}: that GPU is not there, or another worker holds it")
    else:
        raise UsageError(f"--device {device}: expected auto, cpu or cuda:N")
    # CUDA is initialised at its first use, after this; the claimed GPU is then the only one and so number 0.
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu_id)
    return "cuda:0", gpu_id


@contextmanager
def _stop_signals(worker: Worker) -> Iterator[None]:
    """The first SIGTERM or SIGINT ends the worker in order; a second ends it at once.

    The handler raises in the main thread wherever it is, but for masked parts, so that also a long round is left
    within the grace.
    """

    def stop(_signal: int, _frame: FrameType | None) -> None:
        if worker.stopping.is_set():
            os._exit(1)
        worker.stopping.set()
        if not worker.is_masked:
            raise Preempted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _masked(worker: Worker) -> Iterator[None]:
    """A part that a stop signal does not interrupt; the signal takes effect at its end."""
    worker.is_masked = True
    try:
        yield
    finally:
        worker.is_masked = False
    if worker.stopping.is_set():
        raise Preempted


def _work(worker: Worker, client: ManagerClient) -> None:
    """Deliver what waits, ask, run; until all is done."""
    away_pause = FIRST_AWAY_PAUSE_S
    while True:
        reply = _ask(worker, client)
        if reply.kind == "unreachable":
            log.warning("the manager at %s:%d does not answer; trying again", worker.host, worker.port)
            worker.stopping.wait(away_pause)
            away_pause = min(2 * away_pause, LONGEST_AWAY_PAUSE_S)
            continue
        away_pause = FIRST_AWAY_PAUSE_S
        if reply.task is not None:
            run_task(worker, reply.task, client)
        elif reply.kind == "wait":
            worker.stopping.wait(reply.retry_after)
        else:
            log.info("all experiments are done")
            return


def _ask(worker: Worker, client: ManagerClient) -> TaskReply:
    """Ask for a task, once everything is delivered that waits."""
    if not deliver_spool(worker, client):
        return TaskReply("unreachable")
    kind = "cpu" if worker.gpu_id is None else "gpu"
    return request_task_from_manager(client, worker.worker_id, worker.gpu_id, kind, device_name(worker.device))


def deliver_spool(worker: Worker, client: ManagerClient) -> bool:
    """Deliver what lies in the spool; False where the manager is away."""
    for waiting in spool.pending(worker.spool_dir):
        try:
            delivered = submit_result_to_manager(
                client, waiting.task_id, worker.worker_id, waiting.result_data, waiting.attempt
            )
        except ProtocolError as error:
            if error.code == "unauthorized":
                raise
            # It stays on disk under another name: a manager with another ledger may have been asked.
            spool.set_aside(waiting.path, error)
            continue
        if not delivered:
            return False
        spool.remove(waiting)
    return True


def run_task(worker: Worker, task: TaskMessage, client: ManagerClient) -> bool:
    """Run a task and deliver its result; whether it has a result.

    What the experiment's code raises is reported as its failure. When the worker is asked to stop, the task is given
    back without blame.

    Raises:
        Preempted: the worker was asked to stop.
    """
    worker.task, worker.progress, worker.dropped = task, None, False
    try:
        with _task_log(task) as task_log, _heartbeats(worker, task):
            task_log.info("start %s attempt %s on %s: %s", task.task_id, task.attempt, worker.device, task.config)
            try:
                result = _run(worker, task, task_log)
            except Preempted:
                task_log.info("left: the worker was asked to stop")
                raise
            except Dropped as error:
                task_log.info("left: %s", error)
                return False
            except Exception as error:
                return _report_failure(worker, task, client, error, task_log)
            task_log.info("result: %s, test accuracy %s", result["outcome"], result["mean_test_acc"])
    except Preempted:
        log.info("%s is given back", task.task_id)
        with worker.client(timeout=RELEASE_GRACE_S, retries=0) as last_words:
            release_task(last_words, task.task_id, worker.worker_id, task.attempt)
        raise
    finally:
        worker.task = None
    with _masked(worker):
        spool.put(worker.spool_dir, task.task_id, task.attempt, result)
    deliver_spool(worker, client)
    return True


def _run(worker: Worker, task: TaskMessage, task_log: logging.Logger) -> dict[str, Any]:
    def on_round(progress: Progress) -> None:
        worker.progress = progress
        task_log.info(
            "round %d/%d: validation loss %s, accuracy %s",
            progress.round,
            progress.rounds,
            progress.val_loss,
            progress.val_acc,
        )
        if worker.dropped:
            raise Dropped

    result, history = run_single_experiment(
        task.config, task.seed, data_dir=worker.data_dir, device=worker.device, on_round=on_round
    )
    return {**result, "worker": worker.worker_id, "history": history}


def _report_failure(
    worker: Worker, task: TaskMessage, client: ManagerClient, error: Exception, task_log: logging.Logger
) -> bool:
    task_log.exception("failed")
    tail = traceback.format_exception(error)
    reason = str(error) if isinstance(error, FedsweepError) else "".join(tail).strip()
    log.warning("%s failed: %s", task.task_id, str(error).splitlines()[0] if str(error) else type(error).__name__)
    notify_task_failed(
        client, task.task_id, worker.worker_id, "\n".join(reason.splitlines()[-ERROR_LINES:]), task.attempt
    )
    return False


@contextmanager
def _task_log(task: TaskMessage) -> Iterator[logging.Logger]:
    """The experiment's own log file, `logs/{task_id}.log` in its output folder; a second attempt appends."""
    path = Path(task.output_dir) / "logs" / f"{task.task_id}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.Logger(task.task_id)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        handler.close()


@contextmanager
def _heartbeats(worker: Worker, task: TaskMessage) -> Iterator[None]:
    """Tell the manager from a thread, every `heartbeat_s`, that the worker lives and how far the task is."""
    ended = threading.Event()

    def beat() -> None:
        with worker.client(timeout=task.heartbeat_s + 5.0, retries=0) as client:
            while not ended.wait(task.heartbeat_s):
                _heartbeat(worker, task, client)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _heartbeat(worker: Worker, task: TaskMessage, client: ManagerClient) -> None:
    progress = worker.progress
    held: dict[str, Any] = {"task_id": task.task_id, "attempt": task.attempt}
    if progress is not None:
        held |= vars(progress)
    message = {"type": "heartbeat", "worker_id": worker.worker_id, "tasks": [held]}
    try:
        reply = client.ask(message)
    except (ManagerUnreachable, ProtocolError) as error:
        log.debug("heartbeat: %s", error)
        return
    if task.task_id in reply.get("drop", ()):
        worker.dropped = True
