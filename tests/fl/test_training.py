"""What one client does in a round: the order of its samples, its batches, its steps."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsweep.fl.data import ImageData
from fedsweep.fl.federation import epoch_orders, participants
from fedsweep.fl.reference import (
    ClientData,
    ClientDataloader,
    ClientJob,
    get_client_dataloader,
    initial_model,
    train_client,
    train_one_client,
)
from fedsweep.plan.experiment import Experiment


def numbered(count: int, poisoned: list[int] | None = None) -> ClientData:
    """One-pixel images whose byte is their number, labelled by it; `poisoned` gives the numbers of poisoned ones."""
    numbers = torch.arange(count)
    return ClientData(
        images=numbers.to(torch.uint8).reshape(-1, 1, 1, 1),
        labels=numbers,
        poisoned=torch.isin(numbers, torch.tensor(poisoned or [])),
    )


def pixels(images: Tensor) -> list[int]:
    return ((images.flatten() * 0.5 + 0.5) * 255).round().long().tolist()


# ------------------------------------------------------------------------------------------------------------ the order


def test_every_local_epoch_is_a_fresh_permutation() -> None:
    orders = epoch_orders(Experiment(local_epochs=3), np.zeros(50, dtype=bool), 1, 0)
    assert [sorted(order.tolist()) for order in orders] == [list(range(50))] * 3
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_order_is_keyed_by_seed_round_and_client_alone() -> None:
    clean, poisoned = np.zeros(50, dtype=bool), np.arange(50) % 3 == 0
    expected = epoch_orders(Experiment(seed=1), clean, 2, 3)[0].tolist()
    attack = Experiment(seed=1, poison_ratio=0.5, aggregator="median", batch_size=7, lr=0.5, alpha=9.0, local_epochs=2)
    assert epoch_orders(attack, poisoned, 2, 3)[0].tolist() == expected
    others = [epoch_orders(Experiment(seed=seed), clean, number, client)[0].tolist() for seed, number, client in (
        (2, 2, 3), (1, 3, 3), (1, 2, 4)
    )]  # fmt: skip
    assert expected not in others


def test_good_bad_and_bad_good_part_the_same_permutation_and_keep_its_order() -> None:
    poisoned = np.arange(50) % 3 == 0
    mixed, good_bad, bad_good = (
        epoch_orders(Experiment(data_ordering=ordering, local_epochs=2), poisoned, 1, 0)
        for ordering in ("shuffle", "good_bad", "bad_good")
    )
    for both, good_first, bad_first in zip(mixed, good_bad, bad_good, strict=True):
        good = [sample for sample in both.tolist() if sample % 3]
        bad = [sample for sample in both.tolist() if sample % 3 == 0]
        assert good_first.tolist() == good + bad
        assert bad_first.tolist() == bad + good


@pytest.mark.parametrize("value", [True, False])
def test_samples_of_one_kind_keep_the_shuffled_order(value: bool) -> None:
    orders = [
        epoch_orders(Experiment(data_ordering=ordering), np.full(50, value), 1, 0)[0].tolist()
        for ordering in ("shuffle", "good_bad", "bad_good")
    ]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(
    ("fraction", "num_clients", "count"),
    [(1.0, 10, 10), (0.5, 10, 5), (0.25, 10, 3), (0.24, 10, 2), (0.01, 10, 1), (0.04, 10, 1), (0.5, 1, 1)],
)
def test_participants_are_the_asked_share_without_replacement(fraction: float, num_clients: int, count: int) -> None:
    for number in range(1, 6):
        chosen = participants(Experiment(fraction_fit=fraction, num_clients=num_clients), number)
        assert chosen == sorted(set(chosen))
        assert len(chosen) == count
        assert set(chosen) <= set(range(num_clients))


def test_participants_change_from_round_to_round_and_with_the_seed_only() -> None:
    def chosen(**parameters: object) -> list[list[int]]:
        experiment = Experiment(fraction_fit=0.3, num_clients=20, **parameters)
        return [participants(experiment, number) for number in range(1, 30)]

    expected = chosen()
    assert len({tuple(round) for round in expected}) > 20
    assert {client for round in expected for client in round} == set(range(20))
    assert chosen(poison_ratio=0.5, aggregator="median") == expected
    assert chosen(seed=1) != expected


# ---------------------------------------------------------------------------------------------------------- the batches


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(8, 4, [4, 4]), (7, 4, [4, 3]), (10, 4, [4, 4, 2]), (9, 4, [4, 4]), (3, 4, [3]), (2, 4, [2]), (1, 4, [])],
)
def test_the_last_batch_may_be_smaller_but_one_of_a_single_sample_is_left_out(
    count: int, batch_size: int, sizes: list[int]
) -> None:
    experiment = Experiment(batch_size=batch_size, local_epochs=2)
    batches = list(get_client_dataloader(experiment, numbered(count), 1, 0))
    assert [len(labels) for _, labels in batches] == sizes * 2


def test_batches_are_normalised_images_with_their_own_labels_in_the_order_of_the_epochs() -> None:
    experiment = Experiment(batch_size=4, local_epochs=2, data_ordering="good_bad")
    own = numbered(10, poisoned=[1, 2, 3])
    batches = list(get_client_dataloader(experiment, own, 1, 0))
    seen = [number for _, labels in batches for number in labels.tolist()]
    assert seen == [number for order in epoch_orders(experiment, own.poisoned.numpy(), 1, 0) for number in order]
    assert [number for images, _ in batches for number in pixels(images)] == seen
    assert {images.dtype for images, _ in batches} == {torch.float32}
    assert {labels.dtype for _, labels in batches} == {torch.int64}
    assert batches[0][0].shape == (4, 1, 1, 1)
    assert batches[0][0].abs().max() <= 1


def test_going_through_a_loader_twice_gives_the_same_batches() -> None:
    loader = get_client_dataloader(Experiment(batch_size=4), numbered(10), 1, 0)
    first, second = ([labels.tolist() for _, labels in loader] for _ in range(2))
    assert first == second


# ------------------------------------------------------------------------------------------------------------ the steps


def two_logits() -> nn.Module:
    """Logits a x and b x of one number x, beginning with a = b = 0."""
    model = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(model.weight)
    return model


BATCH = (torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1]))


def test_one_step_by_hand() -> None:
    """Both softmaxes are 1/2, 1/2. The gradient by a is the mean of (1/2 - 1) * 1 and 1/2 * -1, so -1/2; by b 1/2."""
    model = two_logits()
    train_client(model, [BATCH], Experiment(lr=0.1, momentum=0.0, weight_decay=0.0, max_grad_norm=None))
    assert model.weight.flatten().tolist() == pytest.approx([0.05, -0.05], rel=1e-6)


def test_a_second_step_has_momentum_and_decay_by_hand() -> None:
    """At a = 0.05, b = -0.05 the first softmax is s = 1 / (1 + e^-0.1) = 0.524979 for class 0, and the gradient by a is
    s - 1 = -0.475021. With momentum 0.9 and decay 0.5: v = 0.9 * -0.5 + (-0.475021 + 0.5 * 0.05) = -0.900021.
    """
    model = two_logits()
    train_client(model, [BATCH, BATCH], Experiment(lr=0.1, momentum=0.9, weight_decay=0.5, max_grad_norm=None))
    assert model.weight.flatten().tolist() == pytest.approx([0.05 + 0.0900021, -0.05 - 0.0900021], rel=1e-6)


@pytest.mark.parametrize(("max_grad_norm", "step"), [(0.1, 0.1 * 0.1 / math.sqrt(2)), (10.0, 0.05), (None, 0.05)])
def test_a_gradient_is_scaled_down_to_the_norm_of_the_whole_model_and_never_up(
    max_grad_norm: float | None, step: float
) -> None:
    """The gradient (-1/2, 1/2) has norm 1 / sqrt 2."""
    model = two_logits()
    train_client(model, [BATCH], Experiment(lr=0.1, momentum=0.0, weight_decay=0.0, max_grad_norm=max_grad_norm))
    assert model.weight.flatten().tolist() == pytest.approx([step, -step], rel=1e-5)


def test_clipping_takes_the_norm_over_all_layers() -> None:
    """Two tensors with gradients (3, 0) and (0, 4): norm 5, so clipped to 1 they are (0.6, 0) and (0, 0.8)."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

        def forward(self, images: Tensor) -> Tensor:
            # Cross-entropy of (z, 0) with label 0 has the gradient -1/2 by z at z = 0.
            score = -6 * self.one[0] - 8 * self.other[1]
            return torch.stack((score, torch.zeros(()))).expand(2, 2)

    model = Sum()
    batch = (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    train_client(model, [batch], Experiment(lr=1.0, momentum=0.0, weight_decay=0.0, max_grad_norm=1.0))
    assert model.one.tolist() == pytest.approx([-0.6, 0.0], abs=1e-5)
    assert model.other.tolist() == pytest.approx([0.0, -0.8], abs=1e-5)


def test_every_call_has_a_fresh_optimiser() -> None:
    experiment = Experiment(lr=0.1, momentum=0.9)
    once, twice = two_logits(), two_logits()
    train_client(once, [BATCH, BATCH], experiment)
    train_client(twice, [BATCH], experiment)
    train_client(twice, [BATCH], experiment)
    assert not torch.equal(once.weight, twice.weight)


def test_the_step_is_that_of_pytorchs_sgd(digits: ImageData) -> None:
    experiment = Experiment(
        model_type="cnn", width_factor=3, lr=0.1, momentum=0.8, weight_decay=0.01, max_grad_norm=0.5
    )
    model = initial_model(experiment, digits)
    twin = copy.deepcopy(model)
    own = ClientData(digits.train_images[:70], digits.train_labels[:70], torch.zeros(70, dtype=torch.bool))
    loader = get_client_dataloader(experiment, own, 1, 0)
    train_client(model, loader, experiment)
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.8, weight_decay=0.01)
    twin.train()
    for images, labels in loader:
        optimiser.zero_grad()
        nn.functional.cross_entropy(twin(images), labels).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimiser.step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", ["cnn", "lr"])
def test_a_client_smaller_than_a_batch_does_train(digits: ImageData, model_type: str) -> None:
    experiment = Experiment(model_type=model_type, batch_size=128, local_epochs=3)
    model = initial_model(experiment, digits)
    own = ClientData(digits.train_images[:5], digits.train_labels[:5], torch.zeros(5, dtype=torch.bool))
    trained = train_one_client(ClientJob(experiment, model, get_client_dataloader(experiment, own, 1, 0)))
    for name, before in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert (before.item(), trained[name].item()) == (0, 3)
        else:
            assert not torch.equal(before, trained[name]), name


def test_a_client_of_one_sample_gives_back_the_global_model(digits: ImageData) -> None:
    experiment = Experiment(local_epochs=3)
    model = initial_model(experiment, digits)
    own = ClientData(digits.train_images[:1], digits.train_labels[:1], torch.zeros(1, dtype=torch.bool))
    trained = train_one_client(ClientJob(experiment, model, get_client_dataloader(experiment, own, 1, 0)))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


def test_training_a_client_leaves_the_global_model_alone(digits: ImageData) -> None:
    experiment = Experiment()
    model = initial_model(experiment, digits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = ClientData(digits.train_images[:70], digits.train_labels[:70], torch.zeros(70, dtype=torch.bool))
    job = ClientJob(experiment, model, get_client_dataloader(experiment, own, 1, 0))
    first = train_one_client(job)
    scratch = copy.deepcopy(model)
    nn.init.constant_(scratch.layers[0].weight, 77)
    again = train_one_client(job, scratch)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(first[name], again[name]) for name in first), "whatever the weights of the model trained in"


def test_a_loader_takes_any_samples_of_the_images_it_has() -> None:
    own = numbered(10)
    loader = ClientDataloader(own.images, own.labels, [torch.tensor([3, 1]), torch.tensor([7, 9, 8])], 2)
    assert [labels.tolist() for _, labels in loader] == [[3, 1], [7, 9]]
