"""A SQLite catalog with the tables of this version, which is migrated once in a run and copied."""

import tempfile
from functools import cache
from pathlib import Path

from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade


def migrated(path: Path) -> str:
    """The URL of the catalog ``path``, which is made unless it is there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_contents())
    return f"sqlite:///{path}"


@cache
def _contents() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "catalog.sqlite3")
        engine = open_database(f"sqlite:///{path}")
        upgrade(engine)
        engine.dispose()
        assert [each.name for each in path.parent.iterdir()] == [path.name], "a log remains"
        return path.read_bytes()
