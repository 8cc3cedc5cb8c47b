from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedsweep.fl import evaluate_model
from fedsweep.fl.data import normalised
from fedsweep.fl.evaluate import attack_success_rate
from fedsweep.plan.experiment import Experiment


class Fixed(nn.Module):
    """Answers with a row of logits, chosen by the byte of the image's only pixel. Says in which mode it was asked."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.logits[((images.flatten() * 0.5 + 0.5) * 255).round().long()]


def pixels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    found = normalised(torch.arange(256, dtype=torch.uint8))
    assert found.dtype == torch.float32
    assert found[[0, 51, 255]].tolist() == [-1.0, pytest.approx(-0.6), 1.0]
    assert torch.equal(found, (torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5)


def test_normalising_leaves_the_bytes_alone() -> None:
    images = pixels(0, 255)
    normalised(images)
    assert images.flatten().tolist() == [0, 255]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_loss_and_accuracy_by_hand(batch_size: int) -> None:
    """Softmax of (0, 0) is 1/2 each, of (ln 3, 0) 3/4 and 1/4, of (0, ln 4) 1/5 and 4/5. All are of class 0."""
    model = Fixed([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)]])
    found = evaluate_model(model, pixels(0, 1, 2), torch.tensor([0, 0, 0]), batch_size)
    assert found.loss == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(5)) / 3)
    assert found.accuracy == 2 / 3
    assert found.predictions.tolist() == [0, 0, 1]


def test_accuracy_of_each_class() -> None:
    model = Fixed([[9.0, 0.0, 0.0, 0.0], [0.0, 9.0, 0.0, 0.0]])
    found = evaluate_model(model, pixels(0, 1, 1, 0, 0), torch.tensor([0, 0, 1, 0, 3]))
    assert found.per_class_accuracy == (2 / 3, 1.0, None, 0.0)
    assert found.accuracy == 3 / 5


def test_the_model_is_in_evaluation_mode_without_gradients() -> None:
    model = Fixed([[0.0, 1.0]]).train()
    evaluate_model(model, pixels(0), torch.tensor([1]))
    assert model.modes == {(False, False)}
    assert not model.training


def test_a_loss_that_is_not_finite_is_told() -> None:
    found = evaluate_model(Fixed([[math.inf, 0.0], [0.0, 0.0]]), pixels(0, 1), torch.tensor([1, 1]))
    assert not math.isfinite(found.loss)


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate_model(Fixed([[0.0]]), pixels(), torch.zeros(0, dtype=torch.int64))


def success(experiment: Experiment, labels: list[int], predictions: list[int], num_classes: int) -> float | None:
    return attack_success_rate(experiment, torch.tensor(predictions), torch.tensor(labels), num_classes)


def test_a_label_flip_succeeds_where_the_flipped_label_is_predicted() -> None:
    """Wanted are 3, 2, 1, 0 and 3: three of five come out."""
    assert success(Experiment(poison_ratio=0.5), [0, 1, 2, 3, 0], [3, 2, 0, 0, 0], 4) == 3 / 5


def test_images_that_bear_the_wanted_label_already_are_left_out() -> None:
    """Of 3 classes, 0 wants 2 and 2 wants 0; 1 wants itself. Two of four."""
    assert success(Experiment(poison_ratio=0.5), [0, 0, 1, 2, 2], [2, 0, 1, 0, 1], 3) == 1 / 2
    assert success(Experiment(poison_ratio=0.5), [1, 1], [1, 1], 3) is None


def test_a_targeted_flip_counts_images_of_the_target_class_only() -> None:
    experiment = Experiment(poison_ratio=0.5, target_class=1, poison_label=0)
    assert success(experiment, [0, 1, 1, 1, 2], [0, 0, 1, 0, 0], 3) == 2 / 3
    assert success(experiment, [0, 2], [0, 0], 3) is None


@pytest.mark.parametrize(
    "parameters",
    [
        {"poison_ratio": 0.0},
        {"poison_ratio": 0.0, "target_class": 0, "poison_label": 1},
        {"poison_ratio": 0.5, "poison_type": "random_noise"},
        {"poison_ratio": 0.5, "poison_type": "random_noise", "target_class": 0, "poison_label": 1},
    ],
)
def test_no_attack_success_where_no_label_was_wanted(parameters: dict[str, object]) -> None:
    assert success(Experiment(**parameters), [0, 1], [1, 0], 2) is None
