"""Addresses of servers, host:port, as federation.toml and client.toml have them."""

import ipaddress
import re
from typing import Final

from fedalt.core.foreign import shown

_HOST: Final = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9_-]+)*\.?"
)
_PORT: Final = re.compile("[0-9]{1,5}")
_LONGEST: Final = 300  # characters of an address that is shown


def require_address(address: str) -> None:
    """Raise ValueError for what is no host:port, or an address of IPv6 without its brackets."""
    host, _, port = address.rpartition(":")
    in_brackets = re.fullmatch(r"\[(.*)\]", host)
    plain = _version_of(in_brackets[1]) == 6 if in_brackets else _HOST.fullmatch(host)
    if not (plain and _PORT.fullmatch(port) and 0 < int(port) < 65536):
        raise ValueError(
            f"{shown(repr(address), _LONGEST)}: expected host:port, such as 10.0.0.5:8443 or "
            "[fd00::5]:8443"
        )


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of an address that is one, without brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def listens_only(address: str) -> bool:
    """Whether host:port is all addresses of a machine: one listens there, and calls nobody."""
    host, _ = host_and_port(address)
    return _version_of(host) is not None and ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether a host is the machine itself."""
    if _version_of(host) is None:
        return host.lower() == "localhost"
    return ipaddress.ip_address(host).is_loopback


def _version_of(host: str) -> int | None:
    """4 or 6 where a host is an address, None where it is a name."""
    try:
        return ipaddress.ip_address(host).version
    except ValueError:
        return None
