"""Which device a worker gets, and how CUDA is kept to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedsweep.errors import UsageError
from fedsweep.worker import gpu
from fedsweep.worker.device import CPU, Device, claim_device, device_name
from fedsweep.worker.gpu import GpuUnavailable, claim_gpu, list_gpus


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test claims is released, and what it tells CUDA forgotten."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    yield
    gpu._release_all()


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


def test_the_cpu_claims_nothing(fake_nvml, locks):
    assert claim_device("cpu", locks) == CPU == Device("cpu", None)
    assert CPU.kind == device_name("cpu") == "cpu"
    assert not locks.exists()
    CPU.release()


def test_auto_claims_a_free_gpu_and_shows_cuda_no_other(fake_nvml, locks):
    claim_gpu(list_gpus()[0], locks)
    device = claim_device("auto", locks)
    assert device == Device("cuda:0", 1)
    assert device.kind == "gpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-11aa-bb"
    assert (locks / "gpu_1.lock").read_text() == str(os.getpid())
    device.release()
    assert (locks / "gpu_1.lock").read_text() == ""


def test_auto_without_a_gpu_says_once_that_it_trains_on_the_cpu(fake_nvml, monkeypatch, locks, caplog):
    monkeypatch.delenv("FAKE_GPU_GB")
    caplog.set_level(logging.INFO)
    assert claim_device("auto", locks) == CPU
    assert caplog.messages == ["no free GPU found; training on the CPU"]


def test_a_gpu_that_is_named_is_claimed_and_no_other(fake_nvml, monkeypatch, locks):
    assert claim_device("cuda:1", locks) == Device("cuda:0", 1)
    assert not (locks / "gpu_0.lock").exists()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(GpuUnavailable, match=f"GPU 1 is held by another worker, process {os.getpid()}"):
        claim_device("cuda:1", locks)
    assert not (locks / "gpu_0.lock").exists()


@pytest.mark.parametrize(
    ("free", "visible", "message"),
    [
        ("10", None, r"--device cuda:1: no such GPU is visible here \(there: cuda:0\)"),
        ("10,10", "0", r"--device cuda:1: no such GPU is visible here \(there: cuda:0\)"),
        ("10,10", "", r"--device cuda:1: no such GPU is visible here \(there: none\)"),
        ("10,3", None, r"GPU 1 has 3.0 GB free; a worker needs 4 GB"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_an_error_with_the_reason(fake_nvml, monkeypatch, locks, free, visible, message):
    monkeypatch.setenv("FAKE_GPU_GB", free)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(GpuUnavailable, match=message) as raised:
        claim_device("cuda:1", locks)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("device", ["cuda", "cuda:", "cuda:x", "cuda:-1", "gpu", "", "CPU"])
def test_a_device_of_another_name_is_refused(device):
    with pytest.raises(UsageError, match="expected auto, cpu or cuda:N"):
        claim_device(device)


def test_a_torch_that_cannot_use_the_gpu_gives_it_back(fake_nvml, monkeypatch, locks, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(GpuUnavailable, match=r"GPU 0 is there, but torch .* cannot use it"):
        claim_device("cuda:0", locks)
    assert claim_device("auto", locks) == CPU
    assert "cannot use it; training on the CPU" in caplog.text
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert (locks / "gpu_0.lock").read_text() == ""


def test_a_process_that_uses_cuda_already_cannot_be_kept_to_one_gpu(fake_nvml, monkeypatch, locks):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(GpuUnavailable, match="this process uses CUDA already"):
        claim_device("cuda:0", locks)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,0"
