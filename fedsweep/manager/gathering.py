"""Requests that come at the same time are answered together, so that the disk is waited for once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fedsweep.manager.protocol import Release, Request, RequestTask, SubmitResult, TaskFailed

CHANGING = (RequestTask, SubmitResult, TaskFailed, Release)  # the requests that workers wait for the disk with
MOST = 100  # requests that are answered together; those behind them do not wait for more

Answer = dict[str, Any]
Asked = tuple[Request, bool]


class Gathering:
    """Gathers the requests of one turn of the event loop: all that arrived while the disk was waited for before.

    Args:
        answer_all: the answers to several requests, or what is to be raised in the place of one.
    """

    def __init__(self, answer_all: Callable[[Sequence[Asked]], Sequence[Answer | Exception]]) -> None:
        self._answer_all = answer_all
        self._waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []

    async def answer(self, request: Request, legacy: bool) -> Answer:
        """The answer to a request; what it changed is on disk.

        Raises:
            Exception: what was said in the place of an answer.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._serve)
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(((request, legacy), answer))
        return await answer

    def _serve(self) -> None:
        now, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._serve)
        said: Sequence[Answer | Exception]
        try:
            said = self._answer_all([asked for asked, _ in now])
        except Exception as error:
            said = [error] * len(now)
        for (_, future), answer in zip(now, said, strict=True):
            if future.done():
                continue  # nobody waits any more
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
