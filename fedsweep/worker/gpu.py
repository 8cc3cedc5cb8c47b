"""One worker holds one GPU, through an operating-system lock.

The lock is `flock` on `.gpu_locks/gpu_{id}.lock`; the file's content, the PID of the holder, is for people and for
workers of older scripts. The kernel drops the lock with the process, however that ends, so a dead holder never blocks;
it gives the lock to one process only; and a PID that was given out again means nothing to it.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import logging
import os
import re
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedsweep.errors import FedsweepError

log = logging.getLogger(__name__)

LOCK_DIR = Path(".gpu_locks")
MIN_FREE_BYTES = 4 * 1024**3
# A process that began this long after a file was written cannot have written it (clocks of files are coarse).
CLOCK_SLACK_S = 2.0


class GpuUnavailable(FedsweepError):
    """The GPU cannot be used: it is not there, another worker holds it, or it has less than 4 GB free."""

    exit_code = 2


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine as NVML knows it."""

    index: int  # NVML's, which does not depend on CUDA_VISIBLE_DEVICES
    uuid: str
    free_bytes: int


@dataclass(frozen=True)
class GpuLock:
    """A lock that this process holds; it lasts while both stay open."""

    descriptor: int
    witness: socket.socket | None


_held: dict[int, GpuLock] = {}


def list_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        gpus = [_facts(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _facts(pynvml: object, index: int) -> Gpu:
    from pynvml import nvmlDeviceGetHandleByIndex, nvmlDeviceGetMemoryInfo, nvmlDeviceGetUUID

    handle = nvmlDeviceGetHandleByIndex(index)
    uuid = nvmlDeviceGetUUID(handle)
    return Gpu(index, uuid.decode() if isinstance(uuid, bytes) else uuid, int(nvmlDeviceGetMemoryInfo(handle).free))


def _visible(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Keep what CUDA_VISIBLE_DEVICES names, by index or (the beginning of a) UUID, up to its first wrong entry."""
    if visible is None:
        return gpus
    kept: list[Gpu] = []
    for name in (part.strip() for part in visible.split(",")):
        matches = [gpu for gpu in gpus if name and (name == str(gpu.index) or gpu.uuid.startswith(name))]
        if len(matches) != 1 or matches[0] in kept:
            break
        kept += matches
    return kept


def get_available_gpu(lock_dir: Path = LOCK_DIR) -> int | None:
    """Claim a GPU with at least 4 GB free; its NVML index, or None where none can be had."""
    for gpu in list_gpus():
        if gpu.free_bytes < MIN_FREE_BYTES:
            log.info("GPU %d is passed over: %.1f GB free", gpu.index, gpu.free_bytes / 1024**3)
        elif claim_gpu(gpu.index, lock_dir):
            return gpu.index
    return None


def claim_gpu(gpu_id: int, lock_dir: Path = LOCK_DIR) -> bool:
    """Take the lock of one GPU; False where somebody holds it. It is released at exit, at the latest."""
    if gpu_id in _held:
        return False
    witness = _claim_witness(gpu_id, lock_dir)
    if witness is None and sys.platform == "linux":
        return False
    descriptor = _claim_file(lock_dir, gpu_id)
    if descriptor is None:
        if witness is not None:
            witness.close()
        return False
    if not _held:
        atexit.register(_release_all)
    _held[gpu_id] = GpuLock(descriptor, witness)
    return True


def release_gpu_lock(gpu_id: int) -> None:
    """Give a GPU back; nothing happens if this process does not hold it.

    The file stays: a process that has just opened it and waits for the lock would hold a file without a name, and a
    third could lock a new file of that name.
    """
    lock = _held.pop(gpu_id, None)
    if lock is None:
        return
    os.ftruncate(lock.descriptor, 0)
    os.close(lock.descriptor)
    if lock.witness is not None:
        lock.witness.close()


def _release_all() -> None:
    for gpu_id in list(_held):
        release_gpu_lock(gpu_id)


def _claim_witness(gpu_id: int, lock_dir: Path) -> socket.socket | None:
    """A second lock that no cleaner can delete: a name in Linux's abstract socket space, gone with the process."""
    if sys.platform != "linux":
        return None
    place = hashlib.sha256(os.fsencode(lock_dir.resolve())).hexdigest()[:32]
    witness = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        witness.bind(f"\0fedsweep/{place}/gpu_{gpu_id}")
    except OSError:
        witness.close()
        return None
    return witness


def _claim_file(lock_dir: Path, gpu_id: int) -> int | None:
    """Lock the file and write our PID into it; its descriptor, or None where the GPU is held."""
    path = lock_dir / f"gpu_{gpu_id}.lock"
    try:
        lock_dir.mkdir(parents=True, exist_ok=True)
        # Neither a link nor the other end of a FIFO: only a plain file can be a lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        log.warning("GPU %d is passed over: its lock %s cannot be opened (%s)", gpu_id, path, error.strerror)
        return None
    try:
        if _lock_and_verify(descriptor, path) and not _held_by_older_worker(descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
    except OSError as error:
        log.warning("GPU %d is passed over: its lock %s cannot be used (%s)", gpu_id, path, error.strerror)
    os.close(descriptor)
    return None


def _lock_and_verify(descriptor: int, path: Path) -> bool:
    """Whether we hold the lock of the very file that has the name now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    ours, named = os.fstat(descriptor), os.stat(path, follow_symlinks=False)
    return stat.S_ISREG(ours.st_mode) and (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)


def _held_by_older_worker(descriptor: int) -> bool:
    """Whether the PID in the file is that of a live process that may have written it.

    Workers of older scripts write their PID and lock nothing. A process that began after the file was written has only
    been given the same PID; so has this very process.
    """
    content = os.pread(descriptor, 64, 0).strip()
    if not re.fullmatch(rb"[1-9][0-9]{0,9}", content) or int(content) == os.getpid():
        return False
    try:
        began = psutil.Process(int(content)).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    return began <= os.fstat(descriptor).st_mtime + CLOCK_SLACK_S
