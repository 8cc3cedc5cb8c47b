"""GPU locks: several real processes, a fake NVML, and everything that may lie in the lock folder."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from permissions import bound_by_permissions

from fedsweep.worker import gpu
from fedsweep.worker.gpu import GpuUnavailable, claim_gpu, get_available_gpu, list_gpus, release_gpu_lock

# Claims a GPU, says which, and keeps it until its standard input ends.
HOLDER = """\
import sys
from fedsweep.worker.gpu import get_available_gpu
print(get_available_gpu(sys.argv[1]), flush=True)
sys.stdin.read()
"""

# Claims and releases as often as asked; a marker that exists already means that somebody else holds the same GPU.
RACER = """\
import os, random, sys, time
from fedsweep.worker.gpu import get_available_gpu, release_gpu_lock
folder, times = sys.argv[1], int(sys.argv[2])
dice, claimed = random.Random(os.getpid()), 0
while claimed < times:
    gpu = get_available_gpu(folder + "/locks")
    if gpu is None:
        continue
    os.close(os.open(f"{folder}/used_{gpu}", os.O_CREAT | os.O_EXCL))
    time.sleep(dice.random() * 0.003)
    os.unlink(f"{folder}/used_{gpu}")
    release_gpu_lock(gpu)
    claimed += 1
    print(gpu)
"""


@pytest.fixture(autouse=True)
def release() -> Iterator[None]:
    yield
    gpu._release_all()


@pytest.fixture
def locks(tmp_path: Path) -> Path:
    return tmp_path / "locks"


Start = Callable[[str, Path], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program in a process of its own; those that still run at the end are killed."""
    running: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        running.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# ---- which GPUs there are


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        ("2,0", [2, 0]),
        ("GPU-11aa-bb", [1]),
        ("GPU-2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,7,1", [0]),  # CUDA reads up to the first wrong entry
        ("1,1", [1]),
        ("GPU-", []),
    ],
)
def test_cuda_visible_devices_is_respected(fake_nvml, monkeypatch, visible, indices):
    monkeypatch.setenv("FAKE_GPU_GB", "10,10,10")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [each.index for each in list_gpus()] == indices


def test_no_driver_and_no_library_mean_no_gpu(fake_nvml, monkeypatch, locks):
    monkeypatch.delenv("FAKE_GPU_GB")
    assert get_available_gpu(locks) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert get_available_gpu(locks) is None
    assert not locks.exists()


def test_a_gpu_that_has_failed_does_not_hide_the_others(fake_nvml, monkeypatch, locks, caplog):
    monkeypatch.setenv("FAKE_GPU_GB", "lost,10")
    assert get_available_gpu(locks) == 1
    assert "GPU 0 is passed over: GPU is lost" in caplog.text


def test_less_than_4_gb_free_is_passed_over(fake_nvml, monkeypatch, locks, caplog):
    monkeypatch.setenv("FAKE_GPU_GB", "3.9,4")
    assert get_available_gpu(locks) == 1
    assert "GPU 0 has 3.9 GB free; a worker needs 4 GB" in caplog.text
    assert not (locks / "gpu_0.lock").exists()


# ---- one holder


def test_a_claim_writes_the_pid_and_release_frees_it(fake_nvml, locks):
    assert [get_available_gpu(locks) for _ in range(3)] == [0, 1, None]
    assert (locks / "gpu_0.lock").read_text() == (locks / "gpu_1.lock").read_text() == str(os.getpid())
    release_gpu_lock(0)
    release_gpu_lock(0)
    assert (locks / "gpu_0.lock").read_text() == ""
    assert get_available_gpu(locks) == 0


def test_the_holder_is_named(fake_nvml, locks, start, caplog):
    holders = [start(HOLDER, locks) for _ in range(2)]
    by_gpu = {said(holder): holder.pid for holder in holders}
    assert get_available_gpu(locks) is None
    assert f"GPU 0 is held by another worker, process {by_gpu['0']}" in caplog.text
    assert f"GPU 1 is held by another worker, process {by_gpu['1']}" in caplog.text


def test_processes_racing_for_two_gpus_while_a_cleaner_deletes_the_files(fake_nvml, tmp_path, locks, start):
    racers = [start(RACER, tmp_path, 100) for _ in range(4)]
    dice, deleted = random.Random(1), 0
    while any(racer.poll() is None for racer in racers):
        for path in locks.glob("*.lock"):
            path.unlink(missing_ok=True)
            deleted += 1
        time.sleep(dice.random() * 0.004)
    output = [racer.communicate()[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0, 0], "two processes held the same GPU"
    assert [len(each) for each in output] == [100] * 4
    assert set(sum(map(Counter, output), Counter())) == {"0", "1"}
    assert deleted > 20, "the cleaner came too late to test anything"


def test_the_file_alone_decides_where_there_is_no_witness(fake_nvml, tmp_path, start):
    """As on systems without abstract sockets, and between containers."""
    program = "from fedsweep.worker import gpu\ngpu._take_witness = lambda *_: None\n" + RACER
    racers = [start(program, tmp_path, 60) for _ in range(3)]
    for racer in racers:
        racer.communicate()
    assert [racer.returncode for racer in racers] == [0, 0, 0], "two processes held the same GPU"


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_blocks_nobody(fake_nvml, monkeypatch, locks, start, kind):
    monkeypatch.setenv("FAKE_GPU_GB", "10")
    holder = start(HOLDER, locks)
    assert said(holder) == "0"
    assert get_available_gpu(locks) is None
    holder.send_signal(kind)
    holder.wait()
    assert (locks / "gpu_0.lock").read_text() == str(holder.pid)
    assert get_available_gpu(locks) == 0


def test_a_holder_that_ends_releases(fake_nvml, monkeypatch, locks, start):
    monkeypatch.setenv("FAKE_GPU_GB", "10")
    holder = start(HOLDER, locks)
    assert said(holder) == "0"
    holder.communicate()
    assert (locks / "gpu_0.lock").read_text() == ""
    assert get_available_gpu(locks) == 0


def test_a_file_deleted_while_held_lets_nobody_in(fake_nvml, monkeypatch, locks, start, caplog):
    monkeypatch.setenv("FAKE_GPU_GB", "10")
    holder = start(HOLDER, locks)
    assert said(holder) == "0"
    (locks / "gpu_0.lock").unlink()
    assert get_available_gpu(locks) is None
    (locks / "gpu_0.lock").write_text("")
    assert get_available_gpu(locks) is None
    assert "held by another worker" in caplog.text
    holder.communicate()
    assert get_available_gpu(locks) == 0


def test_a_file_deleted_between_opening_and_locking_is_opened_anew(fake_nvml, monkeypatch, locks):
    """What was locked must be what has the name: else the next one locks a new file of that name."""
    monkeypatch.setattr(gpu, "_take_witness", lambda *_: None)
    flock, deletions = gpu.fcntl.flock, iter([True, True, False])

    def flock_after_deletion(descriptor: int, operation: int) -> None:
        if next(deletions, False):
            (locks / "gpu_0.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(gpu.fcntl, "flock", flock_after_deletion)
    assert get_available_gpu(locks) == 0
    assert (locks / "gpu_0.lock").read_text() == str(os.getpid())
    with pytest.raises(GpuUnavailable, match="GPU 0 is held by another worker"):
        claim_gpu(list_gpus()[0], locks)


def test_the_lock_leaks_into_no_child(fake_nvml, monkeypatch, locks, start):
    """Neither a forked child nor a program started by the holder keeps the GPU once the holder is dead."""
    monkeypatch.setenv("FAKE_GPU_GB", "10")
    program = """
import os, subprocess, sys, time
from fedsweep.worker.gpu import get_available_gpu
print(get_available_gpu(sys.argv[1]), flush=True)
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
if os.fork() == 0:
    print(started.pid, os.getpid(), flush=True)
time.sleep(60)
"""
    holder = start(program, locks)
    assert said(holder) == "0"
    children = [int(pid) for pid in said(holder).split()]
    assert get_available_gpu(locks) is None, "the fork released its parent's lock"
    holder.kill()
    holder.wait()
    try:
        assert get_available_gpu(locks) == 0
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


# ---- files of older scripts and of strangers


def test_a_live_older_worker_holds_its_gpu(fake_nvml, locks, start, caplog):
    """Older scripts write their PID and lock nothing."""
    older = start("import sys; sys.stdin.read()")
    locks.mkdir()
    (locks / "gpu_0.lock").write_text(f"{older.pid}\n")
    assert get_available_gpu(locks) == 1
    assert f"GPU 0 is held by an older worker, process {older.pid}" in caplog.text
    assert (locks / "gpu_0.lock").read_text() == f"{older.pid}\n"
    older.communicate()
    assert get_available_gpu(locks) == 0


def test_a_pid_that_was_given_out_again_holds_nothing(fake_nvml, locks, start, caplog):
    caplog.set_level(logging.INFO)
    stranger = start("import sys; sys.stdin.read()")
    locks.mkdir()
    path = locks / "gpu_0.lock"
    path.write_text(str(stranger.pid))
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    assert get_available_gpu(locks) == 0
    assert f"was left by process {stranger.pid}, which is dead" in caplog.text


def test_our_own_pid_in_the_file_of_a_dead_worker_holds_nothing(fake_nvml, locks):
    """In a container every worker has the same small PID."""
    locks.mkdir()
    (locks / "gpu_0.lock").write_text(str(os.getpid()))
    assert get_available_gpu(locks) == 0


def test_a_zombie_holds_nothing(fake_nvml, locks):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{dead.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        time.sleep(0.01)
    locks.mkdir()
    (locks / "gpu_0.lock").write_text(str(dead.pid))
    assert get_available_gpu(locks) == 0
    dead.wait()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"no pid", b"\0\0\0\0", b"-1", b"0", b"1 2", b"99999999999999999999", b"9999999999", b"\xff\xfe"),
        *(b"0x10", b"1e3", b"1.0", "１２".encode(), b'{"pid": 1}', b"x" * 100_000, b"12\n34\n"),
    ],
)
def test_foreign_content_blocks_nobody(fake_nvml, locks, caplog, content):
    locks.mkdir()
    (locks / "gpu_0.lock").write_bytes(content)
    assert get_available_gpu(locks) == 0
    assert (locks / "gpu_0.lock").read_text() == str(os.getpid())
    if content and not re.fullmatch(rb"[1-9]\d{9}", content):
        assert "which is no PID; it is taken over" in caplog.text


def put_directory(path: Path) -> None:
    path.mkdir()


def put_link(path: Path) -> None:
    (path.parent / "target").write_text("precious")
    path.symlink_to(path.parent / "target")


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def put_loop(path: Path) -> None:
    path.symlink_to(path.name)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/full")


def put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def put_what_may_not_be_written(path: Path) -> None:
    path.write_text("")
    path.chmod(0o444)


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (put_directory, "it is not a plain file; delete it"),
        (put_link, "it is a symbolic link; delete it"),
        (put_fifo, "it is not a plain file; delete it"),
        (put_dangling_link, "it is a symbolic link; delete it"),
        (put_loop, "it is a symbolic link; delete it"),
        (put_device, "it is a symbolic link; delete it"),
        (put_socket, "it is not a plain file; delete it"),
        (put_what_may_not_be_written, "Permission denied"),
    ],
)
@pytest.mark.timeout(20)
def test_what_is_no_plain_file_is_no_lock_and_the_message_says_so(fake_nvml, locks, caplog, put, reason):
    locks.mkdir()
    path = locks / "gpu_0.lock"
    put(path)
    with bound_by_permissions():
        assert get_available_gpu(locks) == 1
    assert f"GPU 0: its lock {path} cannot be used: {reason}" in caplog.text
    assert not (locks / "nowhere").exists()
    if put is put_link:
        assert (locks / "target").read_text() == "precious"
    gpu._release_all()
    path.rmdir() if put is put_directory else path.unlink()
    assert get_available_gpu(locks) == 0, "something of the failed attempt stayed locked"


def test_a_folder_that_cannot_be_written_is_an_error_with_its_path(fake_nvml, monkeypatch, locks):
    locks.write_text("a file where the folder should be")
    with pytest.raises(GpuUnavailable, match=rf"GPU 0: its lock {locks}/gpu_0.lock cannot be used: File exists"):
        claim_gpu(list_gpus()[0], locks)
    locks.unlink()

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(gpu.os, "open", refuse)
    with pytest.raises(GpuUnavailable, match="cannot be used: Permission denied"):
        claim_gpu(list_gpus()[0], locks)


def test_importing_loads_neither_torch_nor_nvml():
    code = "import fedsweep.worker.gpu, sys; sys.exit(any(m in sys.modules for m in ('torch', 'pynvml', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
