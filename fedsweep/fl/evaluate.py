"""How good a model is, and how well an attack did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsweep.fl.data import normalised
from fedsweep.fl.poison import wanted_labels
from fedsweep.fl.repeatable import repeatable
from fedsweep.plan.experiment import Experiment

BATCH_SIZE = 500


@dataclass(frozen=True)
class Evaluation:
    """A model on a set of M images."""

    loss: float  # mean cross-entropy over the images, in nats; may be nan or inf
    accuracy: float  # share of the images predicted right
    per_class_accuracy: tuple[float | None, ...]  # the same for the images of each class; None for a class without any
    predictions: Tensor  # int64 [M]


@repeatable()
@torch.inference_mode()
def evaluate_model(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = BATCH_SIZE) -> Evaluation:
    """Evaluate a model on images uint8 [M, C, S, S] with labels int64 [M]. The model is left in evaluation mode.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to evaluate the model on")
    model.eval()
    logits = torch.cat([model(normalised(batch)) for batch in torch.split(images, batch_size)])
    return evaluation_of(logits, labels)


def evaluation_of(logits: Tensor, labels: Tensor) -> Evaluation:
    """What logits [M, L] say of images with labels int64 [M]."""
    losses = functional.cross_entropy(logits, labels, reduction="none")
    predictions = logits.argmax(dim=1)
    right = predictions == labels
    return Evaluation(
        loss=losses.double().mean().item(),
        accuracy=int(right.sum()) / len(labels),
        per_class_accuracy=_per_class(right, labels, logits.shape[1]),
        predictions=predictions,
    )


def _per_class(right: Tensor, labels: Tensor, num_classes: int) -> tuple[float | None, ...]:
    hits = torch.bincount(labels[right], minlength=num_classes).tolist()
    sizes = torch.bincount(labels, minlength=num_classes).tolist()
    return tuple(hit / size if size else None for hit, size in zip(hits, sizes, strict=True))


def attack_success_rate(experiment: Experiment, predictions: Tensor, labels: Tensor, num_classes: int) -> float | None:
    """The share of test images that are predicted as the label that a label flip wanted.

    Images that bear the wanted label already are left out; so with a target the images of `target_class` are left.

    Args:
        experiment: the attack.
        predictions: [M], what the model says.
        labels: [M], the truth.
        num_classes: L.

    Returns:
        None where nothing was poisoned on purpose (ratio 0), where no label was wanted (random noise), and where no
        image is left.
    """
    if experiment.poison_ratio == 0 or experiment.poison_type != "label_flip":
        return None
    truth = labels.cpu().numpy()
    wanted = wanted_labels(experiment, truth, num_classes)
    counted = wanted != truth
    if not counted.any():
        return None
    return float((predictions.cpu().numpy() == wanted)[counted].mean())
