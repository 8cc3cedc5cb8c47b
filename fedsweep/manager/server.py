"""The manager's socket: connections in, requests to `answer`, answers out."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import secrets
import socket
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
# What an answer to an old client gives up, in this order, until it fits into the client's single read.
_SPARE_TASK_FIELDS = ("last_error", "output_dirs", "assigned_to", "assigned_at", "signature", "status", "retry_count")
_OLD_STATUS_FIELDS = ("total", "pending", "assigned", "complete", "failed", "progress")


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
        request_timeout_s: from the first byte of a request to its last. A client may be silent between requests.
    """
    frames = FrameReader()
    loop = asyncio.get_running_loop()
    deadline = 0.0
    try:
        while True:
            if not frames.is_inside:
                deadline = 0.0
            elif not deadline:
                deadline = loop.time() + request_timeout_s
            async with asyncio.timeout_at(deadline or None):
                data = await reader.read(_CHUNK)
            if not data:
                return
            for frame in frames.feed(data):
                writer.write(_reply(frame, answer, token, allow_legacy=allow_legacy and _is_loopback_peer(writer)))
            await writer.drain()
    except TimeoutError:
        text = f"the request was not complete {request_timeout_s:g} s after its first byte"
        await _say(writer, error_message("timeout", text))
    except ProtocolError as error:
        await _say(writer, error_message(error.code, str(error)))
    except ConnectionError:
        pass  # the client has gone; what it holds comes back when its lease ends
    finally:
        writer.close()


async def _say(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    """A last answer to a client whose bytes cannot be read on."""
    try:
        writer.write(encode(message))
        await writer.drain()
    except ConnectionError:
        pass


def _reply(frame: Frame, answer: Answer, token: str, *, allow_legacy: bool) -> bytes:
    """The bytes that answer one request. Never raises for what a client sent."""
    try:
        request = parse_request(decode(frame.raw))
        is_legacy = request.token is None
        if is_legacy and not allow_legacy:
            raise ProtocolError("unauthorized", "the token is missing; it lies in the manager's state directory")
        if request.token is not None and not hmac.compare_digest(request.token.encode(), token.encode()):
            raise ProtocolError("unauthorized", "the token is wrong; it lies in the manager's state directory")
        message = answer(request, is_legacy)
        return fitted(message) if is_legacy else encode(message)
    except ProtocolError as error:
        return encode(error_message(error.code, str(error)))
    except FedsweepError as error:
        log.warning("a request failed: %s", error)
        return encode(error_message("internal", str(error)))
    except Exception:
        log.exception("a request failed")
        return encode(error_message("internal", "the manager failed on this request; its log has the reason"))


def fitted(message: Mapping[str, Any]) -> bytes:
    """An answer as an old client can take it: one object, small enough for its single read."""
    kind = message["type"]
    if kind == "status":
        status = message["status"]
        message = {"type": "status", "status": {name: status[name] for name in _OLD_STATUS_FIELDS if name in status}}
    if kind == "ack":
        message = {name: message[name] for name in ("type", "status") if name in message}
    limit = LEGACY_ACK if kind == "ack" else LEGACY_ANSWER
    spare = list(_SPARE_TASK_FIELDS)
    while len(encoded := encode(message)) > limit and kind == "task" and spare:
        dropped = spare.pop(0)
        message = {"type": "task", "task": {name: value for name, value in message["task"].items() if name != dropped}}
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

    Raises:
        UsageError: the address is taken or not ours, or not loopback while plain text off loopback was not asked for.
    """
    if not _is_loopback(host) and not insecure_plaintext:
        raise UsageError(
            f"--host {host} can be reached from other machines, and the connection is not encrypted. Listen on "
            "127.0.0.1 and use an SSH tunnel, or accept the risk with --insecure-plaintext."
        )
    open_connections = 0

    async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_connections
        if open_connections >= max_connections:
            await _say(writer, error_message("too_many_connections", f"{max_connections} connections are open"))
            writer.close()
            return
        open_connections += 1
        try:
            _tune(writer)
            await handle(reader, writer)
        finally:
            open_connections -= 1

    try:
        return await asyncio.start_server(admit, host, port, backlog=max_connections, limit=_CHUNK)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}. Is a manager running there? "
            "Name another --port; 0 picks a free one."
        ) from None


def _tune(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def ensure_token(path: Path) -> str:
    """The token in the file; made now, readable by its owner alone, where there is none."""
    try:
        return read_token(path)
    except UsageError:
        if path.exists():
            raise
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_urlsafe(32) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    return read_token(path)


def read_token(path: Path) -> str:
    """The token in the file.

    Raises:
        UsageError: the file is missing, unreadable or empty.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(
            f"no token in {path} ({reason}); it lies in the manager's state directory: name it by --token-file"
        ) from None
    if not token:
        raise UsageError(f"the token file {path} is empty; delete it and start the manager again")
    return token
