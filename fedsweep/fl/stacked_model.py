"""A model stacked along lanes: the layers of `fl.models` for many weights at once, in plain PyTorch.

A *tile* has a fixed number of places T = G · X: G works (clients whose images are gathered once), with X lanes each.
Until the first layer with weights activations are one for each work, and that layer is one dense product or convolution
with the output channels of the X lanes side by side; from then on activations are one for each lane.

Nothing is summed over lanes, and every sum runs over numbers whose places in memory, seen from their lane, are the
same for every lane: so a lane's bits do not depend on its place in the tile, nor on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsweep.fl.lanes import ModelShape

Kernel = Literal["grouped", "unfold"]

MOMENTUM, EPSILON = 0.1, 1e-5  # of batch norm: PyTorch's own
ALIGNMENT = 16  # numbers; 64 bytes of float32


class Packing:
    """The trainable tensors of a model side by side in rows of Q numbers, each from a multiple of 64 bytes on.

    The numbers between are zero and stay so.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        trainable = {name for name, _ in shape.build().named_parameters()}
        self._shapes: dict[str, torch.Size] = {}
        self._parts: list[int] = []  # sizes of a tensor, of the gap after it, of the next tensor, …
        self._stats: dict[str, slice] = {}
        columns, places, column = [], [], 0
        layout = shape.layout
        for name, tensor_shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
            if name in trainable:
                columns.append(torch.arange(column, column + size))
                places.append(torch.arange(size) + sum(self._parts))
                self._shapes[name] = tensor_shape
                self._parts += [size, -size % ALIGNMENT]
            else:
                self._stats[name] = slice(column, column + size)
            column += size
        self._columns, self._places = torch.cat(columns).to(device), torch.cat(places).to(device)
        self.size = sum(self._parts)  # Q

    def pack(self, rows: Tensor) -> Tensor:
        """The trainable numbers of rows [T, P] as [T, Q]."""
        packed = rows.new_zeros(len(rows), self.size)
        return packed.index_copy_(1, self._places, rows.index_select(1, self._columns))

    def stats(self, rows: Tensor) -> dict[str, Tensor]:
        """The running statistics of batch norm, [T, w] each."""
        return {name: rows[:, columns].contiguous() for name, columns in self._stats.items()}

    def tensors(self, packed: Tensor) -> dict[str, Tensor]:
        """The tensors of packed rows [T, Q], as views [T, *shape]."""
        parts = torch.split(packed, self._parts, dim=1)[::2]
        return {
            name: part.view(len(packed), *shape)
            for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)
        }

    def rows(self, packed: Tensor, stats: Mapping[str, Tensor]) -> Tensor:
        """What `pack` and `stats` took apart, as rows [T, P]."""
        size = len(self._columns) + sum(columns.stop - columns.start for columns in self._stats.values())
        rows = packed.new_empty(len(packed), size)
        rows.index_copy_(1, self._columns, packed.index_select(1, self._places))
        for name, columns in self._stats.items():
            rows[:, columns] = stats[name]
        return rows


@dataclass(frozen=True)
class Mask:
    """Which samples of a padded batch are real."""

    samples: Tensor  # floating [T, B], 1 for a real sample and 0 for padding
    counts: Tensor  # floating [T], real samples
    active: Tensor  # bool [T, 1], whether there are any


class _Layout(Protocol):
    """How the activations of a convolution lie in memory."""

    def enter(self, images: Tensor) -> Tensor:
        """Images [G, B, C, S, S] as activations of G works."""

    def convolve(self, activations: Tensor, weight: Tensor) -> Tensor:
        """3x3 convolution of the activations of G works or T lanes with weights [T, w, C, 3, 3], without bias."""

    def pool(self, activations: Tensor) -> Tensor:
        """2x2 max-pool."""

    def channels(self, activations: Tensor) -> Tensor:
        """A view whose axis 1 is that of all channels of all lanes, for PyTorch's own batch norm."""

    def by_lane(self, activations: Tensor, lanes: int) -> Tensor:
        """A view [T, C, B, H·W]."""

    def from_lanes(self, by_lane: Tensor, like: Tensor) -> Tensor:
        """What `by_lane` gave, as activations again."""

    def flatten(self, activations: Tensor, lanes: int) -> Tensor:
        """Features [T, C·H·W, B]."""


class FeatureMajor:
    """Activations [N, C, B, …]: a feature's numbers side by side. Convolutions are im2col and a batched product."""

    def enter(self, images: Tensor) -> Tensor:
        """See `_Layout`."""
        return images.transpose(1, 2)

    def convolve(self, activations: Tensor, weight: Tensor) -> Tensor:
        """See `_Layout`."""
        lanes, width = weight.shape[:2]
        by_work = weight.reshape(len(activations), -1, *weight.shape[2:])  # [N, T / N · w, C, 3, 3]
        output: Tensor = _UnfoldedConvolution.apply(activations, by_work)  # type: ignore[no-untyped-call]
        return output.view(lanes, width, *output.shape[2:])

    def pool(self, activations: Tensor) -> Tensor:
        """See `_Layout`."""
        pooled = functional.max_pool2d(activations.flatten(0, 1), 2)
        return pooled.view(*activations.shape[:3], *pooled.shape[2:])

    def channels(self, activations: Tensor) -> Tensor:
        """See `_Layout`."""
        return activations.reshape(1, activations.shape[0] * activations.shape[1], -1)

    def by_lane(self, activations: Tensor, lanes: int) -> Tensor:
        """See `_Layout`."""
        return activations.reshape(*activations.shape[:3], -1)

    def from_lanes(self, by_lane: Tensor, like: Tensor) -> Tensor:
        """See `_Layout`."""
        return by_lane.view(like.shape)

    def flatten(self, activations: Tensor, lanes: int) -> Tensor:
        """See `_Layout`."""
        return activations.permute(0, 1, 3, 4, 2).flatten(1, 3)


class ChannelStacked:
    """Activations [B, N·C, H, W]: the channels of all lanes side by side. Convolutions are grouped."""

    def __init__(self, channels_last: bool) -> None:
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def enter(self, images: Tensor) -> Tensor:
        """See `_Layout`."""
        return images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=self._format)

    def convolve(self, activations: Tensor, weight: Tensor) -> Tensor:
        """See `_Layout`."""
        groups = activations.shape[1] // weight.shape[2]
        return functional.conv2d(activations, weight.flatten(0, 1), padding=1, groups=groups)

    def pool(self, activations: Tensor) -> Tensor:
        """See `_Layout`."""
        return functional.max_pool2d(activations, 2)

    def channels(self, activations: Tensor) -> Tensor:
        """See `_Layout`."""
        return activations

    def by_lane(self, activations: Tensor, lanes: int) -> Tensor:
        """See `_Layout`."""
        batch, channels = activations.shape[:2]
        return activations.reshape(batch, lanes, channels // lanes, -1).permute(1, 2, 0, 3)

    def from_lanes(self, by_lane: Tensor, like: Tensor) -> Tensor:
        """See `_Layout`."""
        return by_lane.permute(2, 0, 1, 3).reshape(like.shape)

    def flatten(self, activations: Tensor, lanes: int) -> Tensor:
        """See `_Layout`."""
        return activations.reshape(len(activations), lanes, -1).permute(1, 2, 0)


class StackedModel:
    """The layers of one shape of model, for tiles of G works with X lanes each.

    Args:
        shape: of the model.
        works: G.
        lanes: X.
        kernel: how to convolve.
        channels_last: how activations of the grouped kernel lie in memory.
    """

    def __init__(self, shape: ModelShape, works: int, lanes: int, kernel: Kernel, channels_last: bool = True) -> None:
        self.shape = shape
        self.works = works
        self.lanes = lanes
        self._layers = [(name, layer) for name, layer in shape.build().named_modules() if not list(layer.children())]
        self._features = FeatureMajor()
        self._maps: _Layout = ChannelStacked(channels_last) if kernel == "grouped" else self._features

    @property
    def places(self) -> int:
        """T."""
        return self.works * self.lanes

    def logits(
        self,
        weights: Mapping[str, Tensor],
        stats: Mapping[str, Tensor],
        images: Tensor,
        *,
        training: bool,
        mask: Mask | None = None,
    ) -> Tensor:
        """Logits [T, L, B] of images [G, B, C, S, S].

        Args:
            weights: [T, *shape] each.
            stats: [T, w] each. In training they are updated in place, for active lanes.
            images: floating.
            training: whether batch norm uses the statistics of the batch.
            mask: which samples count; in training only. None: all.
        """
        x = images
        missing: Tensor | float = 0.0
        for name, layer in self._layers:
            if isinstance(layer, nn.Flatten):
                x = images.flatten(2).transpose(1, 2) if x is images else self._maps.flatten(x, self.places)
            elif isinstance(layer, nn.Linear):
                x = self._linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
            elif isinstance(layer, nn.Conv2d):
                x = self._maps.convolve(self._maps.enter(x) if x is images else x, weights[f"{name}.weight"])
                missing = weights[f"{name}.bias"].detach()  # batch norm takes it out again: only its mean sees it
            elif isinstance(layer, nn.ReLU):
                x = functional.relu_(x)
            elif isinstance(layer, nn.MaxPool2d):
                x = self._maps.pool(x)
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layout = self._maps if isinstance(layer, nn.BatchNorm2d) else self._features
                norm = _Norm(
                    scale=weights[f"{name}.weight"],
                    shift=weights[f"{name}.bias"],
                    mean=stats[f"{name}.running_mean"],
                    variance=stats[f"{name}.running_var"],
                    missing=missing,
                )
                if mask is None:
                    x = _own_batch_norm(layout, norm, x, training=training)
                else:
                    x = _normalise(layout, norm, x, mask)
        return x

    def _linear(self, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Features [N, F, B] of G works or T lanes times weights [T, w, F], plus bias [T, w]: [T, w, B]."""
        if len(features) == self.places:
            return torch.baddbmm(bias[..., None], weight, features)
        shared = torch.bmm(weight.reshape(len(features), -1, weight.shape[2]), features)
        return shared.view(*bias.shape, -1) + bias[..., None]


@dataclass(frozen=True)
class _Norm:
    """A batch norm's tensors, [T, C] each."""

    scale: Tensor
    shift: Tensor
    mean: Tensor  # running, as is the next
    variance: Tensor
    missing: Tensor | float  # the bias that the layer before has left out


def _own_batch_norm(layout: _Layout, norm: _Norm, x: Tensor, *, training: bool) -> Tensor:
    """PyTorch's batch norm, with every channel of every lane a channel. In training the running statistics change."""
    mean = norm.mean - norm.missing
    output: Tensor = functional.batch_norm(
        layout.channels(x),
        mean.view(-1),
        norm.variance.view(-1),
        norm.scale.reshape(-1),
        norm.shift.reshape(-1),
        training=training,
        momentum=MOMENTUM,
        eps=EPSILON,
    )
    if training:
        norm.mean.copy_(mean + norm.missing)
    return output.view(x.shape)


def _normalise(layout: _Layout, norm: _Norm, x: Tensor, mask: Mask) -> Tensor:
    """Batch norm by the statistics of the real samples of a batch; the running ones of active lanes change."""
    by_lane = layout.by_lane(x, len(norm.mean))
    numbers = mask.counts[:, None] * by_lane.shape[3]  # [T, 1]: of each channel
    output, mean, variance = _MaskedBatchNorm.apply(  # type: ignore[no-untyped-call]
        by_lane, mask.samples[:, None, :, None], numbers.clamp(min=1)[..., None, None], norm.scale, norm.shift
    )
    unbiased = variance * (numbers / (numbers - 1).clamp(min=1))
    for running, now in ((norm.mean, mean + norm.missing), (norm.variance, unbiased)):
        running.copy_(torch.where(mask.active, running * (1 - MOMENTUM) + now * MOMENTUM, running))
    return layout.from_lanes(output, x)


class _MaskedBatchNorm(torch.autograd.Function):
    """Batch norm of x [T, C, B, S] over the real samples; gives also their mean and biased variance, [T, C]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, samples: Tensor, numbers: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, shift = scale[..., None, None], shift[..., None, None]
        mean = (x * samples).sum((2, 3), keepdim=True) / numbers
        centred = x - mean
        variance = (centred.square() * samples).sum((2, 3), keepdim=True) / numbers
        inverse = (variance + EPSILON).rsqrt()
        normal = centred.mul_(inverse)
        ctx.save_for_backward(normal, samples, numbers, scale * inverse)
        mean, variance = mean.flatten(1), variance.flatten(1)
        ctx.mark_non_differentiable(mean, variance)
        return normal * scale + shift, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normal, samples, numbers, factor = ctx.saved_tensors
        gradient = torch.empty_like(normal).copy_(gradients[0])  # laid out as it was forward; zero where padded
        by_shift = gradient.sum((2, 3), keepdim=True)
        by_scale = (gradient * normal).sum((2, 3), keepdim=True)
        by_x = factor * (gradient - samples * ((by_shift + normal * by_scale) / numbers))
        return by_x, None, None, by_scale.flatten(1), by_shift.flatten(1)


class _UnfoldedConvolution(torch.autograd.Function):
    """3x3 convolution, padding 1, of x [N, C, B, H, W] with weights [N, w, C, 3, 3]: [N, w, B, H, W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(weight, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        by_output = gradient.flatten(2)  # [N, w, B·H·W]
        by_weight = torch.bmm(by_output, _windows(x).to(gradient.dtype).transpose(1, 2)).view(weight.shape)
        # By the input: the convolution of the gradient with the kernels turned by half a turn.
        turned = weight.flip(-1, -2).transpose(1, 2)
        by_x = _product(turned.to(gradient.dtype), gradient) if ctx.needs_input_grad[0] else None
        return by_x, by_weight


def _product(weight: Tensor, x: Tensor) -> Tensor:
    output = torch.bmm(weight.flatten(2), _windows(x))
    return output.view(*weight.shape[:2], *x.shape[2:])


def _windows(x: Tensor) -> Tensor:
    """The 3x3 surroundings of every pixel of x [N, C, B, H, W], as [N, C·9, B·H·W]."""
    windows = functional.pad(x, (1, 1, 1, 1)).unfold(3, 3, 1).unfold(4, 3, 1)  # [N, C, B, H, W, 3, 3]
    size = math.prod(x.shape[2:])
    return windows.permute(0, 1, 5, 6, 2, 3, 4).reshape(len(x), -1, size)
