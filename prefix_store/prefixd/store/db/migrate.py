"""Migrations: create the tables of this version, or change those of any earlier version."""

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from prefixd.store.db.database import metadata, writing
from prefixd.store.errors import SchemaRefused

FIRST = "0001"
"""The tables of the first release, which created them without recording a revision."""

HEAD = "0014"
"""The tables of this version."""

_LOCK = 0x70726566697864  # an arbitrary number, the same in all processes: "prefixd"


def upgrade(engine: Engine) -> None:
    """Create the tables of this version or migrate to them, in one transaction.

    Safe when several processes start at once. Raises SchemaRefused when a later version of prefixd
    changed the database: that version may read differently what this one writes.
    """
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        current = _revision(connection)
        if current == HEAD:
            return
        config = configured(connection)
        if current is None and inspect(connection).has_table("prefixes"):
            command.stamp(config, FIRST)
        elif current is not None:
            _check_known(config, current)
        command.upgrade(config, "head")


def revision(engine: Engine) -> str | None:
    """The revision recorded in a database; None when there is none."""
    with engine.connect() as connection:
        return _revision(connection)


def configured(connection: Connection) -> Config:
    """alembic's configuration on an open connection; no file is read."""
    config = Config()
    config.set_main_option("script_location", "prefixd.store.db:migrations")
    config.attributes["connection"] = connection
    config.attributes["metadata"] = metadata
    return config


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    recorded = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if recorded is None else str(recorded)


def _check_known(config: Config, current: str) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current not in known:
        raise SchemaRefused(
            f"the database is at revision {current}, and this version of prefixd knows those up to "
            f"{HEAD}: run the version that changed it, or a later one"
        )
