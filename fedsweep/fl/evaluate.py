"""How good a model is, and how well an attack did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsweep.fl.data import normalised
from fedsweep.plan.experiment import Experiment

BATCH = 1_000


@dataclass(frozen=True)
class Evaluation:
    """A model on a set of M images."""

    loss: float  # mean cross-entropy over the images, in nats
    accuracy: float  # share of the images predicted right
    predictions: Tensor  # int64 [M]


@torch.no_grad()
def evaluate_model(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = BATCH) -> Evaluation:
    """Evaluate on images [M, C, S, S] (bytes) with labels [M]; the model is left in evaluation mode.

    Raises:
        ValueError: there are no images.
    """
    if len(labels) == 0:
        raise ValueError("there are no images to evaluate on")
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=labels.device)
    predictions = []
    for part, truth in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        logits = model(normalised(part))
        loss += functional.cross_entropy(logits, truth, reduction="sum").double()
        predictions.append(logits.argmax(dim=1))
    predicted = torch.cat(predictions)
    accuracy = (predicted == labels).sum().item() / len(labels)
    return Evaluation(loss.item() / len(labels), accuracy, predicted)


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> tuple[float | None, ...]:
    """For each class the share of its images predicted right; None for a class without images."""
    right = torch.bincount(labels[predictions == labels], minlength=num_classes).tolist()
    total = torch.bincount(labels, minlength=num_classes).tolist()
    return tuple(r / t if t else None for r, t in zip(right, total, strict=True))


def attack_success_rate(experiment: Experiment, predictions: Tensor, labels: Tensor, num_classes: int) -> float | None:
    """Share of test images predicted as the label that a label flip wanted.

    Images that bear the wanted label already are left out; with a target, only images of `target_class` count.
    None where there is no such label (random noise, no attack) or no image.
    """
    if experiment.poison_type != "label_flip" or experiment.poison_ratio == 0:
        return None
    wanted = labels.new_full(labels.shape, experiment.poison_label or 0)
    counted = labels == (experiment.target_class or 0)
    if not experiment.is_targeted:
        wanted = num_classes - 1 - labels
        counted = wanted.ne(labels)
    if not counted.any():
        return None
    return (predictions[counted] == wanted[counted]).double().mean().item()
