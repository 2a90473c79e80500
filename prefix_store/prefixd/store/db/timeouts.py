"""How long calls on the database may take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for a connection to open, for a statement, for another writer's lock, and for
    a free connection of the pool, which has ``max_connections``. The defaults are for the command
    line, whose copies and migrations may take long."""

    connect_s: float = 10.0
    statement_s: float = 600.0
    lock_s: float = 30.0
    pool_s: float = 30.0
    max_connections: int = 15
