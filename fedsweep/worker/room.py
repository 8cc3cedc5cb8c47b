"""How many experiments fit into memory together: an estimate, on the safe side."""

from __future__ import annotations

import psutil
import torch

from fedsweep.fl.data import ImageData
from fedsweep.fl.lanes import ModelShape, Trainer
from fedsweep.plan.experiment import Experiment
from fedsweep.worker.timing import Amounts

MOST_TOGETHER = 256
SHARE = 0.6  # of the free memory; the rest is for what the estimate does not know
COPIES = 5  # of an experiment's weights: the global ones, the best, stacked and packed for a round, a saved state
OVERHEAD_BYTES = 45_000_000  # what PyTorch and NumPy take when they first divide, train and aggregate
# Of a client's weights: what it returns, and for a median also what has been compared.
COPIES_TO_AGGREGATE = {"fedavg": 1, "fedavg_uniform": 1, "median": 2}
LABEL_BYTES = 8
NUMBER_BYTES = 4


def free_memory(device: str) -> int:
    """Bytes that are free on a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def how_many_fit(experiment: Experiment, data: ImageData, free_bytes: int, trainer: Trainer | None = None) -> int:
    """How many experiments like this one fit into memory together, 1 to `MOST_TOGETHER`."""
    room = SHARE * free_bytes - fixed_bytes(trainer)
    return max(1, min(MOST_TOGETHER, int(room / bytes_per_experiment(experiment, data, trainer))))


def fixed_bytes(trainer: Trainer | None) -> int:
    """Memory that training takes however many experiments there are.

    A trainer may say what it takes for itself by `fixed_bytes()`.
    """
    own = getattr(trainer, "fixed_bytes", None)
    return OVERHEAD_BYTES + (0 if own is None else int(own()))


def bytes_per_experiment(experiment: Experiment, data: ImageData, trainer: Trainer | None = None) -> int:
    """Memory that one more experiment takes.

    A trainer may say what one more lane takes it by `bytes_per_lane()`. For others, the activations of a batch are
    counted for every client on a GPU, which trains all at once; on a CPU only so many lanes are trained at once as
    there are threads, whatever the number of experiments.
    """
    amounts = Amounts.of(experiment, data)
    weights = ModelShape.of(experiment, data).layout.size * NUMBER_BYTES
    labels = 2 * LABEL_BYTES * len(data.train_labels)  # its own, and stacked
    logits = NUMBER_BYTES * data.num_classes * max(amounts.validation, len(data.test_labels))
    per_lane = COPIES_TO_AGGREGATE[experiment.aggregator] * weights
    own = getattr(trainer, "bytes_per_lane", None)
    if own is not None:
        per_lane += int(own())
    elif data.train_images.is_cuda:
        per_lane += 2 * weights + _activations(experiment, data)  # gradient and momentum
    return COPIES * weights + labels + logits + amounts.clients * per_lane


def _activations(experiment: Experiment, data: ImageData) -> int:
    """Bytes that a batch leaves for the way back: images, and of each block three maps."""
    side, total = data.img_size, data.in_channels * data.img_size**2
    for block in range(1, experiment.depth + 1):
        places = side**2 if experiment.model_type == "cnn" else 1
        total += 3 * places * experiment.width_factor
        if experiment.model_type == "cnn" and block % 2 == 0 and side > 1:
            side //= 2
    return NUMBER_BYTES * experiment.batch_size * total
