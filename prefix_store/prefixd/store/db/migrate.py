"""Bringing a database to the tables of this version, from whichever earlier one made it."""

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from prefixd.store.db.database import metadata, writing
from prefixd.store.errors import SchemaRefused

FIRST = "0001"
"""The tables of the first release, which made them without noting a revision."""

HEAD = "0004"
"""The tables of this version."""

_LOCK = 0x70726566697864  # any number, but the same for all: "prefixd"


def upgrade(engine: Engine) -> None:
    """Make or change the tables to be those of this version, in one transaction.

    Safe when several processes start at once. Raises SchemaRefused when a later version of
    prefixd has been here: this one must not write what that one may read otherwise.
    """
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        found = _revision(connection)
        if found == HEAD:
            return
        config = configured(connection)
        if found is None and inspect(connection).has_table("prefixes"):
            command.stamp(config, FIRST)
        elif found is not None:
            _check_known(config, found)
        command.upgrade(config, "head")


def revision(engine: Engine) -> str | None:
    """Which revision a database is at; None where none is noted."""
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
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _check_known(config: Config, found: str) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found not in known:
        raise SchemaRefused(
            f"the database is at revision {found}, and this version of prefixd knows those up to "
            f"{HEAD}: run the version that changed it, or a later one"
        )
