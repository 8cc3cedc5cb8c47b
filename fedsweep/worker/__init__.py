"""Where experiments run: finding a device, asking for tasks, training, delivering results."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Each name and the module that has it; loaded when first used, so that importing this package does not load torch.
_HOMES = {
    "get_available_gpu": "gpu",
    "release_gpu_lock": "gpu",
    "request_task_from_manager": "client",
    "notify_task_complete": "client",
    "notify_task_failed": "client",
    "submit_result_to_manager": "client",
    "create_model": "runner",
    "train_client_worker": "runner",
    "run_single_experiment": "runner",
    "run_task": "task",
    "worker_loop": "worker",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
