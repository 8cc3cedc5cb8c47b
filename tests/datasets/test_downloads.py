"""Downloads, from a server on this machine: whole and with the right checksum, or not there at all."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
from dataclasses import replace

import pytest

from fedsweep.datasets import load_global_dataset, prepare
from fedsweep.datasets.download import download
from fedsweep.datasets.sources import SOURCES
from fedsweep.errors import DataError

CONTENT = bytes(range(256)) * 4000  # 1 MB


def kept(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.fixture
def mnist_on(idx_files, server, monkeypatch):
    """Let the small MNIST be had from mirrors of the server."""

    def have(*mirrors, on=()):
        files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files[1].items()}
        server.files.update({f"/{mirror}/{name}": content for mirror in on for name, content in files.items()})
        remotes = tuple(server.remote(name, content, *mirrors) for name, content in files.items())
        source = SOURCES["mnist"]
        monkeypatch.setitem(SOURCES, "mnist", replace(source, forms=(replace(source.forms[0], downloads=remotes),)))
        return idx_files[0]

    return have


def test_what_is_in_no_folder_is_downloaded_once(mnist_on, server, cache):
    small = mnist_on("first", on=["first"])
    data = load_global_dataset("mnist")
    assert data.train_images.numpy().tolist() == small.train_images.tolist()
    assert len(server.asked) == 4
    assert kept(cache / "mnist") == sorted(f"{name}.gz" for name in SOURCES["mnist"].forms[0].members)
    prepare("mnist")
    assert len(server.asked) == 4


def test_a_folder_that_has_the_files_is_used_before_any_download(mnist_on, server, idx_files, write, tmp_path):
    mnist_on("first", on=["first"])
    load_global_dataset("mnist", write(tmp_path / "data", idx_files[1]))
    assert server.asked == []


def test_the_second_mirror_is_used_where_the_first_has_not_the_file(mnist_on, server):
    mnist_on("first", "second", on=["second"])
    prepare("mnist")
    assert server.asked[:2] == ["/first/train-images-idx3-ubyte.gz", "/second/train-images-idx3-ubyte.gz"]


def test_the_mirror_that_the_environment_names_comes_first(mnist_on, server, monkeypatch):
    mnist_on("first", on=["first", "own/mnist"])
    monkeypatch.setenv("FEDSWEEP_MIRROR", server.address + "own/")
    prepare("mnist")
    assert [path.rpartition("/")[0] for path in server.asked] == ["/own/mnist"] * 4


def test_a_wrong_checksum_is_an_error_and_nothing_is_kept(server, tmp_path):
    remote = server.remote("file", CONTENT, "first")
    server.files["/first/file"] = CONTENT[:-1] + b"\0"
    with pytest.raises(DataError, match=r"first/file: SHA256 hash of downloaded file .* does not match the known hash"):
        download("some", remote, tmp_path / "kept")
    assert kept(tmp_path / "kept") == []


def test_a_mirror_with_a_wrong_checksum_is_passed_over(server, tmp_path):
    remote = server.remote("file", CONTENT, "first", "second")
    server.files.update({"/first/file": b"an error page", "/second/file": CONTENT})
    download("some", remote, tmp_path / "kept")
    assert (tmp_path / "kept" / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("cut_after", [0, 1, 600_000, len(CONTENT) - 1])
def test_a_cut_connection_is_an_error_and_nothing_is_kept(cut_after, server, tmp_path):
    remote = server.remote("file", CONTENT, "first")
    server.files["/first/file"] = CONTENT
    server.cut_after = cut_after
    with pytest.raises(DataError, match=r"/first/file: the connection was cut$"):
        download("some", remote, tmp_path / "kept")
    assert kept(tmp_path / "kept") == []
    server.cut_after = None
    download("some", remote, tmp_path / "kept")
    assert kept(tmp_path / "kept") == ["file"]


def test_a_file_that_was_damaged_in_the_cache_is_downloaded_again(server, tmp_path):
    remote = server.remote("file", CONTENT, "first")
    server.files["/first/file"] = CONTENT
    (tmp_path / "file").write_bytes(CONTENT[:1000])
    download("some", remote, tmp_path)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_data_set_that_is_nowhere_to_be_had(mnist_on, server, tmp_path):
    mnist_on("first", "second")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as missing:
        load_global_dataset("mnist", tmp_path / "empty")
    assert str(missing.value) == (
        "the data set mnist is in no folder, and could not be downloaded\n"
        "  files needed: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
        "t10k-labels-idx1-ubyte (each as it is or .gz)\n"
        f"  looked in: {tmp_path}/empty (and the sub-folders mnist, MNIST/raw)\n"
        f"  tried: {server.address}first/train-images-idx3-ubyte.gz: the server answered 404 Not Found\n"
        f"  tried: {server.address}second/train-images-idx3-ubyte.gz: the server answered 404 Not Found\n"
        "  what to do: put the files into a folder and name it by --data-dir or FEDSWEEP_DATA, or name by "
        "FEDSWEEP_MIRROR a server that has mnist/train-images-idx3-ubyte.gz"
    )


def test_a_folder_that_does_not_exist_is_said_not_to(mnist_on, tmp_path):
    mnist_on()
    with pytest.raises(DataError, match=rf"looked in: {tmp_path}/typo \(no such folder\) \(and"):
        load_global_dataset("mnist", tmp_path / "typo")


def test_a_server_that_is_not_there(tmp_path, server):
    remote = replace(server.remote("file", CONTENT), mirrors=("http://127.0.0.1:9/",))
    with pytest.raises(DataError, match=r"^http://127.0.0.1:9/file: the server cannot be reached$"):
        download("some", remote, tmp_path)


def test_the_other_form_of_cifar_is_taken_where_the_first_cannot_be_had(
    cifar_files, write, server, tmp_path, monkeypatch
):
    small, files = cifar_files("cifar10", "binary")
    write(tmp_path, files, "tar", "cifar-10-binary.tar.gz")
    content = (tmp_path / "cifar-10-binary.tar.gz").read_bytes()
    server.files["/kriz/cifar-10-binary.tar.gz"] = content
    python, binary = SOURCES["cifar10"].forms
    python = replace(python, downloads=(server.remote("cifar-10-python.tar.gz", b"", "kriz"),))
    binary = replace(binary, downloads=(server.remote("cifar-10-binary.tar.gz", content, "kriz"),))
    monkeypatch.setitem(SOURCES, "cifar10", replace(SOURCES["cifar10"], forms=(python, binary)))
    assert load_global_dataset("cifar10").test_labels.tolist() == small.test_labels.tolist()


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file/mnist: downloads cannot be kept there: .*Not a directory"):
        download("mnist", server.remote("name", CONTENT, "first"), tmp_path / "file" / "mnist")


def test_workers_that_start_together_download_once_and_all_read_the_whole(server, tmp_path):
    server.files["/first/file"] = CONTENT
    code = (
        "import pathlib, sys; from fedsweep.datasets.download import RemoteFile, download\n"
        f"download('some', {server.remote('file', CONTENT, 'first')!r}, pathlib.Path({str(tmp_path / 'kept')!r}))\n"
        f"sys.exit(pathlib.Path({str(tmp_path / 'kept' / 'file')!r}).stat().st_size != {len(CONTENT)})"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [worker.wait(timeout=60) for worker in workers] == [0] * 4
    assert server.asked == ["/first/file"]


def test_a_terminal_sees_a_bar_and_a_pipe_sees_nothing(server, tmp_path, monkeypatch, capsys):
    server.files["/first/file"] = CONTENT
    remote = server.remote("file", CONTENT, "first")
    download("some", remote, tmp_path / "piped")
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    download("some", remote, tmp_path / "seen")
    assert "downloading file" in sys.stderr.getvalue()
    assert "1.0/1.0 MB" in sys.stderr.getvalue()


def test_the_checksums_are_sha256_and_every_form_can_be_downloaded():
    for source in SOURCES.values():
        for form in source.forms:
            assert form.downloads
            for remote in form.downloads:
                assert len(bytes.fromhex(remote.sha256)) == 32
