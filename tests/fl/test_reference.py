"""Whole experiments."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsweep.errors import DataError, PartitionError
from fedsweep.fl import reference
from fedsweep.fl.data import ImageData
from fedsweep.fl.evaluate import Evaluation
from fedsweep.fl.federation import form_federation
from fedsweep.fl.outcome import Outcome
from fedsweep.fl.reference import ClientJob, initial_model, run, train_one_client
from fedsweep.plan.experiment import Experiment

SMALL = {"model_type": "lr", "width_factor": 4, "depth": 1, "num_clients": 4, "global_rounds": 3}
TARGET = {"target_class": 3, "poison_label": 5}

RunToEnd = Callable[..., Outcome]
State = Mapping[str, Tensor]


@pytest.fixture
def run_to_end(digits: ImageData, finish: Callable[..., Outcome]) -> RunToEnd:
    """Run a small experiment on the digits; arguments are its parameters."""
    return lambda **parameters: finish(Experiment(**{**SMALL, **parameters}), digits)


# -------------------------------------------------------------------------------------------------------- repeatability


@pytest.mark.parametrize(
    "parameters",
    [
        {"model_type": "cnn", "width_factor": 3, "depth": 2, "poison_ratio": 0.3, "data_ordering": "good_bad"},
        {"model_type": "lr", "poison_ratio": 0.3, "poison_type": "random_noise", "fraction_fit": 0.5},
    ],
)
def test_an_experiment_repeats_bit_for_bit_whatever_the_global_random_state(
    parameters: dict[str, object], run_to_end: RunToEnd
) -> None:
    outcomes = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        outcomes.append(run_to_end(**parameters))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != run_to_end(**parameters, seed=43)


def test_an_experiment_does_not_depend_on_another_that_runs_beside_it(digits: ImageData, finish: RunToEnd) -> None:
    experiments = [Experiment(**SMALL, poison_ratio=ratio) for ratio in (0.0, 0.5)]
    alone = [finish(experiment, digits) for experiment in experiments]
    side_by_side = [run(experiment, digits) for experiment in experiments]
    reports = [[next(rounds) for rounds in side_by_side] for _ in range(3)]
    for place, outcome in enumerate(alone):
        assert tuple(round[place] for round in reports) == outcome.history


def test_clients_trained_in_another_process_give_the_same_bits(digits: ImageData, finish: RunToEnd) -> None:
    experiment = Experiment(
        **{**SMALL, "model_type": "cnn"}, poison_ratio=0.3, data_ordering="bad_good", local_epochs=2
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        elsewhere = finish(experiment, digits, train_clients=lambda jobs: pool.map(train_one_client, jobs))
    assert elsewhere == finish(experiment, digits)


def test_a_job_is_complete_in_itself(digits: ImageData, finish: RunToEnd) -> None:
    """It survives being written to bytes, and holds the client's own samples and no others."""
    experiment = Experiment(**SMALL, poison_ratio=0.3)
    sizes = []

    def train(jobs: Sequence[ClientJob]) -> Iterable[State]:
        for job in jobs:
            restored = pickle.loads(pickle.dumps(job))
            sizes.append(len(restored.loader.images))
            yield train_one_client(ClientJob(**vars(restored)))

    assert finish(experiment, digits, train_clients=train) == finish(experiment, digits)
    assert sizes == [len(own) for own in form_federation(experiment, digits).clients] * 3


# ------------------------------------------------------------------------------------------------- what cannot matter


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"poison_ratio": 0.0}, {"poison_ratio": 0.0, "poison_type": "random_noise", "data_ordering": "bad_good"}),
        ({"poison_ratio": 0.0}, {"poison_ratio": 0.0, "poison_level": "client", "data_ordering": "good_bad", **TARGET}),
        (
            {"poison_ratio": 0.5, "poison_level": "client"},
            {"poison_ratio": 0.5, "poison_level": "client", "data_ordering": "good_bad"},
        ),
        (
            {"poison_ratio": 0.5, "poison_level": "client", "poison_type": "random_noise"},
            {"poison_ratio": 0.5, "poison_level": "client", "poison_type": "random_noise", "data_ordering": "bad_good"},
        ),
        ({"poison_ratio": 1.0}, {"poison_ratio": 1.0, "poison_level": "client", "data_ordering": "bad_good"}),
        ({"poison_ratio": 1.0}, {"poison_ratio": 1.0, "data_ordering": "good_bad"}),
        (
            {"poison_ratio": 1.0, "poison_type": "random_noise"},
            {"poison_ratio": 1.0, "poison_type": "random_noise", "poison_level": "client"},
        ),
        ({"poison_ratio": 1.0, **TARGET}, {"poison_ratio": 1.0, "poison_level": "client", **TARGET}),
        (
            {"poison_ratio": 0.5, "poison_type": "random_noise"},
            {"poison_ratio": 0.5, "poison_type": "random_noise", **TARGET},
        ),
        ({"depth": 0, "width_factor": 1}, {"depth": 0, "width_factor": 64}),
        ({"model_type": "cnn", "depth": 0, "width_factor": 1}, {"model_type": "cnn", "depth": 0, "width_factor": 64}),
        ({"partition": "iid"}, {"partition": "iid", "alpha": 0.1, "min_client_size": 3}),
        ({"partition": "dirichlet_client"}, {"partition": "dirichlet_client", "min_client_size": 999}),
        ({"early_stopping_patience": None}, {"early_stopping_patience": 3, "min_delta": 9.0}),
        ({"early_stopping_patience": 3}, {"early_stopping_patience": 99, "min_delta": 9.0}),
        ({}, {"partition_seed": 42, "split_seed": 42}),
    ],
)
def test_experiments_of_one_signature_have_one_outcome(
    one: dict[str, object], other: dict[str, object], run_to_end: RunToEnd
) -> None:
    assert Experiment(**{**SMALL, **one}).signature == Experiment(**{**SMALL, **other}).signature
    assert run_to_end(**one) == run_to_end(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"poison_ratio": 0.5}, {"poison_ratio": 0.5, "data_ordering": "good_bad"}),
        ({"poison_ratio": 0.5}, {"poison_ratio": 0.5, "poison_level": "client"}),
        ({"poison_ratio": 0.5}, {"poison_ratio": 0.5, "poison_type": "random_noise"}),
        ({"poison_ratio": 0.5}, {"poison_ratio": 0.5, **TARGET}),
        (
            {"poison_ratio": 0.5, "poison_level": "client", **TARGET},
            {"poison_ratio": 0.5, "poison_level": "client", "data_ordering": "bad_good", **TARGET},
        ),
        ({"poison_ratio": 1.0, **TARGET}, {"poison_ratio": 1.0, "data_ordering": "good_bad", **TARGET}),
        *(
            ({}, changes)
            for changes in (
                {"seed": 1},
                {"partition_seed": 1},
                {"split_seed": 1},
                {"model_type": "cnn"},
                {"width_factor": 5},
                {"depth": 2},
                {"alpha": 5.0},
                {"partition": "dirichlet_client"},
                {"partition": "iid"},
                {"min_client_size": 250},
                {"num_clients": 5},
                {"fraction_fit": 0.5},
                {"aggregator": "fedavg_uniform"},
                {"aggregator": "median"},
                {"batch_size": 16},
                {"global_rounds": 2},
                {"local_epochs": 2},
                {"lr": 0.05},
                {"momentum": 0.5},
                {"weight_decay": 0.1},
                {"max_grad_norm": 0.1},
                {"max_grad_norm": None},
                {"validation_split": 0.2},
                {"early_stopping_patience": 1, "min_delta": 9.0},
            )
        ),
    ],
)
def test_experiments_of_two_signatures_have_two_outcomes(
    one: dict[str, object], other: dict[str, object], run_to_end: RunToEnd
) -> None:
    assert Experiment(**{**SMALL, **one}).signature != Experiment(**{**SMALL, **other}).signature
    assert run_to_end(**one) != run_to_end(**other)


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    ("model", "accuracy"),
    [({"model_type": "lr", "width_factor": 32}, 0.85), ({"model_type": "cnn", "width_factor": 8}, 0.93)],
)
def test_it_learns_and_an_attack_costs_accuracy(
    model: dict[str, object], accuracy: float, run_to_end: RunToEnd
) -> None:
    parameters = {**model, "num_clients": 4, "local_epochs": 2, "alpha": 100, "lr": 0.05}
    clean = run_to_end(**parameters)
    poisoned = run_to_end(**parameters, poison_ratio=0.5, poison_level="client")
    assert clean.test_acc is not None
    assert poisoned.test_acc is not None
    assert poisoned.attack_success_rate is not None
    assert clean.test_acc > accuracy
    assert poisoned.test_acc < clean.test_acc - 0.1
    assert poisoned.attack_success_rate > 0.1
    assert clean.attack_success_rate is None
    assert (clean.poisoned_clients, clean.poisoned_samples) == (0, 0)
    assert poisoned.poisoned_clients == 2
    assert 0 < poisoned.poisoned_samples < 1293


def test_an_outcome_tells_what_was_measured(run_to_end: RunToEnd) -> None:
    outcome = run_to_end(poison_ratio=0.25)
    assert outcome.outcome == "ok"
    assert outcome.num_parameters == 64 * 4 + 4 + 2 * 4 + 4 * 10 + 10
    assert outcome.rounds_run == len(outcome.history) == 3
    assert [report.round for report in outcome.history] == [1, 2, 3]
    assert outcome.best_epoch == 1 + min(range(3), key=lambda place: outcome.history[place].val_loss)
    assert (outcome.val_loss, outcome.val_acc) == (
        outcome.history[outcome.best_epoch - 1].val_loss,
        outcome.history[outcome.best_epoch - 1].val_acc,
    )
    assert outcome.per_class_test_acc is not None
    assert len(outcome.per_class_test_acc) == 10
    assert outcome.poisoned_clients == 4
    assert (outcome.test_acc or 0) * 360 == pytest.approx(round((outcome.test_acc or 0) * 360))
    assert outcome.nonfinite_clients == 0


# ----------------------------------------------------------------------------------------------------------- the rounds


@contextmanager
def watched_evaluations(losses: Sequence[float] = ()) -> Iterator[list[dict[str, Tensor]]]:
    """The weights of every model that is evaluated meanwhile. `losses` stand in for the first losses measured."""
    evaluate = reference.evaluate_model
    script = iter(losses)
    weights: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, images: Tensor, labels: Tensor) -> Evaluation:
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        found = evaluate(model, images, labels)
        return replace(found, loss=next(script, found.loss))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "evaluate_model", watched)
        yield weights


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoiled(state: State, value: float = math.nan) -> State:
    """The same with one weight that is not finite."""
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["layers.1.weight"][0, 0] = value
    return changed


def test_aggregation_weighs_clients_by_all_their_training_samples(digits: ImageData, finish: RunToEnd) -> None:
    """One round in which all weights of client k become k: those of the global model are sum n_k k / sum n_k."""
    experiment = Experiment(**{**SMALL, "global_rounds": 1}, alpha=0.3)
    sizes = [len(own) for own in form_federation(experiment, digits).clients]

    def train(jobs: Sequence[ClientJob]) -> Iterator[State]:
        for client, job in enumerate(jobs):
            yield {name: torch.full_like(tensor, client) for name, tensor in job.model.state_dict().items()}

    with watched_evaluations() as weights:
        finish(experiment, digits, train_clients=train)
    expected = sum(client * size for client, size in enumerate(sizes)) / sum(sizes)
    assert abs(expected - 1.5) > 0.05, "the plain mean would be told apart"
    assert weights[0]["layers.1.weight"].unique().tolist() == pytest.approx([expected])
    assert weights[0]["layers.3.num_batches_tracked"].item() == 3


@pytest.mark.parametrize("aggregator", ["fedavg", "fedavg_uniform", "median"])
def test_a_round_starts_from_the_aggregate_of_the_last(aggregator: str, digits: ImageData, finish: RunToEnd) -> None:
    experiment = Experiment(**{**SMALL, "global_rounds": 2}, aggregator=aggregator, fraction_fit=0.75)
    started: list[dict[str, Tensor]] = []
    trained: list[list[State]] = []
    sizes: list[list[int]] = []

    def train(jobs: Sequence[ClientJob]) -> list[State]:
        started.append({name: tensor.clone() for name, tensor in jobs[0].model.state_dict().items()})
        sizes.append([len(job.loader.labels) for job in jobs])
        trained.append([train_one_client(job) for job in jobs])
        return trained[-1]

    finish(experiment, digits, train_clients=train)
    assert same(started[0], initial_model(experiment, digits).state_dict())
    assert len(trained[0]) == 3
    for name, tensor in started[1].items():
        stacked = torch.stack([state[name].double() for state in trained[0]])
        if not tensor.is_floating_point():
            expected = stacked.amax(dim=0)
        elif aggregator == "median":
            expected = stacked.median(dim=0).values  # of three, the middle one
        else:
            shares = sizes[0] if aggregator == "fedavg" else [1, 1, 1]
            expected = torch.tensordot(torch.tensor(shares).double() / sum(shares), stacked, dims=1)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-9)


def test_the_result_is_that_of_the_round_with_the_least_validation_loss(digits: ImageData, finish: RunToEnd) -> None:
    """Made to be least in round 2: its weights are tested, and its accuracy is told."""
    with watched_evaluations(losses=[5.0, 1.0, 3.0, 2.0]) as weights:
        outcome = finish(Experiment(**{**SMALL, "global_rounds": 4}), digits)
    assert (outcome.best_epoch, outcome.val_loss, outcome.rounds_run) == (2, 1.0, 4)
    assert outcome.val_acc == outcome.history[1].val_acc
    assert len({report.val_acc for report in outcome.history}) > 1
    assert same(weights[4], weights[1])
    assert not same(weights[4], weights[3])


@pytest.mark.parametrize(
    ("losses", "rounds_run", "best_epoch"),
    [
        ([3, 2, 2.5, 2.4, 2.3, 1], 5, 2),
        ([3, 2, 2.5, 2.4, 1.5, 1.6, 1.7, 1.8, 1], 8, 5),
        ([3, math.nan, math.inf, 4, 1], 4, 1),
        ([math.nan, math.nan, 5, 6, 7, 8, 1], 6, 3),
    ],
)
def test_early_stopping_ends_the_rounds(
    losses: list[float], rounds_run: int, best_epoch: int, digits: ImageData, finish: RunToEnd
) -> None:
    with watched_evaluations(losses) as weights:
        outcome = finish(Experiment(**{**SMALL, "global_rounds": 9}, early_stopping_patience=3), digits)
    assert (outcome.rounds_run, outcome.best_epoch) == (rounds_run, best_epoch)
    assert len(outcome.history) == rounds_run
    assert same(weights[-1], weights[best_epoch - 1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_whose_weights_are_not_finite_takes_no_part_and_is_counted(
    value: float, digits: ImageData, finish: RunToEnd
) -> None:
    experiment = Experiment(**{**SMALL, "global_rounds": 2}, alpha=0.5)
    trained: list[list[State]] = []
    sizes = [len(own) for own in form_federation(experiment, digits).clients]

    def train(jobs: Sequence[ClientJob]) -> list[State]:
        trained.append([train_one_client(job) for job in jobs])
        return [spoiled(state, value) if client == 1 else state for client, state in enumerate(trained[-1])]

    with watched_evaluations() as weights:
        outcome = finish(experiment, digits, train_clients=train)
    assert outcome.outcome == "ok"
    assert [report.nonfinite_clients for report in outcome.history] == [1, 1]
    assert outcome.nonfinite_clients == 2
    others = [0, 2, 3]
    total = sum(sizes[client] for client in others)
    expected = sum(trained[0][client]["layers.4.weight"].double() * sizes[client] / total for client in others)
    torch.testing.assert_close(weights[0]["layers.4.weight"].double(), expected, rtol=1e-6, atol=1e-9)


def assert_diverged(outcome: Outcome, *, rounds_run: int, nonfinite_clients: int) -> None:
    assert outcome.outcome == "diverged"
    assert (outcome.rounds_run, outcome.nonfinite_clients) == (rounds_run, nonfinite_clients)
    assert len(outcome.history) == rounds_run
    empty = {"test_acc", "test_loss", "val_acc", "val_loss", "best_epoch", "attack_success_rate", "per_class_test_acc"}
    assert {each.name for each in fields(outcome) if getattr(outcome, each.name) is None} == empty
    assert outcome.num_parameters == 318
    assert (outcome.poisoned_clients, outcome.poisoned_samples) == (4, 1293)


def test_an_experiment_with_no_finite_client_in_a_round_has_diverged(digits: ImageData) -> None:
    """Also where earlier rounds went well. The round is reported before the end."""

    def train(jobs: Sequence[ClientJob]) -> list[State]:
        trained.append([train_one_client(job) for job in jobs])
        return [spoiled(state) for state in trained[-1]] if len(trained) == 2 else trained[-1]

    trained: list[list[State]] = []
    rounds = run(Experiment(**{**SMALL, "global_rounds": 5}, poison_ratio=1.0), digits, train_clients=train)
    assert next(rounds).nonfinite_clients == 0
    second = next(rounds)
    assert second.nonfinite_clients == 4
    assert math.isnan(second.val_loss)
    assert math.isnan(second.val_acc)
    with pytest.raises(StopIteration) as end:
        next(rounds)
    assert_diverged(end.value.value, rounds_run=2, nonfinite_clients=4)


def test_an_experiment_whose_validation_loss_is_never_finite_has_diverged(digits: ImageData, finish: RunToEnd) -> None:
    with watched_evaluations(losses=[math.nan, math.inf, math.nan]):
        outcome = finish(Experiment(**SMALL, poison_ratio=1.0), digits)
    assert_diverged(outcome, rounds_run=3, nonfinite_clients=0)
    assert [str(report.val_loss) for report in outcome.history] == ["nan", "inf", "nan"]


def test_a_learning_rate_beyond_reason_diverges_by_itself(run_to_end: RunToEnd) -> None:
    outcome = run_to_end(lr=1e38, max_grad_norm=None, poison_ratio=1.0)
    assert_diverged(outcome, rounds_run=outcome.rounds_run, nonfinite_clients=outcome.nonfinite_clients)


def test_clients_of_one_sample_count_and_the_experiment_goes_on(
    random_data: Callable[..., ImageData], finish: RunToEnd
) -> None:
    """20 training samples among 20 clients: nobody can train, so the model stays what it was."""
    data = random_data(train=22)
    experiment = Experiment(**{**SMALL, "num_clients": 20}, partition="iid")
    with watched_evaluations() as weights:
        outcome = finish(experiment, data)
    assert (outcome.outcome, outcome.best_epoch, outcome.nonfinite_clients) == ("ok", 1, 0)
    assert same(weights[0], initial_model(experiment, data).state_dict())


# ------------------------------------------------------------------------------------------------------------- refusals


def test_a_partition_that_cannot_be_is_an_error_before_the_first_round(digits: ImageData) -> None:
    with pytest.raises(PartitionError, match="num_clients=200 clients min_client_size=10"):
        next(run(Experiment(**{**SMALL, "num_clients": 200}), digits))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"target_class": 5, "poison_label": 1}, "target_class is 5, but random has the classes 0 to 4"),
        ({"target_class": 1, "poison_label": 7}, "poison_label is 7, but random has the classes 0 to 4"),
    ],
)
def test_an_attack_on_a_class_that_is_not_there_is_an_error(
    parameters: dict[str, object], message: str, random_data: Callable[..., ImageData]
) -> None:
    with pytest.raises(DataError) as caught:
        next(run(Experiment(**SMALL, poison_ratio=0.5, **parameters), random_data(num_classes=5)))
    assert str(caught.value) == message


@pytest.mark.parametrize("attack", [{"poison_ratio": 0.5, "poison_type": "random_noise"}, {"poison_ratio": 0.0}])
def test_a_target_that_does_not_matter_is_not_refused(
    attack: dict[str, object], random_data: Callable[..., ImageData]
) -> None:
    next(run(Experiment(**SMALL, **attack, target_class=5, poison_label=1), random_data(num_classes=5)))


def test_images_of_one_class_are_an_error(random_data: Callable[..., ImageData]) -> None:
    with pytest.raises(DataError, match="random has images of one class only"):
        next(run(Experiment(**SMALL), random_data(num_classes=1)))
