"""Sweeps of real processes, started in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import RealSweep, Zygote, prepare


@pytest.fixture(scope="module")
def zygotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Zygote]]:
    """What starts managers and workers; whatever still runs at the end is killed."""
    logs = tmp_path_factory.mktemp("zygotes")
    made = {role: Zygote(role, logs / f"{role}.log") for role in ("manager", "worker")}
    for zygote in made.values():
        zygote.wait_ready()
    yield made
    for zygote in made.values():
        zygote.close()


@pytest.fixture
def real_sweep(tmp_path: Path, zygotes: dict[str, Zygote]) -> Iterator[Callable[[str], RealSweep]]:
    """A sweep with this configuration, nothing started yet; its processes are killed afterwards."""
    made: list[RealSweep] = []

    def set_up(config: str) -> RealSweep:
        prepare(tmp_path, config)
        made.append(RealSweep(tmp_path, zygotes))
        return made[0]

    yield set_up
    for each in made:
        each.clear()
