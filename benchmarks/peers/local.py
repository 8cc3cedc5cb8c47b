"""A client's local epoch as fast as plain PyTorch does it for one client of one experiment at a time.

Images lie in memory as one tensor; a batch is one `index_select`. The forward pass calls `torch.nn.functional` on the
parameters, without going through modules. Gradients come from `torch.autograd.grad`, so there is nothing to zero; the
norm of all gradients is one foreach call, and clipping, weight decay, momentum and the step are one fused call. No
number is read back before the end of a round. What may be faster either way (float images or bytes that are
normalised batch by batch; channels-last or not) is decided by timing the first batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import modules
import torch
from torch import Tensor, nn
from torch.nn import functional
from workload import Settings, Work, Workload

TUNING_STEPS = 12


@dataclass(frozen=True)
class Choice:
    """What is decided by timing."""

    float_images: bool
    channels_last: bool

    @property
    def words(self) -> dict[str, str]:
        """For the report."""
        return {
            "images": "float32" if self.float_images else "uint8",
            "layout": "channels_last" if self.channels_last else "contiguous",
        }


class Local:
    """Trains one client at a time, always in the same tensors."""

    def __init__(self, settings: Settings, images: Tensor, choice: Choice) -> None:
        self.settings = settings
        self.choice = choice
        self.images = images  # float32 or uint8 [N, C, S, S]
        model = modules.build(settings)
        if choice.channels_last:
            model.to(memory_format=torch.channels_last)
        self._calls = [call for layer in model.layers if (call := _call(layer)) is not None]
        self._parameters = list(model.parameters())
        self._state = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        self.names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
        self.counters = [name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()]
        self._velocities = [torch.zeros_like(parameter) for parameter in self._parameters]

    def train(self, start: list[Tensor], batches: list[Tensor], labels: Tensor) -> list[Tensor]:
        """The weights (and running statistics) of a client that trains from `start` on the batches."""
        with torch.no_grad():
            torch._foreach_copy_(self._state, start)
            torch._foreach_zero_(self._velocities)
        for batch in batches:
            self._step(batch, labels)
        with torch.no_grad():
            return [tensor.clone() for tensor in self._state]

    def _step(self, batch: Tensor, labels: Tensor) -> None:
        hidden = self.images.index_select(0, batch)
        if not self.choice.float_images:
            hidden = modules.normalised(hidden)
        for call in self._calls:
            hidden = call(hidden)
        loss = functional.cross_entropy(hidden, labels.index_select(0, batch))
        gradients = torch.autograd.grad(loss, self._parameters)
        settings = self.settings
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._fused_sgd_(  # what torch.optim.SGD(fused=True) calls; it divides gradients by `grad_scale`
                self._parameters,
                list(gradients),
                self._velocities,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                lr=settings.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=norm.add_(1e-6).div_(settings.max_grad_norm).clamp_(min=1.0),
            )


def _call(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A layer as a function of its input alone."""
    if isinstance(layer, nn.Linear):
        weight, bias = layer.weight, layer.bias
        return lambda x: functional.linear(x, weight, bias)
    if isinstance(layer, nn.Conv2d):
        weight, bias = layer.weight, layer.bias
        return lambda x: torch.conv2d(x, weight, bias, padding=1)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        scale, shift, mean, var = layer.weight, layer.bias, layer.running_mean, layer.running_var
        return lambda x: torch.batch_norm(x, scale, shift, mean, var, True, 0.1, 1e-5, False)
    if isinstance(layer, nn.ReLU):
        return torch.relu_
    if isinstance(layer, nn.MaxPool2d):
        return lambda x: torch.max_pool2d(x, 2)
    return lambda x: x.flatten(1)


def prepare(workload: Workload) -> Local:
    """The fastest of the candidates on the first batches of the workload."""
    settings = workload.settings
    data = torch.from_numpy(workload.images)
    as_floats = modules.normalised(data)
    layouts = (False, True) if settings.model_type == "cnn" else (False,)
    candidates = [Choice(*each) for each in product((True, False), layouts)]
    locals_ = [Local(settings, as_floats if each.float_images else data, each) for each in candidates]
    work = max(workload.works(0, 0), key=lambda each: len(each.order))
    batches = batches_of(work, settings)[:TUNING_STEPS]
    labels = torch.from_numpy(workload.labels[0]).long()
    return min(locals_, key=lambda local: _seconds(local, workload, batches, labels))


def _seconds(local: Local, workload: Workload, batches: list[Tensor], labels: Tensor) -> float:
    start = start_of(local, workload, 0)
    local.train(start, batches, labels)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        local.train(start, batches, labels)
        times.append(time.perf_counter() - begin)
    return min(times)


def batches_of(work: Work, settings: Settings) -> list[Tensor]:
    """The batches of a local epoch as tensors of positions."""
    return [torch.from_numpy(batch) for batch in work.batches(settings.batch_size)]


def start_of(local: Local, workload: Workload, experiment: int) -> list[Tensor]:
    """The initial weights of an experiment, in the order of `Local.names`."""
    initial = modules.tensors(workload.initial[workload.members[experiment].group])
    return [initial[name] for name in local.names]


def state_of(local: Local, weights: list[Tensor], steps: int) -> Mapping[str, Tensor]:
    """Weights as a state dict."""
    return dict(zip(local.names, weights, strict=True)) | {name: torch.tensor(steps) for name in local.counters}
