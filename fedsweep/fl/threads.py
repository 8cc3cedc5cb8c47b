"""Work for several threads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor


class Threads:
    """So many threads of this process; with one, everything runs in the thread that asks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def run(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Do all jobs, begun in their order while the later ones are still being made; raise what one raises."""
        if self._pool is None:
            for job in jobs:
                job()
        else:
            for done in [self._pool.submit(job) for job in jobs]:
                done.result()
