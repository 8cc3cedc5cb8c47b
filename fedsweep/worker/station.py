"""What a worker is: its name, its device, its line to the manager, and where it keeps things."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedsweep.worker.client import ManagerClient, TaskReply, request_task_from_manager
from fedsweep.worker.device import CPU, Device, device_name
from fedsweep.worker.stopping import StopSignals

CHECKPOINT_S = 300.0


@dataclass
class Station:
    """A worker at work."""

    client: ManagerClient
    worker_id: str
    spool_dir: Path
    device: Device = CPU
    data_dir: str | Path | None = None
    stop: StopSignals = field(default_factory=StopSignals)
    threads: int = 1  # that train, on a CPU
    checkpoint_dir: Path | None = None  # None: no checkpoints
    checkpoint_s: float = CHECKPOINT_S  # between two checkpoints of an experiment
    clock: Callable[[], float] = time.monotonic
    causes: dict[str, str] = field(default_factory=dict)  # of failures: group -> the task that was told of in full

    @property
    def device_name(self) -> str:
        """The name of its device, for people."""
        return device_name(self.device.torch_name)

    def request(self, max_tasks: int, cohort: str | None = None) -> TaskReply:
        """Ask for so many tasks, of any cohort or of one.

        Raises:
            ProtocolError: the manager refused the request.
        """
        return request_task_from_manager(
            self.client,
            self.worker_id,
            self.device.gpu_id,
            self.device.kind,
            self.device_name,
            max_tasks=max_tasks,
            cohort=cohort,
        )
