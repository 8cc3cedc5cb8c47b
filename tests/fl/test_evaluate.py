"""Loss, accuracy and attack success by hand; early stopping by tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedsweep.fl import EarlyStopping, evaluate_model
from fedsweep.fl.data import normalised
from fedsweep.fl.evaluate import attack_success_rate, per_class_accuracy
from fedsweep.plan.experiment import Experiment

NAN, INF = math.nan, math.inf


def test_bytes_become_numbers_from_minus_one_to_one():
    assert normalised(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-1.0, -0.6, 1.0])


class Fixed(nn.Module):
    """Answers with logits that the first pixel selects."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long()]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_loss_and_accuracy_by_hand(batch_size):
    model = Fixed([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)]])
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1)
    found = evaluate_model(model, images, torch.tensor([0, 0, 0]), batch_size)
    assert found.loss == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(5)) / 3)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.predictions.tolist() == [0, 0, 1]
    assert not model.training


def test_nothing_to_evaluate_on_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        evaluate_model(Fixed([[0.0]]), torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.long))


def test_accuracy_of_each_class():
    found = per_class_accuracy(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 0]), 3)
    assert found == (pytest.approx(2 / 3), 1.0, None)


def test_attack_success_of_a_label_flip_leaves_out_the_middle_class():
    experiment = Experiment(poison_ratio=0.5)
    labels, predictions = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([2, 0, 1, 0, 1])
    # 3 classes: 0 wants 2, 2 wants 0, and 1 wants itself: two of four succeed
    assert attack_success_rate(experiment, predictions, labels, 3) == 0.5


def test_attack_success_of_a_targeted_flip_counts_the_target_class():
    experiment = Experiment(poison_ratio=0.5, target_class=1, poison_label=0)
    labels, predictions = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([0, 0, 1, 0, 0])
    assert attack_success_rate(experiment, predictions, labels, 3) == pytest.approx(2 / 3)
    assert attack_success_rate(experiment, predictions[:1], labels[:1], 3) is None


@pytest.mark.parametrize("parameters", [{"poison_ratio": 0.0}, {"poison_ratio": 0.5, "poison_type": "random_noise"}])
def test_no_attack_success_where_no_label_was_wanted(parameters):
    labels = torch.tensor([0, 1])
    assert attack_success_rate(Experiment(**parameters), labels, labels, 2) is None


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops_after", "best"),
    [
        (2, 0.0, [3, 2, 2, 2], 4, 2),
        (2, 0.0, [3, 2, 2.5, 1, 1, 1], 6, 4),
        (1, 0.0, [3, 3], 2, 1),
        (2, 0.0, [1, NAN, INF], 3, 1),
        (2, 0.0, [NAN, NAN], 2, None),
        (3, 0.0, [NAN, 2, 3, 1], None, 4),
        # Falls that are too small count as no progress, and yet the least loss is the best.
        (2, 0.5, [3, 2.9, 2.8], 3, 3),
        (2, 0.5, [3, 2.9, 2.3, 2.2], None, 4),
        (2, 0.5, [3, 2.5, 2.0], 3, 3),  # below by exactly min_delta is not below best - min_delta
        (None, 0.0, [1, 2, 2, 2, 2], None, 1),
    ],
)
def test_early_stopping(patience, min_delta, losses, stops_after, best):
    stopping = EarlyStopping(patience, min_delta)
    stopped = None
    for number, loss in enumerate(losses, start=1):
        stopping.update(number, loss)
        if stopping.should_stop and stopped is None:
            stopped = number
    assert (stopped, stopping.best_round) == (stops_after, best)
