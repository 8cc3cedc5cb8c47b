"""P4: naive `torch.func.vmap` over lanes, a lane being one client of one experiment.

`vmap(grad(loss))` with `functional_call` of one module, on stacked parameters. Lanes are sorted by their number of
steps, so that those which have ended are left out; a lane's smaller last batch is padded, and a mask keeps the padding
out of batch norm's statistics and of the loss. `nn.BatchNorm` cannot change its running statistics in place under
vmap, so the module's own batch norm returns the mean and variance of the batch, from which they are updated outside.
How many lanes are trained at a time is chosen by timing, below a fixed size of all activations. Every lane gathers its
own images.
"""

from __future__ import annotations

import time

import modules
import running
import torch
import workload as workloads
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from workload import Settings, Workload

LANES = (16, 64, 256)
MOST_BYTES = 512e6  # of one copy of all activations of the lanes that are trained at a time


class MaskedNorm(nn.Module):
    """Batch norm over the samples of a mask; gives the statistics of the batch besides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shape = (1, -1, *[1] * (x.dim() - 2))
        over = (0, *range(2, x.dim()))
        share = mask.view(-1, *[1] * (x.dim() - 1)) / (mask.sum() * x[0, 0].numel())
        mean = (x * share).sum(over)
        centred = x - mean.view(shape)
        var = (centred.square() * share).sum(over)
        scaled = centred * (self.weight * (var + 1e-5).rsqrt()).view(shape) + self.bias.view(shape)
        return scaled, (mean, var)


class Masked(nn.Module):
    """The model with batch norm that minds a mask."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        layers = modules.build(settings).layers
        for place, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layers[place] = MaskedNorm(layer.num_features)
            elif isinstance(layer, nn.ReLU):
                layers[place] = nn.ReLU()
        self.layers = layers

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        statistics = []
        for layer in self.layers:
            if isinstance(layer, MaskedNorm):
                x, found = layer(x, mask)
                statistics.append(found)
            else:
                x = layer(x)
        return x, statistics


class Lanes:
    """Trains lanes together."""

    def __init__(self, workload: Workload, experiments: tuple[int, ...]) -> None:
        self.workload, self.settings, self.experiments = workload, workload.settings, experiments
        self.images = modules.normalised(torch.from_numpy(workload.images))
        self.labels = torch.from_numpy(workload.labels).long()
        self.model = Masked(self.settings)
        self.parameters = [name for name, _ in self.model.named_parameters()]
        layers = enumerate(self.model.layers)
        self.norms = [f"layers.{place}" for place, layer in layers if isinstance(layer, MaskedNorm)]
        self.gradient = vmap(grad(self._loss, has_aux=True), randomness="error")
        self.at_once = LANES[0]

    def tune(self, weights: dict[int, dict[str, Tensor]]) -> None:
        """Choose how many lanes to train at a time; warms up as well."""
        most = MOST_BYTES / _activation_bytes(self.settings)
        self.at_once = min((lanes for lanes in LANES if lanes <= most), key=lambda lanes: self._seconds(lanes, weights))

    def _seconds(self, lanes: int, weights: dict[int, dict[str, Tensor]]) -> float:
        self.at_once = lanes
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            self.train_round(weights, 0, most_steps=1)
            times.append(time.perf_counter() - begin)
        return min(times)

    def _loss(self, parameters: dict, images: Tensor, labels: Tensor, mask: Tensor):
        logits, statistics = functional_call(self.model, parameters, (images, mask))
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return (losses * mask).sum() / mask.sum(), statistics

    def train_round(self, weights: dict[int, dict[str, Tensor]], number: int, most_steps: int | None = None) -> dict:
        """Train and aggregate a round of every experiment."""
        size = self.settings.batch_size
        lanes = [
            (index, slot, [torch.from_numpy(batch) for batch in work.batches(size)][:most_steps])
            for index in self.experiments
            for slot, work in enumerate(self.workload.works(index, number))
        ]
        lanes.sort(key=lambda lane: -len(lane[2]))
        trained: dict[tuple[int, int], dict[str, Tensor]] = {}
        for begin in range(0, len(lanes), self.at_once):
            some = lanes[begin : begin + self.at_once]
            state = self._trained(some, weights)
            for row, (index, slot, batches) in enumerate(some):
                own = {name: tensor[row] for name, tensor in state.items()}
                counts = {
                    f"{name}.num_batches_tracked": weights[index][f"{name}.num_batches_tracked"] + len(batches)
                    for name in self.norms
                }
                trained[index, slot] = own | counts
        return {
            index: modules.combine(
                self.workload.members[index].aggregator,
                [trained[index, slot] for slot in range(len(works))],
                [len(work.order) for work in works],
            )
            for index in self.experiments
            if (works := self.workload.works(index, number))
        }

    def _trained(self, lanes: list, weights: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The weights of lanes, stacked; lanes come with the most steps first."""
        settings = self.settings
        names = [name for name, tensor in weights[lanes[0][0]].items() if tensor.is_floating_point()]
        state = {name: torch.stack([weights[index][name] for index, _, _ in lanes]) for name in names}
        velocities = {name: torch.zeros_like(state[name]) for name in self.parameters}
        for step in range(len(lanes[0][2])):
            active = [lane for lane in lanes if len(lane[2]) > step]
            batches = [lane[2][step] for lane in active]
            images, labels, mask = self._gathered(active, batches)
            now = {name: state[name][: len(active)] for name in self.parameters}
            gradients, statistics = self.gradient(now, images, labels, mask)
            squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values())
            scale = settings.max_grad_norm / (squares.sqrt() + 1e-6)
            scale.clamp_(max=1.0)
            for name, gradient in gradients.items():
                each = (-1, *[1] * (gradient.dim() - 1))
                velocity = velocities[name][: len(active)]
                velocity.mul_(settings.momentum).add_(gradient * scale.view(each))
                velocity.add_(now[name], alpha=settings.weight_decay)
                now[name].sub_(velocity, alpha=settings.lr)
            for name, (mean, var) in zip(self.norms, statistics, strict=True):
                count = mask.sum(1, keepdim=True) * self._pixels[name]
                state[f"{name}.running_mean"][: len(active)].lerp_(mean, 0.1)
                state[f"{name}.running_var"][: len(active)].lerp_(var * count / (count - 1), 0.1)
        return state

    @property
    def _pixels(self) -> dict[str, int]:
        """Values of a channel in one sample, at each batch norm."""
        side, found = self.settings.img_size, {}
        for place, layer in enumerate(self.model.layers):
            if isinstance(layer, MaskedNorm):
                found[f"layers.{place}"] = side * side if self.settings.model_type == "cnn" else 1
            side = side // 2 if isinstance(layer, nn.MaxPool2d) else side
        return found

    def _gathered(self, lanes: list, batches: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and masks of a step, [lanes, B, …]."""
        positions = nn.utils.rnn.pad_sequence(batches, batch_first=True)
        lengths = torch.tensor([len(batch) for batch in batches])
        mask = (torch.arange(positions.shape[1]) < lengths[:, None]).to(self.images.dtype)
        rows = torch.tensor([index for index, _, _ in lanes])
        images = self.images.index_select(0, positions.flatten()).view(*positions.shape, *self.images.shape[1:])
        return images, self.labels[rows[:, None], positions], mask


def _activation_bytes(settings: Settings) -> int:
    """Bytes of one copy of the activations of a lane."""
    if settings.model_type == "lr":
        return 4 * settings.batch_size * (settings.in_channels * settings.img_size**2 + settings.width * settings.depth)
    side, values = settings.img_size, settings.in_channels * settings.img_size**2
    for block in range(1, settings.depth + 1):
        values += settings.width * side * side
        side = side // 2 if block % 2 == 0 and side > 1 else side
    return 4 * settings.batch_size * values


def main() -> None:
    request = running.parse()
    running.configure(request)
    workload = workloads.load(request.path)
    experiments = running.chosen(request, workload)
    lanes = Lanes(workload, experiments)
    initial = {index: modules.tensors(workload.initial[workload.members[index].group]) for index in experiments}
    lanes.tune(initial)
    begin, started = time.perf_counter(), time.time()
    weights, first = initial, {}
    for number in range(request.rounds):
        weights = lanes.train_round(weights, number)
        if number == 0:
            first = {index: modules.arrays(state) for index, state in weights.items()}
    seconds = time.perf_counter() - begin
    running.report(
        request,
        workload,
        seconds=seconds,
        start_up=started - request.started,
        peak=running.peak_mb(),
        weights=first,
        versions=modules.versions(),
        choices={"lanes_at_once": lanes.at_once},
    )


if __name__ == "__main__":
    main()
