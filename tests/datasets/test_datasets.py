"""From a name to tensors: the official files in every form and place, and the real ones."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedsweep.datasets import default_data_dirs, load_global_dataset, prepare
from fedsweep.datasets.sources import SOURCES
from fedsweep.errors import DataError


def assert_same(data, small, num_classes):
    assert data.num_classes == num_classes
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        loaded, expected = getattr(data, name), getattr(small, name)
        assert loaded.dtype == (torch.uint8 if "images" in name else torch.int64)
        assert np.array_equal(loaded.numpy(), expected)


def test_digits_are_scikit_learns_with_every_fifth_for_testing():
    from sklearn.datasets import load_digits

    official = load_digits()
    data = load_global_dataset("digits")
    assert (data.name, data.num_classes) == ("digits", 10)
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.uint8
    assert data.test_labels.tolist() == official.target[[*range(0, 1797, 5)]].tolist()
    assert data.train_labels[:4].tolist() == official.target[1:5].tolist()
    # 0 → 0, 16 → 255, and between by the nearest byte, halves up: 8 · 255 / 16 = 127.5 → 128
    scaled = {0: 0, 1: 16, 5: 80, 8: 128, 15: 239, 16: 255}
    first = official.images[0].astype(int)
    for value, byte in scaled.items():
        assert (data.test_images[0, 0].numpy()[first == value] == byte).all()
    assert {0, 1, 5, 8, 15} <= set(first.ravel())
    assert data.train_images.max() == 255


def test_a_data_set_is_loaded_once():
    assert load_global_dataset("digits") is load_global_dataset("digits")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
@pytest.mark.parametrize("form", ["plain", "gz"])
@pytest.mark.parametrize("subfolder", ["", "own", "raw"])
def test_idx_files_in_a_folder(name, form, subfolder, idx_files, write, tmp_path):
    small, files = idx_files
    place = {"": "", "own": name, "raw": SOURCES[name].forms[0].folders[-1]}[subfolder]
    write(tmp_path / "data" / place, files, form)
    assert_same(load_global_dataset(name, tmp_path / "data"), small, 10)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("packing", ["plain", "tar", "gz"])
def test_cifar_files_in_a_folder_or_an_archive(name, classes, form, packing, cifar_files, write, tmp_path):
    small, files = cifar_files(name, form)
    published = next(each for each in SOURCES[name].forms if form in str(each.archive))
    place = tmp_path / "data" / ("" if packing == "tar" else published.folders[1])
    write(place, files, packing, published.archive, f"{published.folders[1]}/")
    assert_same(load_global_dataset(name, tmp_path / "data"), small, classes)


def test_the_folder_that_the_environment_names_is_used(idx_files, write, tmp_path, monkeypatch):
    small, files = idx_files
    monkeypatch.setenv("FEDSWEEP_DATA", str(write(tmp_path / "mine", files)))
    assert default_data_dirs() == [tmp_path / "mine"]
    assert_same(load_global_dataset("mnist"), small, 10)


def test_the_named_folder_comes_before_the_environments(idx_files, write, tmp_path, monkeypatch):
    small, files = idx_files
    other = {name: content[:-1] + b"\x07" for name, content in files.items()}
    monkeypatch.setenv("FEDSWEEP_DATA", str(write(tmp_path / "other", other)))
    assert_same(load_global_dataset("mnist", write(tmp_path / "mine", files)), small, 10)


def test_a_set_smaller_than_the_official_one_is_said_to_be(idx_files, write, tmp_path, caplog):
    load_global_dataset("mnist", write(tmp_path / "data", idx_files[1]))
    assert "30 training and 6 test images, where the official mnist has 60000 and 10000" in caplog.text


def test_the_files_of_a_data_set_with_the_same_file_names_are_refused(idx_files, write, tmp_path):
    """Fashion-MNIST's four files are called as MNIST's; taking one for the other would spoil a study in silence."""
    files = dict(idx_files[1])
    fashion = bytes(SOURCES["fashion_mnist"].first_labels)
    labels = "train-labels-idx1-ubyte"
    files[labels] = files[labels][:8] + fashion + files[labels][8 + len(fashion) :]
    folder = write(tmp_path / "data", files)
    with pytest.raises(DataError) as refused:
        load_global_dataset("mnist", folder)
    assert str(refused.value) == (
        f"{folder}/train-labels-idx1-ubyte: found the labels of fashion_mnist; expected mnist. "
        "Put each data set into a sub-folder of its own (mnist or MNIST/raw)."
    )
    assert load_global_dataset("fashion_mnist", folder).num_classes == 10


def test_a_whole_set_with_other_labels_is_refused(sample, idx, write, tmp_path):
    small = sample((1, 1, 1), 3, 60_000, 10_000)
    arrays = (small.train_images[:, 0], small.train_labels, small.test_images[:, 0], small.test_labels)
    names = SOURCES["mnist"].forms[0].members
    files = {name: idx(array.astype(np.uint8)) for name, array in zip(names, arrays, strict=True)}
    with pytest.raises(DataError, match="found other labels than those of mnist"):
        load_global_dataset("mnist", write(tmp_path / "data", files))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("t10k-images-idx3-ubyte", lambda _: b"", "begins with 0x; expected 0x00000803"),
        (
            "t10k-images-idx3-ubyte",
            lambda old: old[:-1],
            "found 165 bytes; expected 166 for 6×5×5 values: it is cut off",
        ),
        (
            "t10k-labels-idx1-ubyte",
            lambda old: old + b"\0",
            "found 15 bytes; expected 14 for 6 values: it has bytes after",
        ),
        ("t10k-labels-idx1-ubyte", lambda old: old[:6], "found 6 bytes; expected a header of 8: it is cut off"),
        (
            "train-labels-idx1-ubyte",
            lambda old: old[:2] + b"\x0d" + old[3:],
            "begins with 0x00000d01; expected 0x00000801",
        ),
        ("train-labels-idx1-ubyte", lambda old: old[:-1] + b"\x0a", "found label 10; expected 0 to 9"),
        ("train-labels-idx1-ubyte", lambda old: old[:7] + b"\x1d" + old[8:-1], "found 29 labels for 30 images"),
        ("train-images-idx3-ubyte", lambda old: b"\x1f\x8b" + old[2:], "begins with 0x1f8b0803; expected 0x00000803"),
    ],
)
def test_a_damaged_idx_file_is_named_with_what_was_found_and_expected(
    file, change, message, idx_files, write, tmp_path
):
    files = dict(idx_files[1])
    files[file] = change(files[file])
    folder = write(tmp_path / "data", files)
    with pytest.raises(DataError) as refused:
        load_global_dataset("mnist", folder)
    assert str(refused.value).startswith(f"{folder}/{file}: ")
    assert message in str(refused.value)


@pytest.mark.parametrize("cut", [1, 5, 20, -4])
def test_a_damaged_gzip_file_is_named(cut, idx_files, write, tmp_path):
    folder = write(tmp_path / "data", idx_files[1], "gz")
    damaged = folder / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:cut])
    with pytest.raises(DataError, match=rf"^{damaged}: cannot be read: "):
        load_global_dataset("mnist", folder)


def test_training_and_test_images_have_one_size(idx_files, idx, write, tmp_path):
    files = idx_files[1] | {"t10k-images-idx3-ubyte": idx(np.zeros((6, 4, 4), np.uint8))}
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: found images of 1×4×4; expected 1×5×5 as in"):
        load_global_dataset("mnist", write(tmp_path / "data", files))


@pytest.mark.parametrize(("record", "name"), [(3073, "cifar10"), (3074, "cifar100")])
def test_a_cut_cifar_binary_is_named(record, name, cifar_files, write, tmp_path):
    _, files = cifar_files(name, "binary")
    last = list(files)[-1]
    folder = write(tmp_path / "data", files | {last: files[last][:-1]})
    with pytest.raises(DataError) as refused:
        load_global_dataset(name, folder)
    expected = len(files[last])
    assert str(refused.value) == (
        f"{folder}/{last}: found {expected - 1} bytes; expected {expected} for whole records of {record}: it is cut off"
    )


def test_a_damaged_archive_is_named(cifar_files, write, tmp_path):
    folder = write(tmp_path / "data", cifar_files("cifar10", "binary")[1], "tar", "cifar-10-binary.tar.gz")
    archive = folder / "cifar-10-binary.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(DataError, match=rf"^{archive}: cannot be read: "):
        load_global_dataset("cifar10", folder)


def test_an_archive_without_a_file_is_named(cifar_files, write, tmp_path):
    _, files = cifar_files("cifar10", "binary")
    del files["data_batch_3.bin"]
    folder = write(tmp_path / "data", files, "tar", "cifar-10-binary.tar.gz")
    with pytest.raises(DataError, match=rf"^{folder}/cifar-10-binary.tar.gz: found no data_batch_3.bin in it$"):
        load_global_dataset("cifar10", folder)


def test_a_link_out_of_an_archive_is_not_followed(cifar_files, write, tmp_path):
    import tarfile

    _, files = cifar_files("cifar10", "binary")
    folder = write(tmp_path / "data", files, "tar", "cifar-10-binary.tar.gz")
    (tmp_path / "secret").write_bytes(files["test_batch.bin"])
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        tar.addfile(link)
    with pytest.raises(DataError, match=r"found no data_batch_1.bin, .*, test_batch.bin in it"):
        load_global_dataset("cifar10", folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'touch pwned'\ntR.", "it asks for os.system, which is refused"),
        (b'c__builtin__\neval\n(S\'open("pwned", "w")\'\ntR.', "it asks for __builtin__.eval, which is refused"),
        (b"\x80\x02]q\x00.", 'expected a dictionary with an array "data" and a list "labels"'),
        (b"\x80\x02}.", 'expected a dictionary with an array "data" and a list "labels"'),
        (b"no pickle", "cannot be read as one of CIFAR's Python files"),
        (b"", "cannot be read as one of CIFAR's Python files: Ran out of input"),
    ],
)
def test_a_pickle_is_refused_that_is_not_cifars(content, message, cifar_files, write, tmp_path):
    _, files = cifar_files("cifar10", "python")
    folder = write(tmp_path / "data", files | {"test_batch": content})
    with pytest.raises(DataError) as refused:
        load_global_dataset("cifar10", folder)
    assert str(refused.value).startswith(f"{folder}/test_batch: ")
    assert message in str(refused.value)
    assert not (tmp_path / "pwned").exists()


def test_pickled_arrays_of_another_shape_or_length_are_refused(cifar_files, old_pickle, write, tmp_path):
    _, files = cifar_files("cifar10", "python")
    narrow = old_pickle(np.zeros((2, 300), np.uint8), [1, 2], "labels")
    with pytest.raises(DataError, match=r"test_batch: found data of uint8 \[2, 300\]; expected uint8 \[N, 3072\]"):
        load_global_dataset("cifar10", write(tmp_path / "narrow", files | {"test_batch": narrow}))
    short = old_pickle(np.zeros((2, 3072), np.uint8), [1], "labels")
    with pytest.raises(DataError, match="test_batch: found 1 labels; expected 2 whole numbers"):
        load_global_dataset("cifar10", write(tmp_path / "short", files | {"test_batch": short}))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        DataError, match=r'no data set is called "mnits" \(known: digits, mnist, .*cifar100, parquet:PATH\)'
    ):
        load_global_dataset("mnits")


def test_importing_loads_neither_torch_nor_a_reader():
    code = "import fedsweep.datasets, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "sklearn", "pyarrow", "PIL", "pooch", "requests"} & set(modules)


def test_preparing_what_is_there_reads_and_downloads_nothing(idx_files, write, tmp_path):
    _, files = idx_files
    prepare("mnist", write(tmp_path / "data", dict.fromkeys(files, b"not read")))
    prepare("digits")


def test_preparing_what_is_nowhere_is_an_error(tmp_path):
    with pytest.raises(DataError, match="parquet:nowhere: no such folder"):
        prepare("parquet:nowhere", tmp_path)
    with pytest.raises(DataError, match="the data set kmnist is in no folder, and could not be downloaded"):
        prepare("kmnist", tmp_path)
    with pytest.raises(DataError, match='no data set is called "mnits"'):
        prepare("mnits")


@pytest.mark.shared_data
def test_the_real_mnist(shared_data):
    data = load_global_dataset("mnist", shared_data)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_images.shape == (10_000, 1, 28, 28)
    digest = hashlib.md5(
        b"\0\0\x08\3\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c" + data.train_images.numpy().tobytes()
    ).hexdigest()
    assert digest == "6bbc9ace898e44ae57da46a324031adb"
    digest = hashlib.md5(b"\0\0\x08\3\0\0\x27\x10\0\0\0\x1c\0\0\0\x1c" + data.test_images.numpy().tobytes()).hexdigest()
    assert digest == "2646ac647ad5339dbf082846283269ea"
    assert data.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert data.test_labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.shared_data
def test_the_real_mnist_is_not_taken_for_fashion_mnist(shared_data):
    with pytest.raises(DataError, match="found the labels of mnist; expected fashion_mnist"):
        load_global_dataset("fashion_mnist", shared_data / "mnist")


@pytest.mark.shared_data
def test_the_real_cifar_images_in_parquet(shared_data):
    data = load_global_dataset("parquet:cifar10-jpeg", shared_data)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.test_images.shape == (10_000, 3, 32, 32)
    assert data.num_classes == 10
    assert data.train_labels.bincount().tolist() == [5000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    assert data.train_images.float().std() > 50  # real pictures, not black ones
