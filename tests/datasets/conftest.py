"""Small files in the official formats, a server that gives them, and no sight of the network or the user's cache."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

import fedsweep.datasets as datasets
from fedsweep.datasets.download import RemoteFile
from fedsweep.datasets.sources import IDX_MEMBERS, SOURCES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads; nothing loaded; no folder or mirror named; no mirror known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("FEDSWEEP_DATA", "FEDSWEEP_MIRROR", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for name, source in SOURCES.items():
        forms = [
            replace(form, downloads=tuple(replace(remote, mirrors=()) for remote in form.downloads))
            for form in source.forms
        ]
        monkeypatch.setitem(SOURCES, name, replace(source, forms=tuple(forms)))
    datasets._load.cache_clear()
    return tmp_path / "cache" / "fedsweep"


def idx_bytes(values: np.ndarray) -> bytes:
    """The IDX file of an array of bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def idx() -> Callable[[np.ndarray], bytes]:
    return idx_bytes


@dataclass(frozen=True)
class Sample:
    """A small data set of any shape."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@pytest.fixture
def sample() -> Callable[..., Sample]:
    def make(shape: tuple[int, ...], classes: int, train: int = 30, test: int = 6) -> Sample:
        generator = np.random.default_rng(7)
        images = generator.integers(0, 256, (train + test, *shape), dtype=np.uint8)
        labels = generator.integers(0, classes, train + test, dtype=np.int64)
        return Sample(images[:train], labels[:train], images[train:], labels[train:])

    return make


@pytest.fixture
def idx_files(sample: Callable[..., Sample]) -> tuple[Sample, dict[str, bytes]]:
    """A small set in MNIST's form, and its four files."""
    small = sample((1, 5, 5), 10)
    arrays = (small.train_images[:, 0], small.train_labels, small.test_images[:, 0], small.test_labels)
    return small, {name: idx_bytes(array.astype(np.uint8)) for name, array in zip(IDX_MEMBERS, arrays, strict=True)}


def pickle_bytes(pixels: np.ndarray, labels: list[int], label_key: str) -> bytes:
    """What Python 2 and its numpy wrote for {"data": pixels, label_key: labels}: the opcodes of CIFAR's own files."""

    def text(word: bytes) -> bytes:
        return b"U" + bytes([len(word)]) + word

    rows, columns = pixels.shape
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    shape = b"M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    raw = pixels.tobytes()
    array += b"(K\x01" + shape + dtype + b"\x89T" + struct.pack("<I", len(raw)) + raw + b"tb"
    values = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key.encode()) + values + b"u."


@pytest.fixture
def old_pickle() -> Callable[..., bytes]:
    return pickle_bytes


@pytest.fixture
def cifar_files(sample: Callable[..., Sample]) -> Callable[[str, str], tuple[Sample, dict[str, bytes]]]:
    """The small files of a CIFAR data set in one of its forms ("python" or "binary")."""

    def make(name: str, form: str) -> tuple[Sample, dict[str, bytes]]:
        classes = SOURCES[name].num_classes
        small = sample((3, 32, 32), classes)
        members = next(each for each in SOURCES[name].forms if form in str(each.archive)).members
        files = {}
        batches = zip(
            np.split(small.train_images, len(members) - 1), np.split(small.train_labels, len(members) - 1), strict=True
        )
        for member, (images, labels) in zip(members, [*batches, (small.test_images, small.test_labels)], strict=True):
            pixels = images.reshape(len(images), -1)
            if form == "python":
                files[member] = pickle_bytes(pixels, labels.tolist(), "labels" if classes == 10 else "fine_labels")
            else:
                columns = [labels[:, None].astype(np.uint8), pixels]
                if classes == 100:
                    columns.insert(0, np.full((len(labels), 1), 19, np.uint8))  # coarse labels, which do not count
                files[member] = np.concatenate(columns, axis=1).tobytes()
        return small, files

    return make


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write files into a folder: plain, each in .gz, or all in a .tar.gz."""

    def into(
        folder: Path, files: dict[str, bytes], form: str = "plain", archive: str = "", inside: str = "some/"
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if form == "gz":
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
        if form == "tar":
            with tarfile.open(folder / archive, "w:gz") as tar:
                for name in files:
                    tar.add(folder / name, f"{inside}{name}")
                    (folder / name).unlink()
        return folder

    return into


@dataclass
class Server:
    """An HTTP server on this machine that gives the files of a dict and writes down what it was asked for."""

    address: str
    files: dict[str, bytes]
    cut_after: int | None = None  # close the connection after so many bytes of a file
    asked: list[str] = field(default_factory=list)

    def remote(self, name: str, content: bytes, *mirrors: str) -> RemoteFile:
        digest = hashlib.sha256(content).hexdigest()
        return RemoteFile(name, digest, tuple(f"{self.address}{mirror}/" for mirror in mirrors))


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: state.cut_after])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state = Server(f"http://127.0.0.1:{listening.server_port}/", {})
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        listening.shutdown()
        thread.join()
