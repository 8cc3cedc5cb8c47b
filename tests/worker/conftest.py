"""A machine with GPUs that are not there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

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
