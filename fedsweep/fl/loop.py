"""The plain loop as a trainer: one lane after another, each by the reference engine's own module and step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsweep.fl.data import ImageData, normalised
from fedsweep.fl.evaluate import BATCH_SIZE
from fedsweep.fl.lanes import Aggregate, ClientWork, LaneInputs, ModelShape, Trained
from fedsweep.fl.reference import Batch, train_client
from fedsweep.fl.repeatable import repeatable
from fedsweep.fl.threads import Threads
from fedsweep.plan.experiment import Experiment


class LoopTrainer:
    """Trains lanes one by one; on a CPU so many at the same time, each in a thread of its own."""

    plan = "loop"

    def __init__(
        self, example: Experiment, data: ImageData, threads: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        """Serve cohorts of the shape, batch size and local epochs of `example` on `data`, which lies on its device."""
        self.example = example
        self.data = data
        self.dtype = dtype
        self.shape = ModelShape.of(example, data)
        self.aggregators: Mapping[str, Aggregate] = {}
        self.threads = Threads(1 if data.train_images.is_cuda else threads)
        self._models = threading.local()

    def _model(self) -> nn.Module:
        """The module of the calling thread, whatever its weights."""
        if not hasattr(self._models, "model"):
            model = self.shape.build().to_empty(device=self.data.train_images.device).to(self.dtype)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from the annotations
            self._models.model = model
        module: nn.Module = self._models.model
        return module

    def train(self, inputs: LaneInputs, works: Sequence[ClientWork], num_slots: int) -> Trained:
        """Train every client of `works`; see `Trainer.train`."""
        trained = inputs.weights.new_empty(len(inputs.weights), num_slots, inputs.weights.shape[1])
        longest_first = sorted(works, key=lambda work: -work.images)

        def job(work: ClientWork, lane: int, slot: int) -> Callable[[], None]:
            return lambda: self._train_lane(inputs, work, lane, trained[lane, slot])

        self.threads.run(
            [job(work, lane, slot) for work in longest_first for lane, slot in zip(work.lanes, work.slots, strict=True)]
        )
        return Trained.of(trained)

    def _train_lane(self, inputs: LaneInputs, work: ClientWork, lane: int, out: Tensor) -> None:
        model = self._model()
        model.load_state_dict(self.shape.layout.unflatten(inputs.weights[lane]))
        norm = float(inputs.max_grad_norm[lane])
        own = self.example.model_copy(
            update={
                "lr": float(inputs.lr[lane]),
                "momentum": float(inputs.momentum[lane]),
                "weight_decay": float(inputs.weight_decay[lane]),
                "max_grad_norm": None if norm == float("inf") else norm,
            }
        )
        train_client(model, self._batches(work, inputs.labels[lane]), own)
        out.copy_(self.shape.layout.flatten(model.state_dict()))

    def _batches(self, work: ClientWork, labels: Tensor) -> Iterator[Batch]:
        for order in torch.from_numpy(work.order).to(labels.device):
            for batch in torch.split(order, self.example.batch_size):
                if len(batch) > 1:
                    images = normalised(self.data.train_images.index_select(0, batch)).to(self.dtype)
                    yield images, labels.index_select(0, batch)

    @repeatable()
    def logits(self, weights: Tensor, images: Tensor) -> Tensor:
        """Logits of images by each model; see `Trainer.logits`."""
        all_logits = weights.new_empty(len(weights), len(images), self.shape.num_classes)

        def job(row: int) -> Callable[[], None]:
            return lambda: self._apply(weights[row], images, all_logits[row])

        self.threads.run([job(row) for row in range(len(weights))])
        return all_logits

    @torch.no_grad()
    def _apply(self, row: Tensor, images: Tensor, out: Tensor) -> None:
        model = self._model().eval()
        model.load_state_dict(self.shape.layout.unflatten(row))
        for batch, part in zip(torch.split(images, BATCH_SIZE), torch.split(out, BATCH_SIZE), strict=True):
            part.copy_(model(normalised(batch).to(self.dtype)))
