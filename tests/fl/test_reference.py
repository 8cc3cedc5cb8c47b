"""The reference engine: its steps by hand, and whole experiments."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedsweep.fl import reference
from fedsweep.fl.reference import (
    ClientDataloader,
    epoch_orders,
    get_client_dataloader,
    initial_model,
    participants,
    prepare,
    run,
    train_client,
)
from fedsweep.plan.experiment import Experiment


def line() -> nn.Module:
    """Two logits that are linear in one number: weights 2 and -1, no bias."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0], [-1.0]]))
    return model


def gradient(weights: np.ndarray, x: float, label: int) -> np.ndarray:
    """Of cross-entropy: (softmax - one_hot) x."""
    shares = np.exp(weights * x) / np.exp(weights * x).sum()
    return (shares - np.eye(2)[label]) * x


@pytest.mark.parametrize("max_grad_norm", [None, 0.1, 100.0])
def test_two_steps_of_sgd_by_hand(max_grad_norm):
    """v = m v + (g + d w), w = w - lr v, the gradient g scaled down to norm c where it is longer."""
    lr, momentum, decay = 0.1, 0.9, 0.01
    weights, velocity = np.array([2.0, -1.0]), np.zeros(2)
    batches = [(0.5, 1), (-1.5, 0)]
    for x, label in batches:
        found = gradient(weights, x, label)
        if max_grad_norm is not None:
            found = found * min(1.0, max_grad_norm / (np.linalg.norm(found) + 1e-6))
        velocity = momentum * velocity + found + decay * weights
        weights = weights - lr * velocity
    model = line()
    experiment = Experiment(lr=lr, momentum=momentum, weight_decay=decay, max_grad_norm=max_grad_norm)
    train_client(model, [(torch.tensor([[x]]), torch.tensor([label])) for x, label in batches], experiment)
    assert model.weight.detach().flatten().tolist() == pytest.approx(weights.tolist(), rel=1e-5)


def test_every_round_starts_with_a_fresh_optimiser():
    first, second = line(), line()
    batch = [(torch.tensor([[0.5]]), torch.tensor([1]))]
    train_client(first, batch, Experiment())
    train_client(first, batch, Experiment())
    train_client(second, batch * 2, Experiment())
    assert not torch.equal(first.weight, second.weight)


def test_a_batch_of_one_is_left_out_and_a_smaller_last_batch_is_not():
    images = torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1)
    loader = ClientDataloader(images, torch.arange(9), [torch.arange(9), torch.arange(9)], 4)
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    loader = ClientDataloader(images, torch.arange(9), [torch.arange(7)], 4)
    assert [labels.tolist() for _, labels in loader] == [[0, 1, 2, 3], [4, 5, 6]]


def test_a_client_smaller_than_a_batch_does_train(digits):
    experiment = Experiment(model_type="lr", depth=0, num_clients=60, batch_size=128, min_client_size=2, alpha=100)
    prepared = prepare(experiment, digits)
    assert max(map(len, prepared.clients)) < 128
    model = initial_model(experiment, digits)
    trained = copy.deepcopy(model)
    loader = get_client_dataloader(experiment, prepared, digits.train_images, digits.train_labels, 1, 0)
    train_client(trained, loader, experiment)
    assert not torch.equal(trained.classifier.weight, model.classifier.weight)


def test_good_bad_orders_part_the_same_permutation():
    own, is_poisoned = np.arange(100, 150), np.zeros(200, dtype=bool)
    is_poisoned[100:150:3] = True
    shuffled, good_bad, bad_good = (
        epoch_orders(Experiment(data_ordering=ordering, local_epochs=2), own, is_poisoned, 3, 1)
        for ordering in ("shuffle", "good_bad", "bad_good")
    )
    assert not np.array_equal(shuffled[0], shuffled[1]), "every local epoch has its own order"
    for mixed, good_first, bad_first in zip(shuffled, good_bad, bad_good, strict=True):
        clean, poisoned = mixed[~is_poisoned[mixed]], mixed[is_poisoned[mixed]]
        assert good_first.tolist() == [*clean, *poisoned]
        assert bad_first.tolist() == [*poisoned, *clean]


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 10), (0.5, 5), (0.25, 3), (0.24, 2), (0.01, 1)])
def test_participants_are_the_asked_share_without_replacement(fraction, count):
    rounds = [participants(Experiment(fraction_fit=fraction), number).tolist() for number in range(1, 6)]
    assert all(len(set(chosen)) == len(chosen) == count for chosen in rounds)
    assert all(chosen == sorted(chosen) for chosen in rounds)
    if 1 < count < 10:
        assert any(one != other for one, other in pairwise(rounds))


def test_experiments_that_differ_in_attack_or_aggregator_see_the_same_images_in_the_same_batches(digits):
    base = Experiment(seed=5, num_clients=4)
    others = [
        {"poison_ratio": 0.4},
        {"poison_ratio": 0.2, "poison_type": "random_noise", "poison_level": "client"},
        {"aggregator": "median"},
        {"poison_ratio": 0.3, "target_class": 1, "poison_label": 2, "lr": 0.5},
    ]
    reference_orders = [
        order.tolist()
        for client in range(4)
        for order in epoch_orders(base, prepare(base, digits).clients[client], np.zeros(1437, bool), 2, client)
    ]
    start = initial_model(base, digits).state_dict()
    for changes in others:
        other = Experiment(**{**base.model_dump(), **changes})
        prepared = prepare(other, digits)
        orders = [
            order.tolist()
            for client in range(4)
            for order in epoch_orders(other, prepared.clients[client], prepared.poisoning.is_poisoned, 2, client)
        ]
        assert orders == reference_orders
        assert all(
            torch.equal(start[name], tensor) for name, tensor in initial_model(other, digits).state_dict().items()
        )


def test_the_same_experiment_gives_the_same_bits_whatever_global_random_state(run_to_end):
    outcomes = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        outcomes.append(run_to_end(poison_ratio=0.3, poison_type="random_noise", fraction_fit=0.5))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != run_to_end(poison_ratio=0.3, poison_type="random_noise", fraction_fit=0.5, seed=43)


TARGET = {"target_class": 3, "poison_label": 5}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"poison_ratio": 0.0}, {"poison_ratio": 0.0, "poison_type": "random_noise", "data_ordering": "bad_good"}),
        ({"poison_ratio": 0.0}, {"poison_ratio": 0.0, "poison_level": "client", **TARGET}),
        (
            {"poison_ratio": 0.5, "poison_level": "client"},
            {"poison_ratio": 0.5, "poison_level": "client", "data_ordering": "good_bad"},
        ),
        ({"poison_ratio": 1.0}, {"poison_ratio": 1.0, "poison_level": "client", "data_ordering": "bad_good"}),
        (
            {"poison_ratio": 1.0, "poison_type": "random_noise"},
            {"poison_ratio": 1.0, "poison_type": "random_noise", "poison_level": "client"},
        ),
        ({"poison_ratio": 1.0, **TARGET}, {"poison_ratio": 1.0, "poison_level": "client", **TARGET}),
        (
            {"poison_ratio": 0.5, "poison_type": "random_noise"},
            {"poison_ratio": 0.5, "poison_type": "random_noise", **TARGET},
        ),
        ({"partition": "iid"}, {"partition": "iid", "alpha": 0.1, "min_client_size": 3}),
        ({"partition": "dirichlet_client"}, {"partition": "dirichlet_client", "min_client_size": 999}),
        ({"early_stopping_patience": None}, {"early_stopping_patience": 3, "min_delta": 9.0}),
        ({}, {"partition_seed": 42, "split_seed": 42}),
    ],
)
def test_experiments_of_one_signature_give_one_outcome(one, other, run_to_end):
    assert Experiment(**one, global_rounds=3).signature == Experiment(**other, global_rounds=3).signature
    assert run_to_end(**one) == run_to_end(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"poison_ratio": 0.5}, {"poison_ratio": 0.5, "data_ordering": "good_bad"}),
        (
            {"poison_ratio": 0.5, "poison_level": "client", **TARGET},
            {"poison_ratio": 0.5, "poison_level": "client", "data_ordering": "bad_good", **TARGET},
        ),
        ({"poison_ratio": 1.0, **TARGET}, {"poison_ratio": 1.0, "data_ordering": "good_bad", **TARGET}),
        ({}, {"partition_seed": 1}),
        ({}, {"split_seed": 1}),
    ],
)
def test_experiments_of_two_signatures_give_two_outcomes(one, other, run_to_end):
    assert Experiment(**one).signature != Experiment(**other).signature
    assert run_to_end(**one) != run_to_end(**other)


def test_it_learns_and_an_attack_costs_accuracy(run_to_end):
    parameters = {"model_type": "cnn", "width_factor": 8, "global_rounds": 5, "local_epochs": 2, "alpha": 100}
    clean = run_to_end(**parameters)
    poisoned = run_to_end(**parameters, poison_ratio=0.5, poison_level="client")
    assert clean.test_acc > 0.93
    assert poisoned.test_acc < clean.test_acc - 0.1
    assert poisoned.attack_success_rate > 0.1
    assert clean.attack_success_rate is None
    assert (poisoned.poisoned_clients, clean.poisoned_clients) == (2, 0)


def test_the_result_is_that_of_the_round_with_the_least_validation_loss(digits, monkeypatch):
    """The validation loss is made to be least in round 2; the weights of round 2 must be what is tested."""
    experiment = Experiment(model_type="lr", depth=0, num_clients=2, global_rounds=4)
    weights = []
    evaluate = reference.evaluate_model

    def scripted(model, images, labels):
        weights.append(model.classifier.weight.detach().clone())
        found = evaluate(model, images, labels)
        return replace(found, loss=[5.0, 1.0, 3.0, 2.0, found.loss][len(weights) - 1])

    monkeypatch.setattr(reference, "evaluate_model", scripted)
    outcome = last(run(experiment, digits))
    assert outcome.best_epoch == 2
    assert outcome.val_loss == 1.0
    assert outcome.val_acc == outcome.history[1].val_acc
    assert torch.equal(weights[4], weights[1])
    assert not torch.equal(weights[4], weights[3])


def test_early_stopping_ends_the_rounds(digits, monkeypatch):
    evaluate = reference.evaluate_model
    monkeypatch.setattr(reference, "evaluate_model", lambda *args: replace(evaluate(*args), loss=1.0))
    outcome = last(run(Experiment(model_type="lr", depth=0, num_clients=2, early_stopping_patience=3), digits))
    assert (outcome.rounds_run, outcome.best_epoch) == (4, 1)


def last(rounds):
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            return end.value


def spoil(states, which):
    """Make the weights of some clients not finite."""
    return [
        {name: tensor * math.nan if tensor.is_floating_point() else tensor for name, tensor in state.items()}
        if client in which
        else state
        for client, state in enumerate(states)
    ]


def test_a_client_with_infinite_weights_takes_no_part(digits):
    experiment = Experiment(model_type="lr", depth=0, num_clients=3, global_rounds=2, partition="iid")
    seen = []

    def train(jobs):
        seen.append(spoil([reference.train_one_client(job) for job in jobs], {1}))
        return seen[-1]

    outcome = last(run(experiment, digits, train_clients=train))
    assert outcome.outcome == "ok"
    assert outcome.nonfinite_clients == 2
    assert [report.nonfinite_clients for report in outcome.history] == [1, 1]
    assert math.isfinite(outcome.test_loss)


def test_an_experiment_whose_clients_are_all_infinite_has_diverged(digits):
    experiment = Experiment(model_type="lr", depth=0, num_clients=3, global_rounds=5)
    rounds = 0

    def train(jobs):
        nonlocal rounds
        rounds += 1
        trained = [reference.train_one_client(job) for job in jobs]
        return spoil(trained, {0, 1, 2} if rounds == 2 else set())

    outcome = last(run(experiment, digits, train_clients=train))
    assert outcome.outcome == "diverged"
    assert (outcome.rounds_run, outcome.nonfinite_clients) == (2, 3)
    assert outcome.test_acc is outcome.val_loss is outcome.best_epoch is outcome.per_class_test_acc is None
    assert outcome.num_parameters == 650


def test_a_learning_rate_beyond_reason_diverges_by_itself(run_to_end):
    assert run_to_end(model_type="lr", depth=0, lr=1e38, max_grad_norm=None, momentum=0.99).outcome == "diverged"


def test_aggregation_weighs_clients_by_their_samples(digits):
    """One round in which client k's weights are all k: the global weights must be sum of n_k k / sum of n_k."""
    experiment = Experiment(model_type="lr", depth=0, num_clients=4, global_rounds=1, alpha=0.3)
    sizes = [len(own) for own in prepare(experiment, digits).clients]
    assert len(set(sizes)) > 1

    def train(jobs):
        return [
            {name: torch.full_like(tensor, float(k)) for name, tensor in job.model.state_dict().items()}
            for k, job in enumerate(jobs)
        ]

    models = []
    evaluate = reference.evaluate_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "evaluate_model", lambda m, *rest: (models.append(m), evaluate(m, *rest))[1])
        last(run(experiment, digits, train_clients=train))
    expected = sum(k * size for k, size in enumerate(sizes)) / sum(sizes)
    assert models[0].classifier.weight.unique().tolist() == pytest.approx([expected])


def test_an_attack_on_a_class_that_is_not_there_is_an_error(digits):
    with pytest.raises(ValueError, match="class 12, but digits has the classes 0 to 9"):
        prepare(Experiment(target_class=12, poison_label=1, poison_ratio=0.5), digits)
