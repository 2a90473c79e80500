"""How many connections there may be: what the settings and the limit of descriptors say."""

import ipaddress
import resource
from dataclasses import dataclass
from typing import Self

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED_BITS = 96
"""Of an IPv4 address in an IPv6 one, before the address."""

_NO_LIMIT = 1 << 20
"""Descriptors that are assumed where their number has no limit."""


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors as far as this process may; the limit that then holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError):
        pass  # some kernels refuse what they call the hard limit
    return _NO_LIMIT if soft == resource.RLIM_INFINITY else soft


def parse_networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks, separated by commas. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    try:
        return tuple(_network(part) for part in parts if part)
    except ValueError as error:
        raise ValueError(
            f"expected addresses or networks like 10.0.0.0/8, separated by commas; received "
            f"{text[:80]!a}"
        ) from error


def _network(text: str) -> Network:
    network = ipaddress.ip_network(text, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < _MAPPED_BITS:
        return network
    # An IPv4 client of a socket for both is compared as such.
    return ipaddress.ip_network((int(mapped), network.prefixlen - _MAPPED_BITS))


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Most connections in all, and from one address that is not in ``trusted``."""

    total: int
    per_address: int
    trusted: tuple[Network, ...] = ()

    @classmethod
    def of(
        cls, *, descriptors: int, total: int | None, per_address: int | None, trusted: str
    ) -> Self:
        """The limits for a process with ``descriptors``; None is the default: three quarters of
        them, and half of that from one address."""
        total = total or max(1, descriptors * 3 // 4)
        return cls(total, per_address or max(1, total // 2), parse_networks(trusted))
