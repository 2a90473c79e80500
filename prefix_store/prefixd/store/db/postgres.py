"""Connections to PostgreSQL whose calls end, also when the server hangs.

``statement_timeout`` is kept by the server, so a server that is paused, or cut off, keeps no
timeout. A connection here also counts on this side: after the time it is closed, and the call fails
as on any lost connection, so that the pool replaces it.
"""

import math
import time
from collections.abc import Generator
from typing import Any, TypeVar

import psycopg
from sqlalchemy import Engine, event
from sqlalchemy.engine import URL, create_engine
from sqlalchemy.exc import DisconnectionError

from prefixd.store.db.timeouts import Timeouts

Result = TypeVar("Result")

_SERVER_FIRST_S = 0.5
"""A server that responds has this much time to report its own timeout."""

_PING_S = 1.0
"""How long an idle connection may take to respond before it is replaced."""


def open_postgres(url: URL, timeouts: Timeouts) -> Engine:
    """An engine on ``url``, a database of PostgreSQL."""
    # Not SQLAlchemy's default driver, but the one that is tested.
    engine = create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_timeout=timeouts.pool_s,
        pool_size=timeouts.max_connections,
        max_overflow=0,
        hide_parameters=True,
        connect_args=_connect_args(timeouts),
    )
    bound_s = max(timeouts.statement_s, timeouts.lock_s) + _SERVER_FIRST_S

    class Connection(BoundedConnection):
        limit_s = bound_s

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, cargs: Any, cparams: Any) -> psycopg.Connection[Any]:
        connection: psycopg.Connection[Any] = Connection.connect(*cargs, **cparams)
        return connection

    @event.listens_for(engine, "checkout")
    def check(connection: BoundedConnection, _record: Any, _proxy: Any) -> None:
        # Not the pool's own ping, which may take as long as a statement.
        if not connection.responds():
            raise DisconnectionError

    @event.listens_for(engine, "connect")
    def prepare(connection: psycopg.Connection[Any], _record: Any) -> None:
        # Not as options of the connection: PgBouncer refuses those.
        connection.execute(
            "SELECT set_config('statement_timeout', %s, false), "
            "set_config('lock_timeout', %s, false)",
            [str(math.ceil(seconds * 1000)) for seconds in (timeouts.statement_s, timeouts.lock_s)],
        )
        connection.commit()

    return engine


def _connect_args(timeouts: Timeouts) -> dict[str, Any]:
    return {
        "connect_timeout": math.ceil(timeouts.connect_s),
        # A peer that is gone, with its network: the kernel gives up.
        "tcp_user_timeout": math.ceil(timeouts.statement_s * 1000),
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed when one call on it takes longer than ``limit_s`` seconds."""

    limit_s: float

    def responds(self) -> bool:
        """Whether the server responds now, on this connection, which is idle."""
        limit_s, self.limit_s = self.limit_s, _PING_S
        try:
            self.autocommit = True
            self.execute("")
            self.autocommit = False
        except psycopg.Error:
            return False
        finally:
            self.limit_s = limit_s
        return True

    def wait(self, gen: Generator[Any, Any, Result], *arguments: Any, **options: Any) -> Result:
        """Run ``gen`` to its end. Raises psycopg.OperationalError after the limit."""
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Generator[Any, Any, Result]) -> Generator[Any, Any, Result]:
        """psycopg resumes ``gen`` when the socket is ready, and also every 0.1 s."""
        deadline = time.monotonic() + self.limit_s
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self.close()  # its state is unknown: it must not be used again
                    raise psycopg.OperationalError(
                        f"the server did not respond within {self.limit_s:g} s"
                    )
                wanted = gen.send(ready)
        except StopIteration as stop:
            result: Result = stop.value
            return result
