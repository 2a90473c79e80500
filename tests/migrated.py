"""SQLite catalogs with the tables of this version: each kind is made once in a run and copied."""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine

from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade

T = TypeVar("T")


def migrated(path: Path) -> str:
    """The URL of the catalog ``path``, which is made unless it is there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(_empty())
    return f"sqlite:///{path}"


@cache
def _empty() -> bytes:
    contents, _ = made(lambda _: None)
    return contents


def made(fill: Callable[[Engine], T]) -> tuple[bytes, T]:
    """A catalog as a file, after ``fill``, and what that returned."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "catalog.sqlite3")
        engine = open_database(f"sqlite:///{path}")
        upgrade(engine)
        result = fill(engine)
        engine.dispose()
        assert [each.name for each in path.parent.iterdir()] == [path.name], "a log remains"
        return path.read_bytes(), result
