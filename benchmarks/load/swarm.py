"""Simulated workers, each with a connection of its own that it keeps open, as real ones do. Run as a script.

It prints one line of JSON. How they ask:

* `open`: on a fixed schedule, whether answers come or not. A request's time runs from the moment at which it was due,
  not from when it was sent, so that a manager that stands still is charged for all that was to be asked meanwhile.
* `closed`: everybody asks again as soon as there is an answer: as many requests as the manager can serve.
* `at-once`: everybody connects at the same moment and asks for a task; the time runs from that moment.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import resource
import ssl
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from figures import due_times, latencies
from simulated import SAID_OF_A_TASK, Message, SimulatedWorker, encoded

PATIENCE_S = 60.0  # for the answers that are still to come at the end
STATUS_EVERY_S = 1.0  # somebody looks on


class Asker(Protocol):
    """Somebody who has something to say to a manager."""

    refused: dict[str, int]

    def next(self) -> Message: ...
    def hear(self, answer: Mapping[str, Any]) -> None: ...


class Onlooker:
    """Somebody who follows the sweep's status."""

    def __init__(self) -> None:
        self.refused: dict[str, int] = {}

    def next(self) -> Message:
        return {"type": "status"}

    def hear(self, answer: Mapping[str, Any]) -> None:
        if answer["type"] == "error":
            self.refused[answer["code"]] = self.refused.get(answer["code"], 0) + 1


class Line(asyncio.Protocol):
    """A connection, with one request under way at a time; what is due meanwhile waits."""

    def __init__(self, asker: Asker, swarm: Swarm) -> None:
        self.asker = asker
        self.swarm = swarm
        self.due: deque[float] = deque()  # the first is of the request under way
        self.kind = ""
        self.received = bytearray()
        self.closed = asyncio.Event()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.swarm.lost += bool(self.due)
        self.swarm.settle(len(self.due))
        self.due.clear()
        self.closed.set()

    def ask(self, due: float) -> None:
        """Ask, or ask later where an answer is still to come."""
        self.swarm.unanswered += 1
        self.due.append(due)
        if len(self.due) == 1:
            self._send(self.asker.next())

    def give_back(self, message: Message | None) -> None:
        """Say this last, if there is anything to say."""
        if message is not None:
            self.swarm.unanswered += 1
            self.due.append(0.0)
            self._send(message)

    def _send(self, message: Message) -> None:
        assert self.transport is not None
        self.kind = message["type"]
        self.transport.write(encoded(message, self.swarm.token))

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.received.endswith(b"\n"):
            now = time.perf_counter()
            self.swarm.waits[self.kind].append(now - self.due.popleft())
            self.swarm.last_answer = now
            self.asker.hear(json.loads(self.received))
            self.received.clear()
            self.swarm.settle(1)
            if self.due:
                self._send(self.asker.next())
            elif now < self.swarm.closed_until:
                self.ask(now)


class Swarm:
    """All lines, and what came of them."""

    def __init__(self, port: int, token: str, num_workers: int, seed: int, *, tls: bool = False) -> None:
        self.port = port
        self.tls = any_certificate() if tls else None
        self.token = token
        self.workers = [SimulatedWorker(f"simulated-{number}-0", seed) for number in range(num_workers)]
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.unanswered = 0
        self.lost = 0  # connections that ended with a request under way, or never came about
        self.last_answer = 0.0
        self.closed_until = 0.0
        self._lines: list[Line] = []
        self._all_answered = asyncio.Event()

    def settle(self, number: int) -> None:
        """Note that so many requests wait no longer."""
        self.unanswered -= number
        if self.unanswered == 0:
            self._all_answered.set()

    async def wait(self) -> None:
        """Wait until everything is answered."""
        self._all_answered.clear()
        if self.unanswered:
            await asyncio.wait_for(self._all_answered.wait(), PATIENCE_S)

    async def connect(self, asker: Asker) -> Line:
        loop = asyncio.get_running_loop()
        _, line = await loop.create_connection(lambda: Line(asker, self), "127.0.0.1", self.port, ssl=self.tls)
        self._lines.append(line)
        return line

    async def connect_all(self) -> list[Line]:
        """Everybody's line, one after the other."""
        return [await self.connect(worker) for worker in self.workers]

    async def open_loop(self, rate: float, seconds: float) -> dict[str, Any]:
        """Ask on a schedule, the workers in turn in an order drawn anew each time; an onlooker asks every second."""
        lines, onlooker = await self.connect_all(), await self.connect(Onlooker())
        turns = random.Random(0)
        await self._come_to_different_places(lines, turns)
        schedule = [(due, None) for due in due_times(rate, seconds)]
        schedule += [(due, onlooker) for due in due_times(1 / STATUS_EVERY_S, seconds)]
        schedule.sort(key=lambda entry: entry[0])
        gc.collect()
        gc.disable()  # pauses of this process are not the manager's
        order: list[Line] = []
        began = time.perf_counter() + 0.1
        for due, line in schedule:
            if (early := began + due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            if line is None and not order:
                order = turns.sample(lines, len(lines))
            (line or order.pop()).ask(began + due)
        await self.wait()
        took = max(self.last_answer - began, seconds)
        gc.enable()
        return {"offered_per_s": rate, **self._told(took), **await self._leave()}

    async def _come_to_different_places(self, lines: list[Line], chance: random.Random) -> None:
        """Let every worker say some of the things of its first task, untimed: else all would ask the same at a time."""
        for line in lines:
            for _ in range(chance.randrange(SAID_OF_A_TASK)):
                line.ask(time.perf_counter())
        await self.wait()
        self.waits.clear()

    async def closed_loop(self, seconds: float) -> dict[str, Any]:
        """Ask again whenever there is an answer."""
        lines = await self.connect_all()
        began = time.perf_counter()
        self.closed_until = began + seconds
        for line in lines:
            line.ask(began)
        await asyncio.sleep(seconds)
        await self.wait()
        return {**self._told(self.last_answer - began), **await self._leave()}

    async def at_once(self) -> dict[str, Any]:
        """Connect together, ask together."""
        began = time.perf_counter()

        async def come(worker: SimulatedWorker) -> None:
            try:
                line = await self.connect(worker)
            except OSError:
                self.lost += 1
            else:
                line.ask(began)

        await asyncio.gather(*map(come, self.workers))
        await self.wait()
        told = {"all_served_s": self.last_answer - began, **self._told(self.last_answer - began)}
        return {**told, **await self._leave()}

    def _told(self, took: float) -> dict[str, Any]:
        every = [wait for waits in self.waits.values() for wait in waits]
        refused: dict[str, int] = defaultdict(int)
        for worker in self.workers:
            for code, count in worker.refused.items():
                refused[code] += count
        return {
            "answered": len(every),
            "answered_per_s": len(every) / took,
            "all": latencies(every),
            "by_request": {kind: latencies(waits) for kind, waits in sorted(self.waits.items())},
            "refused": refused,
            "lost": self.lost,
            "results": sum(worker.done for worker in self.workers),
        }

    async def _leave(self) -> dict[str, Any]:
        """Go, and leave no task behind that the manager would have to wait for."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        for line in self._lines:
            if isinstance(line.asker, SimulatedWorker) and not line.closed.is_set():
                line.give_back(line.asker.give_back())
        await self.wait()
        for line in self._lines:
            assert line.transport is not None
            line.transport.close()
            await line.closed.wait()
        return {"cpu_s_of_the_swarm": used.ru_utime + used.ru_stime}


def any_certificate() -> ssl.SSLContext:
    """What a client encrypts with that does not ask whom it talks to, as is enough on this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("open", "closed", "at-once"))
    parser.add_argument("--port", type=int, required=True, help="of the manager, on this machine")
    parser.add_argument("--token-file", type=Path, required=True)
    parser.add_argument("--tls", action="store_true", help="speak TLS, as workers on other machines do")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=150.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of which tasks fail")
    args = parser.parse_args()
    wanted = args.workers + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0]),) * 2)

    async def run() -> dict[str, Any]:
        swarm = Swarm(args.port, args.token_file.read_text().strip(), args.workers, args.seed, tls=args.tls)
        if args.how == "open":
            return await swarm.open_loop(args.rate, args.seconds)
        return await (swarm.closed_loop(args.seconds) if args.how == "closed" else swarm.at_once())

    print(json.dumps(asyncio.run(run())))


if __name__ == "__main__":
    main()
