"""The clock that all replicas share: the database's on PostgreSQL, the host's on SQLite."""

import time
from collections.abc import Callable

from sqlalchemy import ColumnElement, Double, Engine, func, literal, select
from sqlalchemy import cast as sql_cast


def shared_now(engine: Engine, clock: Callable[[], float] | None = None) -> ColumnElement[float]:
    """The seconds since 1970, read within the statement on PostgreSQL; ``clock`` replaces both."""
    if clock is None and engine.dialect.name == "postgresql":
        # One reading for each statement, in whose places it then is.
        epoch = sql_cast(func.extract("epoch", func.clock_timestamp()), Double)
        now = select(epoch.label("now")).cte("clock")
        return select(now.c.now).scalar_subquery()
    return literal((clock or time.time)(), Double)
