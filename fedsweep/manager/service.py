"""Serving a sweep from the first connection to the moment when it is over, or the manager is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedsweep.address import Address
from fedsweep.errors import UsageError
from fedsweep.manager.refusal_log import refusals
from fedsweep.manager.server import is_exposed, listen
from fedsweep.manager.state_dir import TLS_FILE, remove_address, write_address
from fedsweep.manager.tls import ensure_identity

if TYPE_CHECKING:
    from fedsweep.manager.manager import ExperimentManager

log = logging.getLogger(__name__)

TICK_S = 0.1
TELL_DONE_S = 8.0  # longer than workers wait before they ask again
CLOSING_S = 2.0
# SQLite lets the interpreter go at every statement. Behind a thread that computes (a summary, say), each statement of
# an answer would wait for one such interval, which is 5 ms if nothing is said.
SWITCH_S = 0.0005
SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def serve(manager: ExperimentManager, *, stay: bool, grace_s: float) -> None:
    """Listen, answer, look after leases, and return when the sweep is over (unless told to `stay`) or was stopped.

    Raises:
        UsageError: the address cannot be listened on, or not so.
    """
    connections = _Connections(manager)
    exposed = await is_exposed(manager.host, manager.port)
    if exposed:
        _secure(manager)
    server = await listen(
        manager.host, manager.port, connections.serve, exposed=exposed, speaks_tls=manager.identity is not None
    )
    manager.port = server.sockets[0].getsockname()[1]
    _announce(manager)
    manager.running = True
    try:
        with _stop_signals(manager), _quick_turns():
            await _until_over(manager, stay=stay, grace_s=grace_s)
    finally:
        manager.running = False
        remove_address(manager.state_dir)
        refusals.tell(is_last=True)
        server.close()
        await connections.close()


def _secure(manager: ExperimentManager) -> None:
    """See to it that nothing secret crosses a network unencrypted, or say aloud that it will.

    Raises:
        UsageError: old clients were to be served here, or there is no certificate to be had.
    """
    if manager.allow_legacy:
        raise UsageError(
            f"--allow-legacy serves clients that send no token, so it needs an address that this machine alone "
            f"reaches; --host {manager.host} is none. Leave --host out, and let others come by an SSH tunnel."
        )
    if manager.insecure_plaintext:
        log.warning("NOT ENCRYPTED: whoever can read along on the network of %s gets the token", manager.host)
    else:
        manager.identity = ensure_identity(manager.state_dir / TLS_FILE)


def _announce(manager: ExperimentManager) -> None:
    """Leave word where this manager listens; print the join string, where other machines need one."""
    pin = None if manager.identity is None else manager.identity.pin
    address = Address(manager.host, manager.port, pin)
    write_address(manager.state_dir, address)
    log.info("listening on %s", address.place)
    if pin is not None:
        log.info("workers on other machines: fedsweep worker --token-file COPY_OF_THE_TOKEN --join (what follows)")
        print(address.for_others(), flush=True)


class _Connections:
    """The open connections, so that they can be ended in order rather than cancelled."""

    def __init__(self, manager: ExperimentManager) -> None:
        self._manager = manager
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._manager.handle_client(reader, writer)
        finally:
            self._writers.discard(writer)

    async def close(self) -> None:
        """Close every connection, and wait until nobody is served any more."""
        deadline = asyncio.get_running_loop().time() + CLOSING_S
        while self._writers and asyncio.get_running_loop().time() < deadline:
            for writer in list(self._writers):
                writer.close()
            await asyncio.sleep(0.01)


@contextmanager
def _stop_signals(manager: ExperimentManager) -> Iterator[None]:
    """Make SIGTERM and SIGINT stop the manager: the first in order, the second at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals; here `stop` is called directly
        return
    loop = asyncio.get_running_loop()
    for kind in SIGNALS:
        loop.add_signal_handler(kind, manager.stop, kind == signal.SIGTERM)
    try:
        yield
    finally:
        for kind in SIGNALS:
            loop.remove_signal_handler(kind)


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let threads take turns more often than they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


async def _until_over(manager: ExperimentManager, *, stay: bool, grace_s: float) -> None:
    loop = asyncio.get_running_loop()
    give_up_at: float | None = None
    stop_at: float | None = None  # when results are waited for no longer
    while True:
        manager.check_stale_assignments()
        manager.sweep.look_at_pace()
        refusals.tell()
        if manager.stops > 1:
            return
        if manager.stops == 1:
            give_up_at = give_up_at or loop.time() + grace_s
            if not manager.assigned_tasks or loop.time() >= give_up_at:
                return
        elif (ending := manager.sweep.ending) is not None:
            if ending == "stop":
                stop_at = stop_at or loop.time() + grace_s
            if manager.assigned_tasks and (stop_at is None or loop.time() < stop_at):
                give_up_at = None
            else:
                give_up_at = give_up_at or loop.time() + TELL_DONE_S
                if manager.sweep.has_told_everyone() or loop.time() >= give_up_at:
                    return
        elif stay or not manager.check_all_complete():
            give_up_at = None
        else:
            give_up_at = give_up_at or loop.time() + TELL_DONE_S
            if manager.sweep.is_up_to_date() and (manager.sweep.has_told_everyone() or loop.time() >= give_up_at):
                return
        await asyncio.sleep(TICK_S)
