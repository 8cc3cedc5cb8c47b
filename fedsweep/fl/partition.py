"""Who holds which training sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedsweep.errors import PartitionError
from fedsweep.fl.streams import permutation, rounded, stream
from fedsweep.plan.experiment import Experiment

MAX_DRAWS = 1_000
Indices = NDArray[np.int64]


def split_validation(num_samples: int, validation_split: float, seed: int) -> tuple[Indices, Indices]:
    """The indices of the training part and of the validation part, each sorted."""
    order = permutation(stream(seed, "split"), num_samples)
    num_validation = rounded(validation_split, num_samples)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def partition_data_dirichlet(
    labels: NDArray[np.int64],
    num_clients: int,
    alpha: float,
    seed: int = 42,
    min_client_size: int = 10,
    method: str = "dirichlet_class",
) -> list[Indices]:
    """Divide samples among clients.

    Args:
        labels: [N], the class of each sample.
        num_clients: K.
        alpha: concentration of the Dirichlet distribution; large is nearly iid.
        seed: of the stream `partition`.
        min_client_size: `dirichlet_class` is drawn again until every client has this many samples.
        method: a key of `PARTITIONS`.

    Returns:
        For each client the positions in `labels` of its samples, sorted. Every position occurs exactly once.

    Raises:
        PartitionError: there are fewer samples than clients, or no draw gave every client enough samples.
    """
    if len(labels) < num_clients:
        raise PartitionError(f"{len(labels)} training samples cannot be divided among {num_clients} clients")
    generator = stream(seed, "partition")
    return PARTITIONS[method](labels, num_clients, alpha, min_client_size, generator)


def partition(experiment: Experiment, labels: NDArray[np.int64]) -> list[Indices]:
    """The partition that an experiment asks for; see `partition_data_dirichlet`."""
    seed = experiment.seed if experiment.partition_seed is None else experiment.partition_seed
    return partition_data_dirichlet(
        labels, experiment.num_clients, experiment.alpha, seed, experiment.min_client_size, experiment.partition
    )


def _by_class(
    labels: NDArray[np.int64], num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Cut the shuffled samples of each class by p ~ Dir(alpha) (Yurochkin et al. 2019)."""
    # Which sample is where in its class is independent of where the class is cut, so the shuffle need not be repeated.
    shuffled = permutation(generator, len(labels))
    classes = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    if min_size * num_clients <= len(labels):
        for _ in range(MAX_DRAWS):
            cuts = [_cuts(generator, num_clients, alpha, len(members)) for members in classes]
            sizes = sum(np.diff(cut) for cut in cuts)
            if np.min(sizes) >= min_size:
                return _gathered(classes, cuts, num_clients)
    raise PartitionError(
        f"in {MAX_DRAWS} draws with alpha={alpha:g} no division of {len(labels)} training samples among {num_clients} "
        f"clients gave each at least min_client_size={min_size}; raise alpha, or lower num_clients or min_client_size"
    )


def _cuts(generator: np.random.Generator, num_clients: int, alpha: float, size: int) -> Indices:
    """Where the samples of a class are cut: K+1 positions from 0 to `size`."""
    shares = _dirichlet(generator, np.full(num_clients, alpha))
    inner = np.floor(np.cumsum(shares)[:-1] * size).astype(np.int64)
    return np.concatenate(([0], np.minimum(inner, size), [size]))


def _dirichlet(generator: np.random.Generator, concentration: NDArray[np.float64]) -> NDArray[np.float64]:
    """One draw from a Dirichlet distribution; where every gamma draw underflows, all mass falls on one component."""
    with np.errstate(all="ignore"):
        shares = generator.dirichlet(concentration)
    if np.isfinite(shares).all() and shares.sum() > 0:
        return shares
    single = np.zeros(len(concentration))
    single[generator.choice(len(concentration), p=concentration / concentration.sum())] = 1.0
    return single


def _gathered(classes: Sequence[Indices], cuts: Sequence[Indices], num_clients: int) -> list[Indices]:
    parts = [np.split(members, cut[1:-1]) for members, cut in zip(classes, cuts, strict=True)]
    return [np.sort(np.concatenate([part[client] for part in parts])) for client in range(num_clients)]


def _by_client(
    labels: NDArray[np.int64], num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Clients of equal size, each with a class mix q ~ Dir(alpha * prior) (Hsu et al. 2019), without replacement."""
    shuffled = permutation(generator, len(labels))
    pools = [shuffled[labels[shuffled] == label] for label in np.unique(labels)]
    left = np.array([len(pool) for pool in pools])
    prior = left / left.sum()
    sizes = np.full(num_clients, len(labels) // num_clients)
    sizes[: len(labels) % num_clients] += 1
    clients = []
    for size in sizes:
        taken = _take(generator, left, _dirichlet(generator, alpha * prior), int(size))
        start = np.array([len(pool) for pool in pools]) - left
        clients.append(np.sort(np.concatenate([p[s : s + t] for p, s, t in zip(pools, start, taken, strict=True)])))
        left = left - taken
    return clients


def _take(generator: np.random.Generator, left: Indices, mix: NDArray[np.float64], size: int) -> Indices:
    """How many samples of each class a client draws; classes that run out pass their share on to the others."""
    taken = np.zeros_like(left)
    while (missing := size - int(taken.sum())) > 0:
        open_mix = np.where(taken < left, mix, 0.0)
        if open_mix.sum() <= 0:  # the client's own classes are used up: what is left decides
            open_mix = (left - taken).astype(np.float64)
        taken += np.minimum(generator.multinomial(missing, open_mix / open_mix.sum()), left - taken)
    return taken


def _iid(
    labels: NDArray[np.int64], num_clients: int, alpha: float, min_size: int, generator: np.random.Generator
) -> list[Indices]:
    """Equal shares (± 1) at random."""
    return [np.sort(part) for part in np.array_split(permutation(generator, len(labels)), num_clients)]


PARTITIONS: dict[str, Callable[[NDArray[np.int64], int, float, int, np.random.Generator], list[Indices]]] = {
    "dirichlet_class": _by_class,
    "dirichlet_client": _by_client,
    "iid": _iid,
}
