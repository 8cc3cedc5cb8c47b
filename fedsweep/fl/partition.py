"""Who holds which training sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsweep.errors import PartitionError
from fedsweep.fl.streams import permutation, rounded, stream

MAX_DRAWS = 1_000
Indices = NDArray[np.int64]


def split_validation(num_samples: int, validation_split: float, seed: int) -> tuple[Indices, Indices]:
    """Split N samples at random: the positions for training and those for validation, each sorted.

    Raises:
        PartitionError: the share is too small or too large to leave a sample on either side.
    """
    count = rounded(validation_split, num_samples)
    if not 0 < count < num_samples:
        raise PartitionError(
            f"validation_split={validation_split:g} of {num_samples} samples leaves {count} for validation and "
            f"{num_samples - count} for training; choose it so that both have some"
        )
    order = permutation(stream(seed, "split"), num_samples)
    return np.sort(order[count:]), np.sort(order[:count])


def partition_data_dirichlet(
    labels: ArrayLike,
    num_clients: int,
    alpha: float,
    *,
    seed: int,
    min_client_size: int = 10,
    method: str = "dirichlet_class",
) -> list[Indices]:
    """Divide samples among clients.

    Args:
        labels: [N], the class of each sample.
        num_clients: K.
        alpha: concentration of the Dirichlet distribution; the larger, the more alike the clients.
        seed: of the stream `partition`.
        min_client_size: `dirichlet_class` is drawn again until every client has this many samples.
        method: a key of `PARTITIONS`.

    Returns:
        For each client the positions of its samples in `labels`, sorted. Every position occurs exactly once.

    Raises:
        PartitionError: there are fewer samples than clients, or no draw gave every client enough of them.
    """
    classes = np.asarray(labels)
    if len(classes) < num_clients:
        raise PartitionError(
            f"{len(classes)} training samples cannot be divided among num_clients={num_clients}; lower num_clients"
        )
    return PARTITIONS[method](classes, num_clients, alpha, min_client_size, stream(seed, "partition"))


def _by_class(
    labels: Indices, num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Cut the shuffled samples of each class by p ~ Dir(alpha * 1_K).

    Yurochkin et al., *Bayesian Nonparametric Federated Learning of Neural Networks*, ICML 2019.
    """
    if min_size * num_clients > len(labels):
        raise PartitionError(
            f"{len(labels)} training samples are not enough to give each of num_clients={num_clients} clients "
            f"min_client_size={min_size}; lower num_clients or min_client_size"
        )
    # Which samples of a class come first does not depend on where it is cut: one shuffle serves every draw.
    members = _shuffled_by_class(labels, generator)
    counts = np.array([len(positions) for positions in members])
    for _ in range(MAX_DRAWS):
        cuts = _cuts(generator.dirichlet(np.full(num_clients, alpha), size=len(members)), counts)
        if np.diff(cuts, prepend=0).sum(axis=0).min() >= min_size:
            parts = [np.split(positions, cut[:-1]) for positions, cut in zip(members, cuts, strict=True)]
            return [np.sort(np.concatenate(own)) for own in zip(*parts, strict=True)]
    raise PartitionError(
        f"none of {MAX_DRAWS:,} draws with alpha={alpha:g} divided {len(labels)} training samples among "
        f"num_clients={num_clients} clients so that each has min_client_size={min_size}; raise alpha, or lower "
        "num_clients or min_client_size"
    )


def _cuts(shares: NDArray[np.float64], counts: Indices) -> Indices:
    """Where classes of `counts` [L] samples are cut by `shares` [L, K]: the end of each client's part, [L, K]."""
    ends = np.floor(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
    ends[:, -1] = counts  # the last client gets what is left, whatever the rounding of the sum
    return np.minimum(ends, counts[:, None])


def _by_client(
    labels: Indices, num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Clients of equal size (± 1), each with a class mix q ~ Dir(alpha * prior), drawn without replacement.

    The prior are the shares of the classes. Hsu, Qi & Brown, *Measuring the Effects of Non-Identical Data Distribution
    for Federated Visual Classification*, 2019.
    """
    members = _shuffled_by_class(labels, generator)
    taken = np.zeros(len(members), dtype=np.int64)
    counts = np.array([len(positions) for positions in members])
    clients = []
    for client in range(num_clients):
        size = len(labels) // num_clients + (client < len(labels) % num_clients)
        mix = generator.dirichlet(alpha * counts / len(labels))
        ends = taken + _drawn(generator, mix, counts - taken, size)
        own = [positions[a:b] for positions, a, b in zip(members, taken, ends, strict=True)]
        clients.append(np.sort(np.concatenate(own)))
        taken = ends
    return clients


def _drawn(generator: np.random.Generator, mix: NDArray[np.float64], left: Indices, size: int) -> Indices:
    """How many samples of each class `size` draws from `mix` take, of the `left` [L] that there are.

    A draw from a class that has none left is made again, which is a draw from the mix of the other classes.
    """
    drawn = np.zeros_like(left)
    while (missing := size - int(drawn.sum())) > 0:
        remaining = np.where(drawn < left, mix, 0.0)
        if remaining.sum() == 0:  # the client's own classes are used up; it takes of the others as they come
            remaining = (left - drawn).astype(np.float64)
        drawn += np.minimum(generator.multinomial(missing, remaining / remaining.sum()), left - drawn)
    return drawn


def _iid(
    labels: Indices, num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Equal shares (± 1) at random, whatever the class."""
    return [np.sort(part) for part in np.array_split(permutation(generator, len(labels)), num_clients)]


def _shuffled_by_class(labels: Indices, generator: np.random.Generator) -> list[Indices]:
    """For each class that occurs the positions of its samples, in random order."""
    shuffled = permutation(generator, len(labels))
    return [shuffled[labels[shuffled] == label] for label in np.unique(labels)]


PARTITIONS: dict[str, Callable[[Indices, int, float, int, np.random.Generator], list[Indices]]] = {
    "dirichlet_class": _by_class,
    "dirichlet_client": _by_client,
    "iid": _iid,
}
