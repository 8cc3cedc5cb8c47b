"""The manager's socket: connections in, requests to `answer`, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ipaddress
import logging
import os
import resource
import secrets
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

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

log = logging.getLogger(__name__)

Answer = Callable[[Request, bool], Mapping[str, Any]]

_CHUNK = 65_536
_LINGER_S = 1.0
_SPARE_FILES = 128  # file descriptors that the manager needs beside those of the connections
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # a silent peer is given up after 2 minutes
_TOKEN_BYTES = 4096  # at most, in a token file

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
    allow_legacy: bool = False,
    request_timeout_s: float = REQUEST_TIMEOUT_S,
) -> None:
    """Serve one connection until it ends: every request is answered as soon as its object is complete.

    Args:
        reader: the client's bytes.
        writer: where answers go; closed at the end.
        answer: maps a request, and whether an old client sent it, to the answer; a ProtocolError is answered as error.
        token: what every request must carry, but those of old clients.
        allow_legacy: serve requests without a token, on loopback.
        request_timeout_s: from the first byte of a request to its last, and for a client to take an answer. A client
            may be silent between requests as long as it likes, but only once it has sent a request that was admitted.
    """
    frames = FrameReader()
    gate = _Gate(token, allow_legacy=allow_legacy and _is_loopback_peer(writer))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + request_timeout_s
    try:
        while True:
            may_wait = gate.has_admitted and not frames.is_inside
            async with asyncio.timeout_at(None if may_wait else deadline):
                data = await reader.read(_CHUNK)
            if not data:
                break
            if may_wait:
                deadline = loop.time() + request_timeout_s
            for frame in frames.feed(data):
                writer.write(_reply(frame, answer, gate))
                async with asyncio.timeout(request_timeout_s):
                    await writer.drain()
                await asyncio.sleep(0)  # a client with many requests at once does not keep others waiting
                deadline = loop.time() + request_timeout_s
        if frames.is_inside:
            raise ProtocolError("truncated", "the connection ended inside a message")
    except TimeoutError:
        text = f"no complete request in {request_timeout_s:g} s"
        await _say_last(reader, writer, error_message("timeout", text))
    except ProtocolError as error:
        await _say_last(reader, writer, error_message(error.code, str(error)))
    except ConnectionError:
        pass  # the client has gone; what it holds comes back when its lease ends
    finally:
        writer.close()


async def _say_last(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    """Answer a client whose bytes cannot be read on, and wait a moment for its end.

    Closing while bytes of the client lie unread would reset the connection, and could destroy the answer with it.
    """
    if writer.transport.get_write_buffer_size() > 0:
        writer.transport.abort()  # it does not even take what it was told before
        return
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(encode(message))
        writer.write_eof()
        async with asyncio.timeout(_LINGER_S):
            while await reader.read(_CHUNK):
                pass


class _Gate:
    """Decides whose requests are served on one connection."""

    def __init__(self, token: str, *, allow_legacy: bool) -> None:
        self.token = token
        self.allow_legacy = allow_legacy
        self.has_admitted = False

    def admit(self, message: Mapping[str, Any]) -> bool:
        """Whether an old client sent the message.

        Raises:
            ProtocolError: it may not be served.
        """
        given = message.get("token")
        if given is None and not self.allow_legacy:
            raise ProtocolError("unauthorized", "the token is missing; it lies in the manager's state directory")
        # As bytes: compare_digest refuses text that is not ASCII.
        if given is not None and not hmac.compare_digest(str(given).encode(), self.token.encode()):
            raise ProtocolError("unauthorized", "the token is wrong; it lies in the manager's state directory")
        self.has_admitted = True
        return given is None


def _reply(frame: Frame, answer: Answer, gate: _Gate) -> bytes:
    """The bytes that answer one request. Never raises for what a client sent."""
    try:
        message = decode(frame.raw)
        is_legacy = gate.admit(message)
        reply = answer(parse_request(message), is_legacy)
        return fitted(reply) if is_legacy else encode(reply)
    except ProtocolError as error:
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


def _is_loopback_peer(writer: asyncio.StreamWriter) -> bool:
    peer = writer.get_extra_info("peername")
    return bool(peer) and _is_loopback(peer[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


async def listen(
    host: str,
    port: int,
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    insecure_plaintext: bool = False,
    max_connections: int = MAX_CONNECTIONS,
) -> asyncio.Server:
    """Listen on an address; `handle` gets every connection up to `max_connections` at once.

    Args:
        host: a name or an address.
        port: 0 picks a free one, on one address of the host.
        handle: serves one connection, as `serve_connection` does.
        insecure_plaintext: also where other machines can connect.
        max_connections: the next one is told `too_many_connections` and closed.

    Raises:
        UsageError: the address is taken or not ours, or not loopback while plain text off loopback was not asked for.
    """
    if not 0 <= port <= 65_535:
        raise UsageError(f"port {port}: expected 0 to 65535")
    addresses = await _resolve(host, port)
    if not insecure_plaintext and not all(_is_loopback(address) for address in addresses):
        raise UsageError(
            f"--host {host} can be reached from other machines, and the connection is not encrypted. Listen on "
            "127.0.0.1 and use an SSH tunnel, or accept the risk with --insecure-plaintext."
        )
    _allow_open_files(max_connections + _SPARE_FILES)
    open_connections = 0

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_connections
        if open_connections >= max_connections:
            writer.write(encode(error_message("too_many_connections", f"{max_connections:,} connections are open")))
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
        return await asyncio.start_server(
            admit, chosen, port, backlog=max_connections, limit=_CHUNK, reuse_address=True
        )
    except OSError as error:
        raise UsageError(f"cannot listen on {host}:{port}: {_reason(error)}") from None


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


def _allow_open_files(number: int) -> None:
    """Raise the process's own limit on open files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tune(writer: asyncio.StreamWriter) -> None:
    """Find out about peers that have vanished. (TCP_NODELAY is set by asyncio.)"""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def ensure_token(path: Path) -> str:
    """The token in the file; made now, readable by its owner alone, where there is none.

    Raises:
        UsageError: there is a file, and it holds no token.
    """
    if not os.path.lexists(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # mode 0600
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in the file.

    Raises:
        UsageError: the file is missing, unreadable or empty, or holds something else.
    """
    try:
        token = _read_small_file(path).decode("ascii").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file with a token"
        raise UsageError(
            f"no token in {path} ({reason}); it lies in the manager's state directory: name it by --token-file"
        ) from None
    if not token:
        raise UsageError(f"the token file {path} is empty; delete it and start the manager again")
    return token


def _read_small_file(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not waiting for the other end of a FIFO
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _TOKEN_BYTES:
            raise ValueError
        if facts.st_mode & 0o077:
            log.warning("others can read the token file %s; make it yours alone: chmod 600", path)
        return os.read(descriptor, _TOKEN_BYTES)
    finally:
        os.close(descriptor)
