"""Which experiments can train together, which of them see the same images, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fedsweep.plan.experiment import Experiment, key_part

# Experiments that agree in these have tensors of the same shapes and make the same steps.
COHORT_PARAMETERS = ("dataset", "model_type", "width_factor", "depth", "batch_size", "local_epochs", "num_clients")
# Experiments that agree in these divide the training set alike, and every client sees its images in the same order.
SHARING_PARAMETERS = (
    *("seed", "split_seed", "validation_split", "num_clients", "fraction_fit"),
    *("partition_seed", "partition", "alpha", "min_client_size", "data_ordering"),
)
# What decides which samples are poisoned, and so their order where clean and poisoned ones are kept apart.
POISONED_PARAMETERS = ("poison_ratio", "poison_level", "target_class")

TRAINING_PASSES = 3  # forward, and twice that backward
# Batch norm, ReLU, their gradients and the like go over every activation several times and are bound by memory; one
# activation costs about as much as this many multiply-adds.
ELEMENTWISE = 16


@dataclass(frozen=True)
class ImageFormat:
    """What decides the cost of an experiment, of the images that it trains on."""

    train_images: int
    in_channels: int
    img_size: int  # side, in pixels
    num_classes: int


IMAGE_FORMATS = {
    "digits": ImageFormat(1_437, 1, 8, 10),
    "mnist": ImageFormat(60_000, 1, 28, 10),
    "fashion_mnist": ImageFormat(60_000, 1, 28, 10),
    "kmnist": ImageFormat(60_000, 1, 28, 10),
    "cifar10": ImageFormat(50_000, 3, 32, 10),
    "cifar100": ImageFormat(50_000, 3, 32, 100),
}
# A folder is not looked into before its experiments run, so it is taken for a data set of the usual size.
UNKNOWN_FORMAT = IMAGE_FORMATS["cifar10"]


def cohort_key(experiment: Experiment, engine: str = "batched") -> str:
    """What experiments that can train together have in common, as text.

    They may differ in everything else: seed, attack, aggregator, partition, learning rate, rounds. An experiment for
    the reference engine has a key of its own, so that it never trains with another.
    """
    if engine == "reference":
        return f"reference|{experiment.signature}"
    values = experiment.__dict__
    shape = (None if name == "width_factor" and values["depth"] == 0 else values[name] for name in COHORT_PARAMETERS)
    return "|".join(map(key_part, shape))


def sharing_key(experiment: Experiment) -> str:
    """What experiments whose clients see the same images in the same order have in common, as text.

    Such experiments of one cohort train fastest beside each other: each batch of images is gathered once.
    """
    values = experiment.canonical()
    names = SHARING_PARAMETERS if values["data_ordering"] == "shuffle" else SHARING_PARAMETERS + POISONED_PARAMETERS
    return "|".join(key_part(values[name]) for name in names)


@lru_cache(maxsize=4096)
def forward_cost(
    model_type: str, width_factor: int, depth: int, *, in_channels: int, img_size: int, num_classes: int
) -> float:
    """What one image costs forward, in multiply-adds; passes over activations count as `ELEMENTWISE` for each."""
    is_cnn = model_type == "cnn"
    side, features = img_size, in_channels if is_cnn else in_channels * img_size**2
    products, activations = 0, in_channels * img_size**2
    for block in range(1, depth + 1):
        places = side**2 if is_cnn else 1
        products += places * features * width_factor * (9 if is_cnn else 1)
        activations += places * width_factor
        features = width_factor
        if is_cnn and block % 2 == 0 and side > 1:
            side //= 2
    products += features * (side**2 if is_cnn else 1) * num_classes
    return float(products + ELEMENTWISE * activations)


def expected_cost(experiment: Experiment) -> float:
    """What an experiment costs if it makes all its rounds, in multiply-adds: good for comparing, not for seconds."""
    images = IMAGE_FORMATS.get(experiment.dataset, UNKNOWN_FORMAT)
    forward = forward_cost(
        experiment.model_type,
        experiment.width_factor,
        experiment.depth,
        in_channels=images.in_channels,
        img_size=images.img_size,
        num_classes=images.num_classes,
    )
    validated = images.train_images * experiment.validation_split
    taking_part = max(experiment.fraction_fit, 1 / experiment.num_clients)
    trained = (images.train_images - validated) * taking_part * experiment.local_epochs
    return forward * (TRAINING_PASSES * trained + validated) * experiment.global_rounds
