"""Permissions of files that hold for root too, as they do for everybody else."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
VERSION_3 = 0x20080522  # of the kernel's interface
PR_CAPBSET_DROP = 24


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Take from this thread what lets it read and write whatever it likes."""
    libc = ctypes.CDLL(None)
    header, before, reduced = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    reduced[:] = before[:]
    reduced[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)  # of what is effective
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def give_up_privileges() -> None:
    """The same for good, before a process becomes another program; whoever has none gives up none."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
