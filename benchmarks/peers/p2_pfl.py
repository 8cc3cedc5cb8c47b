"""P2: pfl-research (Apple), `FederatedAveraging` with `SimulatedBackend` and `PyTorchModel`.

Its local training does the workload's SGD, with momentum, weight decay and clipping, on the workload's batches, and
weights clients by their samples. What it does not do: it has no median, so the experiments with `median` are trained
with its average; and it aggregates parameters only, so running statistics of batch norm pass from client to client.
Evaluation of users, which it does in the first of its iterations, is avoided by counting iterations from the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import modules
import running
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from running import Prepared
from torch import Tensor
from torch.nn import functional
from workload import State, Work, Workload


class LocalModel(torch.nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, model: modules.Classifier) -> None:
        super().__init__()
        self.model = model
        self.train()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.model(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict:
        raise RuntimeError("nothing is evaluated here")


class UserData(PyTorchTensorDataset):
    """A client's samples. A batch of one is left out: batch norm has no variance there."""

    def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
        return (batch for batch in super().iter(batch_size) if len(batch[1]) > 1)


class AfterFirstRound(TrainingProcessCallback):
    """Keeps the global weights after the first round."""

    def __init__(self) -> None:
        self.weights: State = {}

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        if not self.weights:
            self.weights = modules.arrays(dict(model.pytorch_model.model.named_parameters()))
        return False, Metrics()


def prepare(workload: Workload) -> Prepared:
    """Load the data, and warm up on the smallest client."""
    images = modules.normalised(torch.from_numpy(workload.images))
    labels = torch.from_numpy(workload.labels).long()
    smallest = min(workload.works(0, 0), key=lambda work: len(work.order))
    train(workload, images, labels[0], 0, [(smallest,)])

    def run(index: int, rounds: int) -> State:
        return train(workload, images, labels[index], index, [workload.works(index, each) for each in range(rounds)])

    return Prepared(run, {"aggregation": "average only"})


def train(workload: Workload, images: Tensor, labels: Tensor, index: int, rounds: list[tuple[Work, ...]]) -> State:
    """Train one experiment; its global parameters after the first round."""
    settings = workload.settings
    model = modules.build(settings)
    model.load_state_dict(modules.tensors(workload.initial[workload.members[index].group]))
    local = LocalModel(model)
    optimizer = partial(torch.optim.SGD, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True)
    central = torch.optim.SGD(local.parameters(), lr=1.0)

    def user_data(work: Work) -> UserData:
        positions = torch.from_numpy(work.order)
        return UserData((images.index_select(0, positions), labels.index_select(0, positions)), user_id=work.client)

    users = iter([work for works in rounds for work in works])
    data = FederatedDataset(user_data, lambda: next(users))
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()])
    algorithm = FederatedAveraging()
    algorithm._current_central_iteration = 1
    kept = AfterFirstRound()
    algorithm.run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=1 + len(rounds),
            evaluation_frequency=10**9,
            train_cohort_size=len(rounds[0]),
            val_cohort_size=None,
        ),
        backend=backend,
        model=PyTorchModel(local, optimizer, central),
        model_train_params=NNTrainHyperParams(
            local_batch_size=settings.batch_size,
            local_num_epochs=1,
            local_learning_rate=settings.lr,
            local_max_grad_norm=settings.max_grad_norm,
        ),
        callbacks=[kept],
        send_metrics_to_platform=False,
    )
    return kept.weights


def versions() -> dict[str, str]:
    """Of what this peer is made of."""
    return modules.versions() | {"pfl": version("pfl")}


if __name__ == "__main__":
    running.main(prepare, versions)
