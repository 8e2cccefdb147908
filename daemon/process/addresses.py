"""Addresses to listen on: how they are written, and who can reach them."""

import ipaddress
import re
from typing import Final, NamedTuple

# All addresses of a family: to listen on, not to connect to.
WILDCARDS: Final = frozenset(("0.0.0.0", "::"))


class Address(NamedTuple):
    """Where to listen. Port 0: any free one. A link-local IPv6 host has its interface behind a
    percent sign (RFC 4007 11).
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def unscoped(self) -> "Address":
        """Without the interface, which is a name of this machine's alone."""
        return Address(self.host.partition("%")[0], self.port)


class UnixAddress(NamedTuple):
    """A Unix socket to listen on."""

    path: str

    def __str__(self) -> str:
        return self.path


Endpoint = Address | UnixAddress


def parse_address(text: str) -> Address:
    """``HOST:PORT``, with an IPv6 host in brackets. Raises ValueError with what would be right."""
    matched = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", text, re.ASCII)
    if (
        matched is None
        or int(matched[3]) > 65535
        or not (matched[1] is None or _is_ipv6(matched[1]))
    ):
        raise ValueError(
            f"{text!r} is not HOST:PORT; write 127.0.0.1:3260 or [::1]:3260, port 0 for any"
            " free one"
        )
    found = Address(matched[1] or matched[2], int(matched[3]))
    if is_link_local(found.host) and found.unscoped == found and ":" in found.host:
        raise ValueError(
            f"{text!r} is link-local, and so needs its interface; write"
            f" [{found.host}%eth0]:{found.port} with the right one"
        )
    return found


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def is_link_local(host: str) -> bool:
    """Only machines on the same link can reach it."""
    try:
        return ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Only this machine can reach it. Of names, only ``localhost`` (RFC 6761 6.3): what others
    stand for is the resolver's to say.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
