"""SQLite on a disk that was read-only for a while."""

from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import OperationalError

from prefixd.store.db.database import open_database, writing
from prefixd.store.faults import StorageFault, storage_fault


def test_a_connection_that_was_opened_read_only_is_replaced(tmp_path: Path) -> None:
    """The first write fails; the pool then opens another connection."""
    engine = open_database(f"sqlite:///{tmp_path / 'catalog.sqlite3'}")

    def write(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE IF NOT EXISTS written (number INTEGER)"))
        connection.execute(text("INSERT INTO written VALUES (1)"))

    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA query_only=ON")  # as of a file on a read-only disk
    with pytest.raises(OperationalError) as failed, writing(engine) as connection:
        write(connection)
    assert storage_fault(failed.value) is StorageFault.FAILED
    with writing(engine) as connection:
        write(connection)
    engine.dispose()
