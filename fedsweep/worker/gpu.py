"""One worker holds one GPU, through locks that cannot outlive its process.

The lock is `flock` on `.gpu_locks/gpu_{id}.lock`. The file's content, the PID of the holder, is for people and for
workers of older scripts, which lock nothing. The kernel drops the lock with the process, however that ends, so a dead
holder never blocks; it gives the lock to one process only; and a PID that was given out again means nothing to it.

Beside it stands a *witness*, a name in Linux's abstract socket space, which goes with the process too. No cleaner can
delete it, so a file that was deleted while its lock was held does not let a second holder in.

GPUs are numbered as NVML and `nvidia-smi` number them, whatever CUDA_VISIBLE_DEVICES says.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedsweep.errors import FedsweepError
from fedsweep.files import StrangeFile, open_plain, read_plain

log = logging.getLogger(__name__)

LOCK_DIR = Path(".gpu_locks")
GIB = 1024**3
MIN_FREE_BYTES = 4 * GIB
# The kernel tells when a process began to the second; one that began later than this after a file was written cannot
# have written it.
CLOCK_SLACK_S = 2.0
# How often a lock file is opened anew because somebody deleted it between opening and locking.
OPENINGS = 100


class GpuUnavailable(FedsweepError):
    """The GPU cannot be used: it is not there, another worker holds it, or it has less than 4 GB free."""

    exit_code = 2


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine as NVML knows it."""

    index: int  # NVML's
    uuid: str
    free_bytes: int


@dataclass(frozen=True)
class GpuLock:
    """A lock that this process holds; it lasts while both stay open."""

    gpu_id: int
    descriptor: int
    witness: socket.socket | None

    def close(self) -> None:
        """Let go of both in this process."""
        os.close(self.descriptor)
        if self.witness is not None:
            self.witness.close()


_held: list[GpuLock] = []


# ---- which GPUs there are


def list_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES; empty without a driver.

    An index in CUDA_VISIBLE_DEVICES is read as `nvidia-smi` shows it (CUDA_DEVICE_ORDER=PCI_BUS_ID). As CUDA does, the
    list is read up to the first entry that names no GPU.
    """
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("no GPU: %s", error)
        return []
    try:
        facts = [_facts(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return _visible([gpu for gpu in facts if gpu], os.environ.get("CUDA_VISIBLE_DEVICES"))


def _facts(pynvml: Any, index: int) -> Gpu | None:
    """What NVML says of one GPU; None for one that has failed, so that it does not hide the others."""
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        free = pynvml.nvmlDeviceGetMemoryInfo(handle).free
    except pynvml.NVMLError as error:
        log.warning("GPU %d is passed over: %s", index, error)
        return None
    return Gpu(index, uuid.decode() if isinstance(uuid, bytes) else uuid, int(free))


def _visible(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """Keep what CUDA_VISIBLE_DEVICES names, by index or by (the beginning of) a UUID."""
    if visible is None:
        return gpus
    kept: list[Gpu] = []
    for name in (part.strip() for part in visible.split(",")):
        matches = [gpu for gpu in gpus if name == str(gpu.index) or (name[:4] == "GPU-" and gpu.uuid.startswith(name))]
        if len(matches) != 1 or matches[0] in kept:
            if name not in ("", "-1"):
                log.warning(
                    "CUDA_VISIBLE_DEVICES=%s: %s names no GPU, or one twice; the rest is not read", visible, name
                )
            break
        kept += matches
    return kept


# ---- claiming and releasing


def get_available_gpu(lock_dir: str | Path = LOCK_DIR) -> int | None:
    """Claim the first GPU that nobody holds and that has 4 GB free; its NVML index, or None where none can be had.

    It is released by `release_gpu_lock`, at exit, or by the kernel when the process is killed.
    """
    for gpu in list_gpus():
        try:
            claim_gpu(gpu, lock_dir)
        except GpuUnavailable as reason:
            log.warning("passed over: %s", reason)
        else:
            return gpu.index
    return None


def claim_gpu(gpu: Gpu, lock_dir: str | Path = LOCK_DIR) -> None:
    """Claim this GPU.

    Raises:
        GpuUnavailable: another worker (or this one) holds it, it has too little memory free, or its lock file cannot
            be used; the message says which.
    """
    if gpu.free_bytes < MIN_FREE_BYTES:
        free = f"{gpu.free_bytes / GIB:.1f} GB"
        raise GpuUnavailable(f"GPU {gpu.index} has {free} free; a worker needs {MIN_FREE_BYTES / GIB:.0f} GB")
    path = Path(lock_dir) / f"gpu_{gpu.index}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(gpu.index, path)
    except OSError as error:
        raise GpuUnavailable(f"GPU {gpu.index}: its lock {path} cannot be used: {error.strerror}") from error
    if not _held:
        atexit.register(_release_all)
    _held.append(lock)


def release_gpu_lock(gpu_id: int) -> None:
    """Give a GPU back; nothing happens if this process does not hold it.

    The file is emptied and stays. Were it deleted, a process that opened it a moment ago could lock a file without a
    name, and a third a new file of that name.
    """
    for lock in [each for each in _held if each.gpu_id == gpu_id]:
        _held.remove(lock)
        with contextlib.suppress(OSError):
            os.ftruncate(lock.descriptor, 0)
        lock.close()


def _release_all() -> None:
    for lock in list(_held):
        release_gpu_lock(lock.gpu_id)


def _forget_in_child() -> None:
    """A forked child must not keep the GPU when its parent dies. The parent's lock is not touched by this."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_forget_in_child)


# ---- the two locks


def _lock(gpu_id: int, path: Path) -> GpuLock:
    """Take the witness, then the file (everybody in this order, so that no two get one each)."""
    witness = _take_witness(gpu_id, path)
    try:
        descriptor = _take_file(gpu_id, path)
    except BaseException:
        if witness is not None:
            witness.close()
        raise
    return GpuLock(gpu_id, descriptor, witness)


def _take_witness(gpu_id: int, path: Path) -> socket.socket | None:
    """Bind the name of this lock in the abstract socket space; None on systems that have none.

    It is seen within one network namespace; between containers that share the folder the file alone decides.
    """
    if sys.platform != "linux":
        return None
    place = hashlib.sha256(os.fsencode(os.path.realpath(path.parent))).hexdigest()[:32]
    witness = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        witness.bind(f"\0fedsweep/{place}/gpu_{gpu_id}")
    except OSError as error:
        witness.close()
        if error.errno == errno.EADDRINUSE:
            raise GpuUnavailable(f"GPU {gpu_id} is held by another worker{_holder(path)}") from None
        log.debug("no witness for %s: %s", path, error)
        return None
    return witness


def _take_file(gpu_id: int, path: Path) -> int:
    """Lock the file that has this name and write our PID into it; its descriptor."""
    for _ in range(OPENINGS):
        descriptor = _open_plain(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _has_name(descriptor, path):
                _refuse_older_worker(gpu_id, descriptor, path)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise GpuUnavailable(f"GPU {gpu_id} is held by another worker{_holder(path)}") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise GpuUnavailable(f"GPU {gpu_id}: somebody keeps deleting its lock {path}")


def _open_plain(path: Path) -> int:
    """Open or create the lock file; neither following a link nor waiting for the other end of a FIFO."""
    try:
        return open_plain(path, os.O_RDWR | os.O_CREAT, follow=False)
    except OSError as error:
        if error.errno == errno.ELOOP:
            error.strerror = "it is a symbolic link; delete it"
        elif isinstance(error, StrangeFile):
            error.strerror = "it is not a plain file; delete it"
        raise


def _has_name(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one that has the name; a cleaner may have deleted it since."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _refuse_older_worker(gpu_id: int, descriptor: int, path: Path) -> None:
    """Raise if the PID in the file is that of a live process that may have written it.

    Workers of older scripts write their PID and lock nothing. A process that began after the file was written has only
    been given the same PID; so has this very process.
    """
    content = os.pread(descriptor, 64, 0).strip()
    if not content:
        return
    if not re.fullmatch(rb"[1-9][0-9]{0,9}", content):
        log.warning("%s holds %r, which is no PID; it is taken over", path, content)
    elif int(content) != os.getpid() and _may_have_written(int(content), os.fstat(descriptor).st_mtime):
        raise GpuUnavailable(f"GPU {gpu_id} is held by an older worker, process {int(content)} ({path})")
    else:
        log.info("%s was left by process %d, which is dead; it is taken over", path, int(content))


def _may_have_written(pid: int, written_at: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= written_at + CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _holder(path: Path) -> str:
    """Who holds a lock, for a message."""
    try:
        pid = read_plain(path, follow=False)[:64].strip()
    except OSError:
        return ""
    return f", process {int(pid)}" if pid.isdigit() else ""
