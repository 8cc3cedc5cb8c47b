"""TLS off loopback: a certificate that the manager signs itself, and the connection that it protects.

Nobody vouches for such a certificate, so clients know it by its SHA-256, which stands in the join string.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsweep.errors import UsageError
from fedsweep.files import StrangeFile
from fedsweep.manager.private_files import read_private, write_private

HELLO = 0x16  # the first byte of a TLS connection
VALID_DAYS = 3650
_MOST = 65_536  # bytes of the file
_CHUNK = 65_536


@dataclass(frozen=True)
class Identity:
    """What a manager shows its clients."""

    context: ssl.SSLContext
    pin: str  # SHA-256 of the certificate, 64 hex digits


def ensure_identity(path: Path, now: datetime.datetime | None = None) -> Identity:
    """The key and the certificate in the file; made now, readable by their owner alone, where there is none.

    Args:
        path: a PEM file with both.
        now: the time of day that the certificate must be valid at.

    Raises:
        UsageError: there is a file, and it holds no key with its certificate, or the certificate has expired.
    """
    from cryptography import x509

    now = now or datetime.datetime.now(datetime.UTC)
    if not os.path.lexists(path):
        write_private(path, _new_identity(now))
    advice = "delete it, start the manager again, and give the workers the new join string"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Session tickets would lie unread with a client that leaves over the fingerprint: it would reset the connection,
    # and our log could not say why.
    context.num_tickets = 0
    try:
        certificate = x509.load_pem_x509_certificate(read_private(path, _MOST))
        context.load_cert_chain(path)
    except (OSError, ValueError) as error:  # an ssl.SSLError is an OSError
        reason = "it is not a PEM file with a key and its certificate"
        if isinstance(error, OSError) and not isinstance(error, ssl.SSLError | StrangeFile):
            reason = str(error.strerror)
        raise UsageError(f"no certificate in {path} ({reason}); {advice}") from None
    if certificate.not_valid_after_utc <= now:
        raise UsageError(f"the certificate in {path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {advice}")
    return Identity(context, fingerprint(certificate.public_bytes(_encoding().DER)))


def fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a certificate in DER, 64 hex digits."""
    return hashlib.sha256(certificate).hexdigest()


def _encoding() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding


def _new_identity(now: datetime.datetime) -> bytes:
    """A fresh key (ECDSA, P-256) and its certificate, as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fedsweep manager")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .sign(key, hashes.SHA256())
    )
    pem = _encoding().PEM
    return key.private_bytes(pem, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(pem)


class HandshakeFailed(ConnectionError):
    """The other side and we did not come to terms."""


class TlsStream:
    """Both halves of a TLS connection, with the methods of asyncio's streams that the server uses.

    asyncio's own TLS keeps 256 KiB for each connection, also for one that says nothing, and does not count those that
    are still shaking hands; the bytes pass through here instead.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext) -> None:
        self.transport = writer.transport
        self._reader = reader
        self._writer = writer
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._has_said_goodbye = False

    async def handshake(self, first: bytes) -> None:
        """Come to terms with a client that has sent these bytes.

        Raises:
            HandshakeFailed: with the reason; the client was told by TLS's own means.
        """
        self._incoming.write(first)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._receive()
            except ssl.SSLError as error:
                self._send()
                raise HandshakeFailed(_reason(error)) from None
            else:
                return self._send()

    async def read(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end.

        Raises:
            ConnectionError: what came is not of this connection.
        """
        if self._has_said_goodbye:
            return await self._reader.read(count)  # whatever still comes is of no interest
        while True:
            try:
                return self._tls.read(count)
            except ssl.SSLWantReadError:
                await self._receive()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""
            except ssl.SSLError as error:
                self._send()
                raise ConnectionResetError(_reason(error)) from None

    async def _receive(self) -> None:
        self._send()
        data = await self._reader.read(_CHUNK)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _send(self) -> None:
        if self._outgoing.pending:
            self._writer.write(self._outgoing.read())

    def write(self, data: bytes) -> None:
        """Send bytes, as `StreamWriter.write`."""
        left = memoryview(data)
        while left:
            left = left[self._tls.write(left) :]
        self._send()

    def write_eof(self) -> None:
        """Say that nothing more comes."""
        self._has_said_goodbye = True
        with contextlib.suppress(ssl.SSLError):  # the other side has not said so yet, or never will
            self._tls.unwrap()
        self._send()

    async def drain(self) -> None:
        """Wait until the client has taken enough, as `StreamWriter.drain`."""
        await self._writer.drain()

    def get_extra_info(self, name: str) -> Any:
        """As `StreamWriter.get_extra_info`."""
        return self._writer.get_extra_info(name)

    def close(self) -> None:
        """End the connection."""
        if not self._has_said_goodbye:
            self.write_eof()
        self._writer.close()


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL found, as words."""
    if isinstance(error, ssl.SSLEOFError):
        return "the connection ended"
    return (error.reason or str(error)).replace("_", " ").lower()
