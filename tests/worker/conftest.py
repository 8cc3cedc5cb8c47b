"""A machine with GPUs that are not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsweep.fl import candidates
from fedsweep.fl.loop import LoopTrainer
from fedsweep.worker import plans

FAKE_NVML = """\
import os
class NVMLError(Exception): pass
class Memory:
    def __init__(self, free): self.free, self.total, self.used = free, 80 * 2**30, 80 * 2**30 - free
def free():
    text = os.environ.get("FAKE_GPU_GB")
    if text is None: raise NVMLError("driver not loaded")
    return text.split(",")
def nvmlInit(): free()
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): return len(free())
def nvmlDeviceGetHandleByIndex(index):
    if free()[index] == "lost": raise NVMLError("GPU is lost")
    return index
def nvmlDeviceGetUUID(index): return f"GPU-{index}{index}aa-bb"
def nvmlDeviceGetMemoryInfo(index): return Memory(int(float(free()[index]) * 2**30))
"""


@pytest.fixture
def fake_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs with 10 GB free, for this process and those that it starts; FAKE_GPU_GB says otherwise."""
    folder = tmp_path / "nvml"
    folder.mkdir()
    (folder / "pynvml.py").write_text(FAKE_NVML)
    monkeypatch.setenv("FAKE_GPU_GB", "10,10")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


@pytest.fixture
def plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other trainer than the plain loop."""

    def loop(example: Any, data: Any, threads: int, *_: object) -> dict[str, Any]:
        return {"loop": lambda: LoopTrainer(example, data, threads)}

    monkeypatch.setattr(candidates, "candidates", loop)


@pytest.fixture(autouse=True)
def own_choices(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of plans are not those of this machine's user, nor kept for it."""
    monkeypatch.setattr(plans, "default_cache_dir", lambda: tmp_path_factory.getbasetemp() / "choices")
