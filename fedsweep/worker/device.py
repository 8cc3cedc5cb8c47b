"""The device of a worker, and how torch is set up so that rows repeat."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsweep.errors import UsageError
from fedsweep.worker.gpu import (
    LOCK_DIR,
    GpuUnavailable,
    claim_gpu,
    get_available_gpu,
    list_gpus,
    release_gpu_lock,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """Where a worker trains."""

    torch_name: str  # as torch knows it
    gpu_id: int | None = None  # as NVML knows it; None on a CPU

    @property
    def kind(self) -> str:
        """`gpu` or `cpu`."""
        return "cpu" if self.gpu_id is None else "gpu"

    def release(self) -> None:
        """Give the GPU back."""
        if self.gpu_id is not None:
            release_gpu_lock(self.gpu_id)


CPU = Device("cpu")


def claim_device(device: str = "auto", lock_dir: str | Path = LOCK_DIR) -> Device:
    """Claim what `--device` asks for: `auto` (a free GPU, else the CPU), `cpu`, or `cuda:N`, N as `nvidia-smi` counts.

    The claimed GPU is the only one that CUDA sees from then on, and so its number 0.

    Raises:
        GpuUnavailable: the GPU that was asked for cannot be had; the message says why.
        UsageError: the device is none of these.
    """
    if device == "cpu":
        return CPU
    if device == "auto":
        return _free_gpu_or_cpu(lock_dir)
    number = device.removeprefix("cuda:")
    if number == device or not number.isdecimal():
        raise UsageError(f"--device {device}: expected auto, cpu or cuda:N")
    gpus = {gpu.index: gpu for gpu in list_gpus()}
    if int(number) not in gpus:
        there = ", ".join(f"cuda:{index}" for index in gpus) or "none"
        raise GpuUnavailable(f"--device {device}: no such GPU is visible here (there: {there})")
    claim_gpu(gpus[int(number)], lock_dir)
    return _only_visible(int(number))


def _free_gpu_or_cpu(lock_dir: str | Path) -> Device:
    gpu_id = get_available_gpu(lock_dir)
    if gpu_id is None:
        log.info("no free GPU found; training on the CPU")
        return CPU
    try:
        return _only_visible(gpu_id)
    except GpuUnavailable as error:
        log.warning("%s; training on the CPU", error)
        return CPU


def _only_visible(gpu_id: int) -> Device:
    """Make a claimed GPU the only one that CUDA sees, which works before CUDA's first use only."""
    visible_before = os.environ.get("CUDA_VISIBLE_DEVICES")
    # By its UUID, since CUDA's own numbers follow another order than NVML's unless told otherwise.
    os.environ["CUDA_VISIBLE_DEVICES"] = next(gpu.uuid for gpu in list_gpus() if gpu.index == gpu_id)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may sum in any order
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if torch.cuda.device_count() == 1 and not in_use:
        return Device("cuda:0", gpu_id)
    if visible_before is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_before
    release_gpu_lock(gpu_id)
    if in_use:
        raise GpuUnavailable(f"GPU {gpu_id}: this process uses CUDA already; start the worker in one of its own")
    raise GpuUnavailable(f"GPU {gpu_id} is there, but torch {torch.__version__} cannot use it")


def device_name(torch_name: str) -> str:
    """What a row says about where it was computed: `cpu`, or the name of the GPU."""
    return torch.cuda.get_device_name(torch_name) if torch_name.startswith("cuda") else torch_name


def prepare_torch() -> None:
    """Settings under which rows repeat: one thread on the CPU, since the order of a sum depends on their number."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
