"""Compiling the kernels of `fl/kernels.cpp` for this machine, once, and loading them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pooch
import torch

import fedsweep.fl

log = logging.getLogger(__name__)

SOURCE = Path(fedsweep.fl.__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("g++", "clang++", "c++")
LONGEST_BUILD_S = 300.0
_SCALARS = {torch.float32: "float", torch.float64: "double"}


@functools.cache
def load_kernels(dtype: torch.dtype = torch.float32, cache_dir: Path | None = None) -> ctypes.CDLL | None:
    """The kernels for this type, compiled at first use; None, with a line in the log, where they cannot be had.

    Args:
        dtype: float32 or float64.
        cache_dir: where compiled kernels lie; `kernels` in the user's cache folder if not given.
    """
    compiler = _compiler()
    if compiler is None:
        log.warning("no C++ compiler found (CXX, %s): training goes on without compiled kernels", ", ".join(COMPILERS))
        return None
    folder = Path(pooch.os_cache("fedsweep")) / "kernels" if cache_dir is None else cache_dir
    library = folder / f"{_digest(compiler, dtype)}.so"
    try:
        if not library.exists():
            _build(compiler, dtype, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", b"") or b""
        log.warning("training goes on without compiled kernels: %s %s", error, output.decode(errors="replace")[-2000:])
        return None


def kernel_version() -> str:
    """What changes when the kernels do."""
    return hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]


def _compiler() -> str | None:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((path for name in names if (path := shutil.which(name))), None)


def _digest(compiler: str, dtype: torch.dtype) -> str:
    """Names the compiled file: it fits this source, these flags, this compiler and this processor alone.

    A home folder is often shared by machines with different processors.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    parts = (SOURCE.read_bytes(), repr((FLAGS, dtype)).encode(), version, _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    """What instructions this processor has, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return b"\n".join(sorted({line for line in lines if line.split(b":")[0].strip() in (b"flags", b"Features")}))


def _build(compiler: str, dtype: torch.dtype, library: Path) -> None:
    log.info("compiling the training kernels for this machine, once (%s)", library)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *FLAGS, f"-DSCALAR={_SCALARS[dtype]}", str(SOURCE), "-o", str(built)]
        subprocess.run(command, capture_output=True, timeout=LONGEST_BUILD_S, check=True)
        built.replace(library)  # in one step, so that another process sees all of it or nothing
