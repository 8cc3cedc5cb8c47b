"""Where a manager is, as one string: `HOST:PORT`, or `HOST:PORT#sha256:…` for one that speaks TLS."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from fedsweep.errors import UsageError
from fedsweep.files import read_word

ADDRESS_FILE = "manager.json"  # in the state directory of a manager that listens
DEFAULT_PORT = 5000
_PIN = re.compile(r"#sha256:([0-9a-fA-F]{64})")
SHOWN = 120  # characters of a wrong address that a message repeats


@dataclass(frozen=True)
class Address:
    """A manager's address, and by what it is known."""

    host: str
    port: int
    pin: str | None = None  # SHA-256 of its certificate, 64 hex digits; None: plain text

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}" + ("" if self.pin is None else f"#sha256:{self.pin}")

    @property
    def place(self) -> str:
        """Host and port alone, for messages."""
        return str(replace(self, pin=None))

    def for_others(self) -> Address:
        """As other machines may reach it: by this machine's name, where the manager listens on all its addresses."""
        return replace(self, host=socket.gethostname()) if self.host in ("", "0.0.0.0", "::") else self


DEFAULT = Address("127.0.0.1", DEFAULT_PORT)


def parse_address(text: str, option: str = "--manager") -> Address:
    """The address that a person wrote.

    Args:
        text: `HOST:PORT`, or a join string.
        option: how it was given, for messages. `--join` must have the fingerprint.

    Raises:
        UsageError: it is neither.
    """
    place, hash_sign, _ = text.partition("#")
    pin = _PIN.fullmatch(text, len(place))
    if hash_sign and pin is None:
        raise UsageError(
            f"{option} {shown(text)}: expected HOST:PORT#sha256: and 64 hex digits, as the manager printed"
        )
    if option == "--join" and pin is None:
        raise UsageError(f"{option} {shown(text)}: the fingerprint is missing; copy all of HOST:PORT#sha256:…")
    host, _, port = place.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(f"{option} {shown(text)}: expected HOST:PORT, as in 127.0.0.1:5000")
    return Address(host.removeprefix("[").removesuffix("]"), int(port), pin[1].lower() if pin else None)


def shown(text: str) -> str:
    """An argument for a message, printable and cut."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 1]}…"


def known_address(state_dir: Path) -> Address | None:
    """Where the manager of this state directory listens, as it left word; None where none does."""
    match {"pin": None, **read_word(state_dir / ADDRESS_FILE)}:
        case {"host": str(host), "port": int(port), "pin": str() | None as pin} if 0 < port < 65536:
            return Address(host, port, pin)
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address, which is given in numbers."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
