"""The open connections, counted by address, and which of them may be closed for another."""

import ipaddress
from typing import Protocol

from prefixd.server.api.metrics import ConnectionLimit, Metrics
from prefixd.server.serve.connection_limits import ConnectionLimits
from prefixd.server.serve.logging import LimitedWarning

_IPV6_SITE_BITS = 64
"""One site has a whole /64 and may connect from any address in it."""


class Idle(Protocol):
    """A connection that can be closed while it waits for a request."""

    def evict(self) -> None:
        """Close it at once."""
        ...


class Connections:
    """The open connections of a server, by address, and those of them without a request.

    At the total limit the connection that has been idle for the longest is closed for a new one:
    idle connections from many addresses keep no client out. An address over its limit is refused.
    """

    def __init__(self, limits: ConnectionLimits, metrics: Metrics) -> None:
        self.limits = limits
        self._metrics = metrics
        self._open = 0
        self._by_source: dict[str, int] = {}
        self._idle: dict[Idle, None] = {}
        self._warning = LimitedWarning("refused connections over a limit")

    def __repr__(self) -> str:
        return f"Connections(open={self._open}, idle={len(self._idle)})"

    def admit(self, address: str) -> ConnectionLimit | None:
        """Count a connection from ``address``; or the limit that it exceeds."""
        source = self._source(address)
        if source is not None and self._by_source.get(source, 0) >= self.limits.per_address:
            return self._refuse(ConnectionLimit.ADDRESS, address)
        if self._open >= self.limits.total and not self._evict():
            return self._refuse(ConnectionLimit.TOTAL, address)
        self._open += 1
        self._metrics.connections.set(self._open)
        if source is not None:
            self._by_source[source] = self._by_source.get(source, 0) + 1
        return None

    def release(self, address: str) -> None:
        """Discount an admitted connection, which has ended."""
        self._open -= 1
        self._metrics.connections.set(self._open)
        source = self._source(address)
        if source is not None:
            self._by_source[source] -= 1
            if not self._by_source[source]:
                del self._by_source[source]

    def waits(self, connection: Idle) -> None:
        """The connection waits for a request, from now on."""
        self._idle[connection] = None

    def works(self, connection: Idle) -> None:
        """The connection has a request, or has ended."""
        self._idle.pop(connection, None)

    def _evict(self) -> bool:
        connection = next(iter(self._idle), None)
        if connection is None:
            return False
        del self._idle[connection]
        self._metrics.evicted_connections.inc()
        connection.evict()
        return True

    def _refuse(self, limit: ConnectionLimit, address: str) -> ConnectionLimit:
        self._metrics.refused_connections.labels(limit).inc()
        self._warning.log(limit=limit.value, client=address)
        return limit

    def _source(self, address: str) -> str | None:
        """What is counted as one address; None where the limit does not apply."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return address
        if isinstance(ip, ipaddress.IPv6Address):
            # An IPv4 client of a socket for both.
            ip = ip.ipv4_mapped or ip
        if any(ip in network for network in self.limits.trusted):
            return None
        if isinstance(ip, ipaddress.IPv6Address):
            return str(ipaddress.ip_network((int(ip), _IPV6_SITE_BITS), strict=False))
        return str(ip)
