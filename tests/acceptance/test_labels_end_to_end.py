"""Which image comes with which label where the training step receives it, from the files on disk onward.

Every image is known by its pixels and its true label is read from the files by other means than the package's. The
expected label of each image is worked out here anew from the definition of the attack.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from fedsweep.datasets import load_global_dataset
from fedsweep.fl import reference
from fedsweep.plan.experiment import Experiment

ATTACKS = {
    "flip": {"poison_type": "label_flip"},
    "noise": {"poison_type": "random_noise"},
    "targeted": {"poison_type": "label_flip", "target_class": 0, "poison_label": 7},
}
CASES = list(product(ATTACKS, ("sample", "client"), ("shuffle", "good_bad", "bad_good")))


@dataclass
class Received:
    """What one client's training received in one round: in order, each image's bytes and its label."""

    images: list[bytes] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Truth:
    """The files' own account: the true label of each training image by its bytes; every test image with its label."""

    dataset: str
    folder: Path | None
    num_classes: int
    label_of: dict[bytes, int]
    test: list[tuple[bytes, int]]


def bytes_of(images: torch.Tensor) -> list[bytes]:
    """Undo the normalisation: the bytes [C, S, S] of each image of a batch."""
    return [row.tobytes() for row in (images * 0.5 + 0.5).mul(255).round().to(torch.uint8).numpy()]


def unique_images(count: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), rng.permutation(np.arange(count) % 10)


def truth_of(dataset: str, folder: Path | None, train, test, num_classes: int = 10) -> Truth:
    label_of = {image.tobytes(): int(label) for image, label in zip(*train, strict=True)}
    pairs = [(image.tobytes(), int(label)) for image, label in zip(*test, strict=True)]
    return Truth(dataset, folder, num_classes, label_of, pairs)


def digits(_: Path) -> Truth:
    raw = load_digits()
    images = np.floor(raw.images * 255 / 16 + 0.5).astype(np.uint8)[:, None]
    is_test = np.arange(len(images)) % 5 == 0
    return truth_of("digits", None, (images[~is_test], raw.target[~is_test]), (images[is_test], raw.target[is_test]))


def idx_files(folder: Path) -> Truth:
    made = {"train": unique_images(700, (28, 28), 1), "t10k": unique_images(50, (28, 28), 2)}
    for part, (images, labels) in made.items():
        header = struct.pack(">4I", 0x803, len(images), 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2I", 0x801, len(labels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.astype(np.uint8).tobytes()))
    return truth_of("fashion_mnist", folder, made["train"], made["t10k"])


def cifar10_binary(folder: Path) -> Truth:
    train, test = unique_images(700, (3, 32, 32), 3), unique_images(50, (3, 32, 32), 4)
    parts = {f"data_batch_{i + 1}.bin": [values[i * 140 : (i + 1) * 140] for values in train] for i in range(5)}
    for name, (images, labels) in {**parts, "test_batch.bin": test}.items():
        records = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1)
        (folder / name).write_bytes(records.tobytes())
    return truth_of("cifar10", folder, train, test)


def cifar100_pickles(folder: Path) -> Truth:
    (images, labels), (test_images, test_labels) = unique_images(700, (3, 32, 32), 5), unique_images(50, (3, 32, 32), 6)
    train, test = (images, labels * 11), (test_images, test_labels * 11)
    for name, (images, labels) in {"train": train, "test": test}.items():
        content = {"data": images.reshape(len(images), -1), "fine_labels": [int(label) for label in labels]}
        # The official files were written by a NumPy that still had its core under this name.
        pickled = pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        (folder / name).write_bytes(pickled)
    return truth_of("cifar100", folder, train, test, 100)


def parquet_folder(folder: Path) -> Truth:
    made = {"train": unique_images(700, (8, 8), 7), "test": unique_images(50, (8, 8), 8)}
    for part, (images, labels) in made.items():
        encoded = [io.BytesIO() for _ in images]
        for image, stream in zip(images, encoded, strict=True):
            Image.fromarray(image).save(stream, "png")
        column = [{"bytes": stream.getvalue(), "path": None} for stream in encoded]
        pq.write_table(pa.table({"image": column, "label": labels}), folder / f"{part}-00000-of-00001.parquet")
    return truth_of(f"parquet:{folder}", None, made["train"], made["test"])


KINDS: dict[str, Callable[[Path], Truth]] = {
    each.__name__: each for each in (digits, idx_files, cifar10_binary, cifar100_pickles, parquet_folder)
}


@pytest.fixture(scope="module", params=KINDS)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return KINDS[request.param](tmp_path_factory.mktemp(request.param))


def receive(experiment: Experiment, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Received], set[bytes]]:
    """Run the whole pipeline, writing down what each client's training receives instead of training on it."""
    received: list[Received] = []
    evaluated: list[tuple[bytes, int]] = []

    def write_down(model, loader, experiment):
        received.append(Received())
        for images, labels in loader:
            received[-1].images += bytes_of(images)
            received[-1].labels += labels.tolist()

    evaluate = reference.evaluate_model

    def evaluate_and_write_down(model, images, labels):
        evaluated.extend((row.tobytes(), int(label)) for row, label in zip(images.numpy(), labels, strict=True))
        return evaluate(model, images, labels)

    monkeypatch.setattr(reference, "train_client", write_down)
    monkeypatch.setattr(reference, "evaluate_model", evaluate_and_write_down)
    rounds = reference.run(experiment, load_global_dataset(truth.dataset, truth.folder))
    outcome = None
    while outcome is None:
        try:
            next(rounds)
        except StopIteration as end:
            outcome = end.value
    num_test = len(truth.test)
    validation, test = evaluated[:-num_test], evaluated[-num_test:]
    assert test == truth.test, "the test set was changed"
    assert all(truth.label_of[image] == label for image, label in validation), "the validation set was changed"
    return received, {image for image, _ in validation}


def half_up(share: float, count: int) -> int:
    return int(share * count + 0.5)


@pytest.mark.parametrize(("attack", "level", "ordering"), CASES)
def test_every_label_that_training_receives(truth, attack, level, ordering, monkeypatch):
    check_labels(truth, attack, level, ordering, monkeypatch)


def check_labels(truth: Truth, attack: str, level: str, ordering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment(
        dataset=truth.dataset,
        model_type="lr",
        depth=0,
        num_clients=4,
        alpha=5.0,
        poison_ratio=0.3,
        poison_level=level,
        data_ordering=ordering,
        batch_size=50,
        local_epochs=2,
        global_rounds=1,
        **ATTACKS[attack],
    )
    received, validation = receive(experiment, truth, monkeypatch)
    wanted = {
        "flip": lambda y: {truth.num_classes - 1 - y},
        "noise": lambda y: set(range(truth.num_classes)) - {y},
        "targeted": lambda y: {7},
    }[attack]
    seen: list[bytes] = []
    malicious = 0
    for client in received:
        true = [truth.label_of[image] for image in client.images]
        may_be_poisoned = [attack != "targeted" or y == 0 for y in true]
        half = len(true) // 2  # two local epochs
        assert sorted(client.images[:half]) == sorted(client.images[half:]), "an epoch left an image out"
        assert dict(zip(client.images[:half], client.labels[:half], strict=True)) == dict(
            zip(client.images[half:], client.labels[half:], strict=True)
        ), "an image changed its label between epochs"
        poisoned = [y != label for y, label in zip(true, client.labels, strict=True)]
        for y, label, is_poisoned, allowed in zip(true, client.labels, poisoned, may_be_poisoned, strict=True):
            assert not is_poisoned or (allowed and label in wanted(y))
        eligible = sum(may_be_poisoned[:half])
        if level == "sample":
            assert sum(poisoned[:half]) == half_up(0.3, eligible)
        elif any(poisoned):
            assert poisoned == may_be_poisoned, "a malicious client poisons everything that it may"
            malicious += 1
        for epoch in (poisoned[:half], poisoned[half:]):
            if ordering == "good_bad":
                assert epoch == sorted(epoch)
            elif ordering == "bad_good":
                assert epoch == sorted(epoch, reverse=True)
        seen += client.images[:half]
    if level == "client":
        assert malicious == 1  # 0.3 of 4 is 1.2
    assert len(seen) == len(set(seen)) == len(truth.label_of) - len(validation), "an image is missing or given twice"
    assert not validation & set(seen), "a validation image was trained on"
    assert len(validation) == half_up(0.1, len(truth.label_of))


@pytest.mark.shared_data
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("dataset", ["mnist", "cifar10-jpeg"])
def test_real_images_keep_or_change_their_own_label(dataset, attack, shared_data, monkeypatch):
    truth = real_mnist(shared_data) if dataset == "mnist" else real_parquet(shared_data)
    check_labels(truth, attack, "sample", "shuffle", monkeypatch)


@lru_cache(maxsize=1)
def real_mnist(shared: Path) -> Truth:
    def read(name: str, offset: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((shared / "mnist" / name).read_bytes()), np.uint8, offset=offset)

    def part(name: str) -> tuple[np.ndarray, np.ndarray]:
        return (
            read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28),
            read(f"{name}-labels-idx1-ubyte.gz", 8),
        )

    return truth_of("mnist", shared, part("train"), part("t10k"))


@lru_cache(maxsize=1)
def real_parquet(shared: Path) -> Truth:
    def part(name: str) -> tuple[np.ndarray, np.ndarray]:
        table = pq.read_table(shared / "cifar10-jpeg" / f"{name}.parquet")
        images = [np.asarray(Image.open(io.BytesIO(cell["bytes"].as_py()))) for cell in table["img"]]
        return np.stack(images).transpose(0, 3, 1, 2), table["label"].to_numpy()

    return truth_of(f"parquet:{shared / 'cifar10-jpeg'}", None, part("train"), part("test"))
