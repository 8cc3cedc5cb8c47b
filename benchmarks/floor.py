"""The floor: the least time in which this machine could train a workload, from counted work and measured peaks.

Counted are the multiply-adds of every linear layer and convolution (forward, gradient of the weights, gradient of the
input except in the first layer) and the bytes that no program can avoid: images once for all experiments that share
them, labels, and each client's weights in and out. Elementwise work (batch norm, ReLU, pooling, the optimiser) is taken
to be free, and activations to stay in the cache, so nothing gets below the floor, and where layers are narrow nothing
gets near it. `streamed_bytes` says what it would be if every activation and its gradient went to memory and back once.

Peaks: a large float32 matrix product, a large convolution, a large copy, each by one process with all threads and by
one process for each core; the better counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peers.workload import Settings, Workload


@dataclass(frozen=True)
class Counted:
    """What is to be done."""

    linear_macs: float
    conv_macs: float
    bytes: float
    streamed_bytes: float


@dataclass(frozen=True)
class Peaks:
    """What the machine does in a second at best."""

    matmul_macs: float
    conv_macs: float
    copy_bytes: float  # read and written


def floor_seconds(counted: Counted, peaks: Peaks) -> tuple[float, float]:
    """The least time, and the least time if activations went through memory."""
    arithmetic = counted.linear_macs / peaks.matmul_macs + counted.conv_macs / peaks.conv_macs
    streamed = counted.bytes + counted.streamed_bytes
    return max(arithmetic, counted.bytes / peaks.copy_bytes), max(arithmetic, streamed / peaks.copy_bytes)


def count(workload: Workload, experiments: Sequence[int], rounds: int) -> Counted:
    """The work of these experiments."""
    settings = workload.settings
    layers = _layers(settings)
    numbers = sum(layer.weights for layer in layers)
    samples = clients = steps = shared_samples = 0
    seen = set()
    for index in experiments:
        group = workload.members[index].group
        for number in range(rounds):
            for work in workload.works(index, number):
                batches = work.batches(settings.batch_size)
                own = sum(map(len, batches))
                samples, clients, steps = samples + own, clients + 1, steps + len(batches)
                shared_samples += 0 if (group, number) in seen else own
            seen.add((group, number))
    image = settings.in_channels * settings.img_size**2
    activations = sum(layer.outputs for layer in layers)
    return Counted(
        linear_macs=samples * sum(layer.training_macs for layer in layers if not layer.is_conv),
        conv_macs=samples * sum(layer.training_macs for layer in layers if layer.is_conv),
        bytes=shared_samples * image + samples + clients * numbers * 4 * 2,
        streamed_bytes=samples * 4 * (image + 4 * activations) + steps * numbers * 4 * 4,
    )


@dataclass(frozen=True)
class _Layer:
    macs: int  # forward, one sample
    weights: int
    outputs: int  # values that go out of it and of the batch norm behind it, one sample
    is_conv: bool
    is_first: bool

    @property
    def training_macs(self) -> int:
        return self.macs * (2 if self.is_first else 3)


def _layers(settings: Settings) -> list[_Layer]:
    width, layers = settings.width, []
    side = settings.img_size
    inputs = settings.in_channels if settings.model_type == "cnn" else settings.in_channels * side * side
    for block in range(1, settings.depth + 1):
        if settings.model_type == "cnn":
            weights, places = inputs * 9 * width, side * side
        else:
            weights, places = inputs * width, 1
        is_conv = settings.model_type == "cnn"
        layers.append(_Layer(weights * places, weights + 5 * width, 2 * width * places, is_conv, block == 1))
        inputs = width
        if is_conv and block % 2 == 0 and side > 1:
            side //= 2
    inputs *= side * side if settings.model_type == "cnn" and settings.depth else 1
    last = inputs * settings.num_classes
    return [*layers, _Layer(last, last + settings.num_classes, settings.num_classes, False, not layers)]


# ---- peaks -----------------------------------------------------------------------------------------------------------


def measure(cores: int) -> Peaks:
    """The peaks of this machine; takes some seconds."""
    return Peaks(*(max(_rate(kernel, 1, cores), _rate(kernel, cores, 1)) for kernel in KERNELS))


def _rate(kernel: str, processes: int, threads: int) -> float:
    command = [sys.executable, __file__, "--kernel", kernel, "--threads", str(threads)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def _matmul() -> tuple[Callable[[], object], float]:
    import torch

    left, right = torch.randn(1536, 1536), torch.randn(1536, 1536)
    out = torch.empty(1536, 1536)
    return lambda: torch.mm(left, right, out=out), 1536.0**3


def _conv() -> tuple[Callable[[], object], float]:
    import torch

    images = torch.randn(64, 64, 28, 28).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
    return lambda: torch.conv2d(images, weight, padding=1), 64.0 * 28 * 28 * 64 * 64 * 9


def _copy() -> tuple[Callable[[], object], float]:
    import torch

    source, target = torch.ones(2**25), torch.empty(2**25)
    return lambda: target.copy_(source), 2.0 * 2**27


KERNELS = {"matmul": _matmul, "conv": _conv, "copy": _copy}


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kernel", choices=KERNELS)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    import torch

    torch.set_num_threads(given.threads)
    run, work = KERNELS[given.kernel]()
    run()
    with torch.inference_mode():
        begin, times = time.perf_counter(), 0
        while time.perf_counter() - begin < 1.0:
            run()
            times += 1
    print(work * times / (time.perf_counter() - begin))


if __name__ == "__main__":
    _main()
