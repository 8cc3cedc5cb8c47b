"""Parquet folders as on the Hugging Face hub: found by type and name, decoded, checked."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedsweep.datasets import load_global_dataset
from fedsweep.errors import DataError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(pixels, mode=None):
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count, shape=(4, 4, 3), start=0):
    generator = np.random.default_rng(start)
    return [generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def table(images, labels, image="img", label="label", label_type="int64", **more):
    cells = [{"bytes": each if isinstance(each, bytes) else png(each), "path": None} for each in images]
    columns = {image: pa.array(cells, IMAGE), label: pa.array(labels, getattr(pa, label_type)())}
    return pa.table(columns | {name: pa.array(values) for name, values in more.items()})


@pytest.fixture
def folder(tmp_path):
    """A folder with one training file, one test file, RGB; parts of it can be replaced."""

    def make(train=None, test=None, **tables):
        train = table(pictures(6), [0, 1, 2, 0, 1, 2]) if train is None else train
        test = table(pictures(2, start=9), [1, 0]) if test is None else test
        for name, content in ({"train.parquet": train, "test.parquet": test} | tables).items():
            (tmp_path / "set").mkdir(exist_ok=True)
            pq.write_table(content, tmp_path / "set" / name)
        return tmp_path / "set"

    return make


def test_colour_images_and_labels(folder):
    data = load_global_dataset(f"parquet:{folder()}")
    assert data.num_classes == 3
    assert data.train_images.shape == (6, 3, 4, 4)
    assert data.test_labels.tolist() == [1, 0]
    for loaded, original in zip(data.train_images.numpy(), pictures(6), strict=True):
        assert np.array_equal(loaded.transpose(1, 2, 0), original)


def test_grey_images_have_one_channel(folder):
    grey = pictures(3, (4, 4))
    data = load_global_dataset(f"parquet:{folder(table(grey, [0, 1, 2]), table(grey[:1], [2]))}")
    assert data.train_images.shape == (3, 1, 4, 4)
    assert np.array_equal(data.test_images[0, 0].numpy(), grey[0])


def test_parts_are_read_in_the_order_of_their_names(folder):
    place = folder(**{f"train-0000{part}-of-00002.parquet": table(pictures(1), [part]) for part in (1, 0)})
    (place / "train.parquet").unlink()
    assert load_global_dataset(f"parquet:{place}").train_labels.tolist() == [0, 1]


@pytest.mark.parametrize("base", ["current", "data_dir", "environment"])
def test_a_relative_path(base, folder, tmp_path, monkeypatch):
    folder()
    if base != "current":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    if base == "environment":
        monkeypatch.setenv("FEDSWEEP_DATA", str(tmp_path))
    data = load_global_dataset("parquet:set", tmp_path if base == "data_dir" else None)
    assert (data.name, len(data.train_labels)) == ("parquet:set", 6)


def test_columns_are_found_by_type_whatever_they_are_called(folder):
    odd = {"image": "Bild", "label": "Klasse", "label_type": "uint8"}
    place = folder(table(pictures(2), [0, 1], **odd, note=["a", "b"]), table(pictures(1), [1], **odd, note=["c"]))
    assert load_global_dataset(f"parquet:{place}").train_labels.tolist() == [0, 1]


def test_of_several_labels_the_fine_one_counts(folder):
    fine = {"label": "fine_label", "coarse_label": [0, 0]}
    place = folder(table(pictures(2), [0, 5], **fine), table(pictures(2), [5, 0], **fine))
    assert load_global_dataset(f"parquet:{place}").train_labels.tolist() == [0, 5]


def test_the_number_of_classes_is_that_of_the_metadata(folder):
    names = {"info": {"features": {"label": {"names": ["a", "b", "c", "d", "e"], "_type": "ClassLabel"}}}}
    train = table(pictures(2), [0, 1]).replace_schema_metadata({"huggingface": json.dumps(names)})
    assert load_global_dataset(f"parquet:{folder(train)}").num_classes == 5


def test_a_label_beyond_the_metadata_is_an_error(folder):
    names = {"info": {"features": {"label": {"names": ["a", "b"]}}}}
    train = table(pictures(2), [0, 2]).replace_schema_metadata({"huggingface": json.dumps(names)})
    with pytest.raises(DataError, match=r"train.parquet: found label 2; expected 0 to 1"):
        load_global_dataset(f"parquet:{folder(train)}")


GOOD = pictures(2)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (pa.table({"label": [0, 1]}), r"train.parquet: expected one image column struct<bytes: binary, path: string> "
         r"\(of several, the one called image or img\); found label: int64"),
        (pa.table({"img": [b"x"], "label": [0]}), "expected one image column .* found img: binary, label: int64"),
        (table(GOOD, [0, 1], label_type="float64"), r"expected one label column of integers .*; found img: "),
        (table(GOOD, [0, 1], label="a", b=[1, 0]), "expected one label column of integers"),
        (table(GOOD, [0, -1]), "train.parquet: found label -1; expected 0 to"),
        (table(GOOD, [0, None]), "train.parquet row 1: label is empty; expected a whole number"),
        (table([GOOD[0], b""], [0, 1]), "train.parquet row 1: cannot be decoded as an image"),
        (table([GOOD[0], png(GOOD[1])[:-30]], [0, 1]), "train.parquet row 1: cannot be decoded as an image"),
        (table([GOOD[0], png(GOOD[1], "P")], [0, 1]), "row 1: found an image of mode P; expected L or RGB"),
        (table([png(GOOD[1], "RGBA")], [0]), "row 0: found an image of mode RGBA; expected L or RGB"),
        (table([GOOD[0], png(GOOD[1], "L")], [0, 1]), "found an image of 1×4×4; expected 3×4×4 as in the first row"),
        (table([GOOD[0], *pictures(1, (4, 5, 3))], [0, 1]), "row 1: found an image of 3×4×5; expected 3×4×4"),
        (table(pictures(2, (4, 5, 3)), [0, 1]), "test.parquet: found images of 3×4×4; expected 3×4×5 as in"),
        (table([], []), "train.parquet: found no image"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_its_place(train, message, folder):
    with pytest.raises(DataError, match=message):
        load_global_dataset(f"parquet:{folder(train)}")


def test_an_image_that_is_only_a_path_is_an_error(folder):
    cell = pa.array([{"bytes": None, "path": "a.png"}], IMAGE)
    with pytest.raises(DataError, match="row 0: img has no bytes; expected an encoded image"):
        load_global_dataset(f"parquet:{folder(pa.table({'img': cell, 'label': [0]}))}")


def test_oblong_images_are_refused(folder):
    oblong = pictures(2, (4, 5, 3))
    with pytest.raises(DataError, match="found images of 3×4×5; expected square ones"):
        load_global_dataset(f"parquet:{folder(table(oblong, [0, 1]), table(oblong, [0, 1]))}")


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError) as missing:
        load_global_dataset("parquet:nowhere", tmp_path / "data")
    assert str(missing.value) == (
        f"parquet:nowhere: no such folder (looked for {tmp_path}/nowhere, {tmp_path}/data/nowhere); "
        "expected one with Parquet files"
    )


def test_no_such_folder_under_a_whole_path_names_it_once(tmp_path):
    with pytest.raises(DataError) as missing:
        load_global_dataset(f"parquet:{tmp_path}/nowhere", tmp_path / "data")
    assert str(missing.value) == f"parquet:{tmp_path}/nowhere: no such folder; expected one with Parquet files"


def test_a_folder_one_too_high_is_told_the_right_one(folder, tmp_path):
    place = folder()
    with pytest.raises(
        DataError, match=rf"^{tmp_path}: found no train\*.parquet in it; did you mean parquet:{place}\?$"
    ):
        load_global_dataset(f"parquet:{tmp_path}")


def test_a_folder_without_a_test_set(folder):
    place = folder()
    (place / "test.parquet").unlink()
    with pytest.raises(DataError, match=rf"^{place}: found no test\*.parquet in it$"):
        load_global_dataset(f"parquet:{place}")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all"])
def test_a_file_that_is_not_parquet(content, folder):
    place = folder()
    (place / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{place}/train.parquet: cannot be read as Parquet: "):
        load_global_dataset(f"parquet:{place}")


def test_a_file_that_is_cut_in_its_data(folder):
    place = folder()
    whole = (place / "train.parquet").read_bytes()
    (place / "train.parquet").write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    with pytest.raises(DataError, match=rf"^{place}/train.parquet"):
        load_global_dataset(f"parquet:{place}")
