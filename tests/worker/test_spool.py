"""The spool: a result is whole or absent wherever its writer is killed, and what is no result does no harm."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from permissions import bound_by_permissions

from fedsweep.worker import spool
from fedsweep.worker.spool import Undelivered, pending, put, remove

RESULT = {"mean_test_acc": 0.1 + 0.2, "outcome": "ok", "device": "é", "history": [{"round": 1, "val_loss": None}]}


def waiting(folder: Path) -> list[tuple[str, int | None, dict[str, Any]]]:
    return [(each.task_id, each.attempt, each.result_data) for each in pending(folder)]


def test_a_result_waits_until_it_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "spool"
    assert pending(folder) == []
    kept = put(folder, "a_0_1", 7, RESULT)
    assert pending(folder) == [kept] == [Undelivered(kept.path, "a_0_1", 7, RESULT)]
    remove(kept)
    remove(kept)  # another worker was quicker
    assert pending(folder) == []
    assert list(folder.iterdir()) == []


def test_the_same_attempt_is_kept_once_and_another_beside_it(tmp_path: Path) -> None:
    put(tmp_path, "a_0_1", 7, RESULT)
    put(tmp_path, "a_0_1", 7, {"mean_test_acc": 1.0})
    put(tmp_path, "a_0_1", 8, RESULT)
    put(tmp_path, "a_0_1", None, RESULT)
    assert sorted(waiting(tmp_path), key=str) == sorted(
        [("a_0_1", 7, {"mean_test_acc": 1.0}), ("a_0_1", 8, RESULT), ("a_0_1", None, RESULT)], key=str
    )


def test_the_oldest_comes_first(tmp_path: Path) -> None:
    for age, name in enumerate("cab"):
        os.utime(put(tmp_path, name, 1, RESULT).path, (1e9 - age, 1e9 - age))
    assert [task_id for task_id, *_ in waiting(tmp_path)] == ["b", "a", "c"]


@pytest.mark.parametrize("task_id", ["a/../../b", "x" * 10_000, "\x00", "é|\n", "\ud800", ".", ""])
def test_a_task_may_have_any_name(tmp_path: Path, task_id: str) -> None:
    folder = tmp_path / "spool"
    put(folder, task_id, 1, RESULT)
    assert [path.parent for path in tmp_path.rglob("*.json")] == [folder]
    if task_id != "\ud800":  # no manager can have handed that out: the file is set aside
        assert waiting(folder) == [(task_id, 1, RESULT)]


def test_a_result_that_is_not_finite_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        put(tmp_path, "a_0_1", 7, {"mean_test_acc": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_nothing_and_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    put(tmp_path, "a_0_1", 7, RESULT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space left"):
            put(tmp_path, "a_0_1", 7, {"mean_test_acc": 1.0})
    assert waiting(tmp_path) == [("a_0_1", 7, RESULT)]
    assert len(list(tmp_path.iterdir())) == 1


# ---- killed while writing

# Runs put() again and again, each time in a process of its own that ends without any clean-up at the next step:
# before or after a call into the system, or with half of the bytes written. Prints what each of them left behind.
KILLED_EVERYWHERE = """
import json, os, sys
from pathlib import Path
from fedsweep.worker import spool

folder, result = Path(sys.argv[1]), json.loads(sys.argv[2])
STEPS = ["open", "fdopen", "fsync", "close", "replace", "mkdir"]
trace = []

def step(name, target):
    trace.append(name)
    if len(trace) == target:
        os._exit(99)

def arm(target):
    for name in STEPS:
        def patched(*arguments, real=getattr(os, name), name=name, **options):
            step(f"before {name}", target)
            value = real(*arguments, **options)
            if name == "fdopen" and arguments[1] == "wb":
                write = value.write
                class Half:
                    def __enter__(self): return self
                    def __exit__(self, *_): value.close()
                    def flush(self): step("before flush", target); value.flush()
                    def write(self, data):
                        if len(trace) + 1 == target:
                            write(data[: len(data) // 2])
                            value.flush()
                        step("half written", target)
                        write(data)
                return Half()
            step(f"after {name}", target)
            return value
        setattr(os, name, patched)

for target in range(1, 200):
    where = folder / str(target)
    if target % 2:
        spool.put(where, "a_0_1", 7, {"mean_test_acc": 0.25})  # an older one, which is to be replaced
    child = os.fork()
    if not child:
        arm(target)
        spool.put(where, "a_0_1", 7, result)
        print(json.dumps(trace), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        print(target, flush=True)
        if target % 2 == 0:
            break
"""


def test_a_result_is_whole_or_absent_wherever_its_writer_is_killed(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED_EVERYWHERE, str(tmp_path), json.dumps(RESULT)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    *_, trace, last = ended.stdout.splitlines()
    steps, rounds = json.loads(trace), int(last)
    assert rounds > 12, steps

    old, new = ("a_0_1", 7, {"mean_test_acc": 0.25}), ("a_0_1", 7, RESULT)
    seen = []
    for target in range(1, rounds + 1):
        found = waiting(tmp_path / str(target))
        assert found in (([old], [new]) if target % 2 else ([], [new])), f"killed at step {target} of {steps}"
        seen.append(found)
        put(tmp_path / str(target), "a_0_1", 7, RESULT)  # the next try is not in the way of what was left
        assert waiting(tmp_path / str(target)) == [new]
    assert [] in seen
    assert [old] in seen
    assert seen[-1] == [new]


def test_the_bytes_are_synced_before_the_name_is_given_and_the_name_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure needs: the calls in this order, each on the right file."""
    trace: list[tuple[str, str]] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        trace.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def replace(source: str, target: Path) -> None:
        assert json.loads(Path(source).read_bytes())["result_data"] == RESULT
        trace.append(("replace", str(source)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    folder = tmp_path / "spool"
    put(folder, "a_0_1", 7, RESULT)
    (_, parent), (first, written), (second, renamed), (third, synced) = trace
    assert (first, second, third) == ("fsync", "replace", "fsync")
    assert written == renamed
    assert (parent, synced) == (str(tmp_path), str(folder))


def test_what_killed_writers_left_is_deleted_once_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / "a-1.part", tmp_path / "b-2.part"
    for path in (old, young):
        path.write_bytes(b'{"task_id"')
    os.utime(old, (time.time() - 7200,) * 2)
    assert pending(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["b-2.part"]


# ---- what is no result

WHOLE = json.dumps({"task_id": "a_0_1", "attempt": 7, "result_data": RESULT}).encode()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_RESULTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(WHOLE[:-10]),
    "NULs": lambda path: path.write_bytes(WHOLE[:20] + b"\x00" * 4096),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch /tmp/x'\ntR."),
    "an array": lambda path: path.write_bytes(b"[1]"),
    "NaN": lambda path: path.write_bytes(WHOLE.replace(b"0.30000000000000004", b"NaN")),
    "a key twice": lambda path: path.write_bytes(WHOLE[:-1] + b',"attempt":8}'),
    "half a surrogate pair": lambda path: path.write_bytes(WHOLE.replace(b"a_0_1", b"\\ud800")),
    "100,000 levels": lambda path: path.write_bytes(b'{"a":' + b"[" * 100_000),
    "a huge number": lambda path: path.write_bytes(b'{"a":' + b"1" * 5000 + b"}"),
    "of another program": lambda path: path.write_bytes(b'{"name": "package", "version": 3}'),
    "wrong types": lambda path: path.write_bytes(b'{"task_id": 5, "attempt": 7, "result_data": {}}'),
    "UTF-16": lambda path: path.write_bytes(WHOLE.decode().encode("utf-16")),
    "a byte-order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + WHOLE),
    "compressed": lambda path: path.write_bytes(gzip.compress(WHOLE)),
    "two results": lambda path: path.write_bytes(WHOLE + WHOLE),
    "a result without its task": lambda path: path.write_bytes(b'{"attempt": 7, "result_data": {}}'),
    "a result without its attempt": lambda path: path.write_bytes(b'{"task_id": "a", "result_data": {}}'),
    "an attempt that is a word": lambda path: path.write_bytes(WHOLE.replace(b": 7", b': "7"')),
    "an attempt that is true or false": lambda path: path.write_bytes(WHOLE.replace(b": 7", b": true")),
    "a result that is a list": lambda path: path.write_bytes(b'{"task_id": "a", "attempt": 7, "result_data": []}'),
    "nothing but NULs": lambda path: path.write_bytes(bytes(len(WHOLE))),
    "a socket": bind_socket,
    "a link to a FIFO": lambda path: (os.mkfifo(path.parent.parent / "fifo"), path.symlink_to("../fifo")),
    "a link to a folder": lambda path: path.symlink_to("."),
    "not readable": lambda path: (path.write_bytes(WHOLE), path.chmod(0)),
    "too large": lambda path: path.write_bytes(b" " * (spool.MAX_BYTES + 1)),
    "a folder": lambda path: path.mkdir(),
    "a folder with things in it": lambda path: (path / "sub").mkdir(parents=True),
    "a FIFO": fifo,
    "a link to a result": lambda path: path.symlink_to(path.parent.parent / "elsewhere.json"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(20)  # opening a FIFO the usual way waits for ever
@pytest.mark.parametrize("make", NO_RESULTS.values(), ids=NO_RESULTS.keys())
def test_what_is_no_result_is_set_aside_and_the_others_are_delivered(
    tmp_path: Path, make: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool"
    put(folder, "b_0_1", 1, RESULT)
    (tmp_path / "elsewhere.json").write_bytes(WHOLE)
    path = folder / "0123-7.result.json"
    make(path)
    before = path.lstat()
    with bound_by_permissions():
        assert waiting(folder) == [("b_0_1", 1, RESULT)]
    aside = folder / "0123-7.result.json.1.unreadable"
    assert (aside.lstat().st_ino, aside.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert not os.path.lexists(path)
    assert (tmp_path / "elsewhere.json").read_bytes() == WHOLE
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()

    caplog.clear()  # it is said once
    assert waiting(folder) == [("b_0_1", 1, RESULT)]
    assert not caplog.records


def test_a_file_torn_at_any_byte_is_set_aside(tmp_path: Path) -> None:
    for cut in range(len(WHOLE)):
        (tmp_path / "0123-7.result.json").write_bytes(WHOLE[:cut])
        assert waiting(tmp_path) == []
        (aside,) = tmp_path.iterdir()
        assert aside.name == "0123-7.result.json.1.unreadable"
        assert aside.read_bytes() == WHOLE[:cut]
        aside.unlink()


@pytest.mark.parametrize("more", [b',"version":9}', b',"sweep":"another"}', b',"task_ids":[]}'])
def test_a_result_of_a_newer_version_that_says_more_is_delivered(tmp_path: Path, more: bytes) -> None:
    """The manager says whether the task is one of its sweep."""
    (tmp_path / "0123-7.result.json").write_bytes(WHOLE[:-1] + more)
    assert waiting(tmp_path) == [("a_0_1", 7, RESULT)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.write_text("x"), lambda path: path.symlink_to("away")])
def test_what_is_no_spool_folder_is_no_reason_to_wait(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "spool")
    assert pending(tmp_path / "spool") == []
    with pytest.raises(OSError, match="File exists"):
        put(tmp_path / "spool", "a_0_1", 7, RESULT)


def test_nothing_that_was_set_aside_is_overwritten(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        (tmp_path / "0123-7.result.json").write_bytes(content)
        assert pending(tmp_path) == []
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"one", b"three", b"two"]


def test_a_folder_or_link_in_the_place_of_a_result_is_not_in_its_way(tmp_path: Path) -> None:
    path = put(tmp_path, "a_0_1", 7, RESULT).path
    for make in (lambda: (path / "sub").mkdir(parents=True), lambda: path.symlink_to(tmp_path / "elsewhere")):
        path.unlink()
        make()
        put(tmp_path, "a_0_1", 7, RESULT)
        assert waiting(tmp_path) == [("a_0_1", 7, RESULT)]
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_cannot_be_read_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a_0_1", 7, RESULT)

    def open_nothing(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_nothing)
        assert pending(tmp_path) == []
    assert "Too many open files" in caplog.text
    assert waiting(tmp_path) == [("a_0_1", 7, RESULT)]


def test_a_file_without_permission_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a_0_1", 7, RESULT)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert pending(tmp_path) == []
    assert [path.suffix for path in tmp_path.iterdir()] == [".unreadable"]


def test_a_result_that_another_worker_delivers_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "a_0_1", 7, RESULT)
    monkeypatch.setattr(spool, "_written_at", lambda path: path.unlink(missing_ok=True) or 0.0)
    assert pending(tmp_path) == []
    assert not caplog.records
