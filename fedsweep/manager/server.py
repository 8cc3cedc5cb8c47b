"""The manager's socket: connections in, requests to `answer`, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import logging
import os
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from fedsweep.address import is_loopback
from fedsweep.errors import FedsweepError, ProtocolError, UsageError
from fedsweep.manager.protocol import (
    LEGACY_ACK,
    LEGACY_ANSWER,
    MAX_CONNECTIONS,
    REQUEST_TIMEOUT_S,
    Frame,
    FrameReader,
    Request,
    decode,
    encode,
    error_message,
    parse_request,
)
from fedsweep.manager.refusal_log import refusals
from fedsweep.manager.tls import HELLO, HandshakeFailed, TlsStream

log = logging.getLogger(__name__)

Answer = Callable[[Request, bool], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]
_Source = asyncio.StreamReader | TlsStream
_Sink = asyncio.StreamWriter | TlsStream

_CHUNK = 65_536
_LINGER_S = 1.0
MAX_UNPROVEN = 128 * 1024 * 1024  # bytes of unfinished requests of all those together who have not shown the token yet

# Connections that are taken in at a time. Those over the limit are open for a moment, too, and asyncio logs each one
# for which there is no file descriptor, with a traceback.
_ACCEPTED_AT_ONCE = 32
_SPARE_FILES = 256  # file descriptors that the manager needs beside those of the connections within the limit
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # a silent peer is given up after 2 minutes

_OLD_STATUS_FIELDS = ("total", "pending", "assigned", "complete", "failed", "progress")
_OLD_TASK_FIELDS = (
    "task_id",
    "phase",
    "config",
    "seed",
    "output_dir",
    "output_dirs",
    "status",
    "assigned_to",
    "assigned_at",
    "retry_count",
    "last_error",
)


async def serve_connection(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Answer,
    *,
    token: str,
    tls: ssl.SSLContext | None = None,
    allow_legacy: bool = False,
    request_timeout_s: float = REQUEST_TIMEOUT_S,
) -> None:
    """Serve one connection until it ends: every request is answered as soon as its object is complete.

    Args:
        reader: the client's bytes.
        writer: where answers go; closed at the end.
        answer: maps a request, and whether an old client sent it, to the answer, or to what the answer can be awaited
            from; a ProtocolError is answered as error.
        token: what every request must carry, but those of old clients.
        tls: shake hands first, with this certificate; None: plain text.
        allow_legacy: serve requests without a token, on loopback.
        request_timeout_s: from the first byte of a request to its last, and for a client to take an answer. A client
            may be silent between requests as long as it likes, but only once it has sent a request that was admitted.
    """
    deadline = asyncio.get_running_loop().time() + request_timeout_s
    source: _Source = reader
    sink: _Sink = writer
    last_words = None
    try:
        try:
            if tls is not None:
                source = sink = await _secured(reader, writer, tls, deadline)
            gate = _Gate(token, allow_legacy=allow_legacy and is_loopback(_peer(writer)))
            await _serve_requests(source, sink, answer, gate, deadline, request_timeout_s)
        except TimeoutError:
            last_words = error_message("timeout", f"no complete request in {request_timeout_s:g} s")
        except ProtocolError as error:
            refusals.warn(f"%s cannot be understood: {error.code}", _peer(writer))
            last_words = error_message(error.code, str(error))
        except HandshakeFailed as error:
            refusals.warn("%s: no TLS connection came about (%s)", _peer(writer), error)
        except OSError:
            pass  # the client has gone, or the network has; what it holds comes back when its lease ends
        if last_words is not None:  # only now: an exception holds on to all that was sent
            await _say_last(source, sink, last_words)
    finally:
        sink.close()


async def _secured(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: ssl.SSLContext, deadline: float
) -> TlsStream:
    """Come to terms with the client on TLS.

    Raises:
        ProtocolError: it speaks plain text.
        HandshakeFailed: it says nothing, or speaks TLS, or something like it, and nothing came of it.
    """
    try:
        async with asyncio.timeout_at(deadline):
            first = await reader.read(_CHUNK)
            if not first:
                raise HandshakeFailed("it left without a word")
            if first[0] != HELLO:
                text = "this port speaks TLS; use the join string that the manager printed: --join HOST:PORT#sha256:…"
                raise ProtocolError("plain_on_tls_port", text)
            stream = TlsStream(reader, writer, tls)
            await stream.handshake(first)
            return stream
    except TimeoutError:
        raise HandshakeFailed("not in time") from None


async def _serve_requests(
    source: _Source, sink: _Sink, answer: Answer, gate: _Gate, deadline: float, request_timeout_s: float
) -> None:
    """Answer requests until the client ends its side."""
    frames = FrameReader()
    loop = asyncio.get_running_loop()
    with _Unproven() as unproven:
        while True:
            may_wait = gate.has_admitted and not frames.is_inside
            async with asyncio.timeout_at(None if may_wait else deadline):
                data = await source.read(_CHUNK)
            if not data:
                break
            if may_wait:
                deadline = loop.time() + request_timeout_s
            for frame in frames.feed(data):
                sink.write(await _reply(frame, answer, gate))
                async with asyncio.timeout(request_timeout_s):
                    await sink.drain()
                await asyncio.sleep(0)  # a client with many requests at once does not keep others waiting
                deadline = loop.time() + request_timeout_s
            unproven.hold(0 if gate.has_admitted else frames.waiting)
    if frames.is_inside:
        raise ProtocolError("truncated", "the connection ended inside a message")
    if isinstance(source, TlsStream) and not gate.has_asked:
        raise HandshakeFailed("it left without a request; does it expect another certificate?")


class _Unproven:
    """What one client that has not shown the token yet has sent of its request. All together have a limit: otherwise
    strangers could fill the memory, a message each.
    """

    total = 0  # bytes

    def __init__(self) -> None:
        self._held = 0

    def hold(self, count: int) -> None:
        """Hold so many bytes from now on.

        Raises:
            ProtocolError: there is no room for them.
        """
        _Unproven.total += count - self._held
        self._held, grows = count, count > self._held
        if grows and _Unproven.total > MAX_UNPROVEN:
            raise ProtocolError("retry_later", "too many clients without the token send large messages; try again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hold(0)


async def _say_last(source: _Source, sink: _Sink, message: Mapping[str, Any]) -> None:
    """Answer a client whose bytes cannot be read on, and wait a moment for its end.

    Closing while bytes of the client lie unread would reset the connection, and could destroy the answer with it.
    """
    if sink.transport.get_write_buffer_size() > 0:
        sink.transport.abort()  # it does not even take what it was told before
        return
    with contextlib.suppress(OSError):
        sink.write(encode(message))
        sink.write_eof()
        async with asyncio.timeout(_LINGER_S):
            while await source.read(_CHUNK):
                pass


class _Gate:
    """Decides whose requests are served on one connection."""

    def __init__(self, token: str, *, allow_legacy: bool) -> None:
        self.token = token
        self.allow_legacy = allow_legacy
        self.has_asked = False
        self.has_admitted = False

    def admit(self, message: Mapping[str, Any]) -> bool:
        """Whether an old client sent the message.

        Raises:
            ProtocolError: it may not be served.
        """
        self.has_asked = True
        given = message.get("token")
        if given is None and not self.allow_legacy:
            raise ProtocolError("unauthorized", "the token is missing; it lies in the manager's state directory")
        # As bytes: compare_digest refuses text that is not ASCII.
        if given is not None and not hmac.compare_digest(str(given).encode(), self.token.encode()):
            raise ProtocolError("unauthorized", "the token is wrong; it lies in the manager's state directory")
        self.has_admitted = True
        return given is None


async def _reply(frame: Frame, answer: Answer, gate: _Gate) -> bytes:
    """The bytes that answer one request. Never raises for what a client sent."""
    try:
        message = decode(frame.raw)
        is_legacy = gate.admit(message)
        reply = answer(parse_request(message), is_legacy)
        if isinstance(reply, Awaitable):
            reply = await reply
        return fitted(reply) if is_legacy else encode(reply)
    except ProtocolError as error:
        if error.code == "unauthorized":
            refusals.warn("a request was refused: %s", error)
        return encode(error_message(error.code, str(error)))
    except FedsweepError as error:
        log.warning("a request failed: %s", error)
        return encode(error_message("internal", str(error)))
    except Exception:
        log.exception("a request failed")
        return encode(error_message("internal", "the manager failed on this request; its log has the reason"))


def fitted(message: Mapping[str, Any]) -> bytes:
    """An answer as an old client can take it: what it knows, small enough for its single read."""
    kind = message["type"]
    limit = LEGACY_ACK if kind == "ack" else LEGACY_ANSWER
    if kind == "status":
        status = message["status"]
        message = {"type": "status", "status": {name: status[name] for name in _OLD_STATUS_FIELDS if name in status}}
    elif kind == "ack":
        message = {name: message[name] for name in ("type", "status") if name in message}
    elif kind == "task":
        task = {name: message["task"].get(name) for name in _OLD_TASK_FIELDS}
        message = {"type": "task", "task": task}
        if len(encode(message)) > limit:  # the manager knows both in full
            task |= {"output_dirs": [task["output_dir"]], "last_error": None}
    encoded = encode(message)
    if len(encoded) > limit:
        text = f"the answer has {len(encoded)} bytes and an old client reads {limit}; use `fedsweep worker`"
        return encode(error_message("too_large", text))
    return encoded


def _peer(writer: asyncio.StreamWriter) -> str:
    """The address of the other side, in numbers."""
    peer = writer.get_extra_info("peername")
    return str(peer[0]) if peer else ""


async def is_exposed(host: str, port: int) -> bool:
    """Whether other machines can reach the addresses that a host name means.

    Raises:
        UsageError: there is no such host.
    """
    return not all(map(is_loopback, await _resolve(host, port)))


async def listen(
    host: str,
    port: int,
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    exposed: bool = False,
    speaks_tls: bool = False,
    max_connections: int = MAX_CONNECTIONS,
) -> asyncio.Server:
    """Listen on an address; `handle` gets every connection up to `max_connections` at once.

    Args:
        host: a name or an address.
        port: 0 picks a free one, on one address of the host.
        handle: serves one connection, as `serve_connection` does.
        exposed: also where other machines can connect. Otherwise the address that was bound is checked before
            anybody is let in.
        speaks_tls: whether `handle` expects TLS, so that nobody is told anything in plain text here.
        max_connections: the next one is told `too_many_connections` and closed. Fewer, where the system allows fewer
            open files.

    Raises:
        UsageError: the address is taken or not ours, or others can reach it although that was not asked for.
    """
    if not 0 <= port <= 65_535:
        raise UsageError(f"port {port}: expected 0 to 65535")
    addresses = await _resolve(host, port)
    limit = max(1, min(max_connections, _allow_open_files(max_connections + _SPARE_FILES) - _SPARE_FILES))
    if limit < max_connections:
        log.warning("this system allows %d connections at once, not %d; see `ulimit -Hn`", limit, max_connections)
    open_connections = 0

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_connections
        if open_connections >= limit:
            text = f"{limit:,} connections are open"
            refusals.warn("%s was refused: %s", _peer(writer), text)
            if not speaks_tls:
                writer.write(encode(error_message("too_many_connections", text)))
            writer.close()
            return
        open_connections += 1
        try:
            _tune(writer)
            await handle(reader, writer)
        finally:
            open_connections -= 1

    # Each address would get a free port of its own.
    chosen = addresses[:1] if port == 0 else addresses
    try:
        server = await asyncio.start_server(
            admit, chosen, port, backlog=_ACCEPTED_AT_ONCE, limit=_CHUNK, reuse_address=True, start_serving=False
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {_reason(error)}") from None
    if not exposed and (bound := [each for each in _bound(server) if not is_loopback(each)]):
        server.close()
        raise UsageError(f"--host {host} is {bound[0]}, which other machines can reach; nothing would be encrypted")
    try:
        await server.start_serving()
        for each in server.sockets:
            with socket.socket(fileno=os.dup(each.fileno())) as same:
                same.listen(max_connections)  # so many may wait to be taken in
    except OSError as error:
        server.close()
        raise UsageError(f"cannot listen on {host}:{port}: {_reason(error)}") from None
    return server


def _bound(server: asyncio.Server) -> list[str]:
    return [str(each.getsockname()[0]) for each in server.sockets]


async def _resolve(host: str, port: int) -> list[str]:
    """The addresses that a host name means, IPv4 first."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no such host ({_reason(error)}); try 127.0.0.1") from None
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _reason(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    reason = str(error) if code is None or code < 0 else os.strerror(code)
    if code == errno.EADDRINUSE:
        return f"{reason}. Is a manager running there? Name another --port; 0 picks a free one."
    if code == errno.EACCES:
        return f"{reason}. Ports below 1024 are for the system; name another --port."
    return reason


def _allow_open_files(number: int) -> int:
    """Raise the process's own limit on open files, as far as the system lets it; how many of so many it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return number
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _tune(writer: asyncio.StreamWriter) -> None:
    """Find out about peers that have vanished. (TCP_NODELAY is set by asyncio.)"""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
