"""A client's local epoch as fast as plain PyTorch does it for one client of one experiment at a time.

Images lie in memory as one tensor; a batch is one `index_select`. The forward pass calls `torch.nn.functional` on the
parameters, without going through modules. All weights are parts of one row, and so are all gradients, which come from
`torch.autograd.grad`, so there is nothing to zero: norm, clipping and the fused step are a call each. No number is read
back before the end of a round. What may be faster either way (float images or bytes that are normalised batch by batch;
channels-last or not) is decided by timing the first batches. (`torch.compile` was tried: on a narrow model its code was
slower than this, after twenty seconds of compilation.)
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
        self.model = modules.build(settings)
        if choice.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self._parameters = list(self.model.parameters())
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        self.flat = _into_one(self._parameters + statistics)
        self._weights = self.flat[: sum(parameter.numel() for parameter in self._parameters)]
        self._velocity = torch.zeros_like(self._weights)
        self._calls = [_call(layer) for layer in self.model.layers]

    def train(self, start: Tensor, batches: list[Tensor], labels: Tensor) -> Tensor:
        """The weights and running statistics of a client that trains from `start` on the batches, as one row."""
        self.flat.copy_(start)
        self._velocity.zero_()
        for batch in batches:
            self._step(batch, labels)
        return self.flat.clone()

    def _step(self, batch: Tensor, labels: Tensor) -> None:
        hidden = self.images.index_select(0, batch)
        if not self.choice.float_images:
            hidden = modules.normalised(hidden)
        for call in self._calls:
            hidden = call(hidden)
        loss = functional.cross_entropy(hidden, labels.index_select(0, batch))
        gradient = torch.cat([_as_row(each) for each in torch.autograd.grad(loss, self._parameters)])
        settings = self.settings
        gradient.mul_((settings.max_grad_norm / gradient.norm().add_(1e-6)).clamp_(max=1.0))
        torch._fused_sgd_(  # what torch.optim.SGD(fused=True) calls
            [self._weights],
            [gradient],
            [self._velocity],
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            lr=settings.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    def row_of(self, state: Mapping[str, Tensor]) -> Tensor:
        """A state dict as a row of weights and running statistics."""
        self.model.load_state_dict(state)
        return self.flat.clone()

    def state_of(self, row: Tensor, steps: int) -> dict[str, Tensor]:
        """A row as a state dict of tensors of its own, with `steps` as the count of batches."""
        self.flat.copy_(row)
        state = self.model.state_dict()
        return {
            name: tensor.contiguous().clone() if tensor.is_floating_point() else torch.tensor(steps)
            for name, tensor in state.items()
        }


def _as_row(tensor: Tensor) -> Tensor:
    """All values; those of a convolution channel by channel last, in which order it is laid out or not."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).reshape(-1)


def _into_one(tensors: list[Tensor]) -> Tensor:
    """Make the tensors parts of one row, each in the layout that it had."""
    flat = torch.cat([_as_row(tensor.detach()) for tensor in tensors])
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        if tensor.dim() == 4:
            out, channels, height, width = tensor.shape
            tensor.data = part.view(out, height, width, channels).permute(0, 3, 1, 2)
        else:
            tensor.data = part.view(tensor.shape)
    return flat


def _call(layer: nn.Module) -> Callable[[Tensor], Tensor]:
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


def start_of(local: Local, workload: Workload, experiment: int) -> Tensor:
    """The initial weights of an experiment, as a row."""
    return local.row_of(modules.tensors(workload.initial[workload.members[experiment].group]))
