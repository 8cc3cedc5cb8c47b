"""The worker's side of TLS: the manager is who shows the certificate whose SHA-256 the join string has."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import socket
import ssl

from fedsweep.address import is_loopback
from fedsweep.errors import ManagerNotTrusted


def secure(connection: socket.socket, pin: str, place: str) -> ssl.SSLSocket:
    """The connection under TLS, once the other side has proved that it is the manager. Nothing was sent before.

    Args:
        connection: a fresh one, with the time-out that the handshake may take.
        pin: SHA-256 of the manager's certificate, 64 hex digits.
        place: where it leads, for messages.

    Raises:
        ManagerNotTrusted: somebody else answers, or nobody who speaks TLS, or the certificate has expired.
        OSError: the connection broke.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a name proves nothing here; the fingerprint does
    context.verify_mode = ssl.CERT_NONE
    try:
        secured = context.wrap_socket(connection)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
            raise ManagerNotTrusted(
                f"what answers at {place} does not speak TLS; a manager without TLS is named by --manager {place}"
            ) from None
        raise
    try:
        _check(secured.getpeercert(binary_form=True) or b"", pin, place)
    except BaseException:
        secured.close()
        raise
    return secured


def _check(certificate: bytes, pin: str, place: str) -> None:
    from cryptography import x509

    found = hashlib.sha256(certificate).hexdigest()
    if not hmac.compare_digest(found, pin):
        raise ManagerNotTrusted(
            f"what answers at {place} shows another certificate (sha256:{found}) than the join string names "
            f"(sha256:{pin}). If the manager was set up anew, use the join string that it prints now; if not, "
            "somebody else answers there. Nothing was sent to it."
        )
    ends_at = x509.load_der_x509_certificate(certificate).not_valid_after_utc
    if ends_at <= datetime.datetime.now(datetime.UTC):
        raise ManagerNotTrusted(
            f"the certificate of the manager at {place} expired on {ends_at:%Y-%m-%d}; delete tls.pem in its state "
            "directory, start it again, and use the join string that it prints then"
        )


def stays_here(connection: socket.socket) -> bool:
    """Whether a connection leads to this same machine."""
    here, there = str(connection.getsockname()[0]), str(connection.getpeername()[0])
    return here == there or is_loopback(there)
