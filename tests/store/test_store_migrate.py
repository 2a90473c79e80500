"""Migrations: one step after another makes the tables, from every version there was."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, select, text

from prefixd.server.tenants import tables
from prefixd.store.catalog.blob_rows import BlobRows, claim
from prefixd.store.catalog.tables import latest_versions
from prefixd.store.db.database import metadata, open_database, writing
from prefixd.store.db.migrate import FIRST, HEAD, configured, revision, upgrade
from prefixd.store.errors import SchemaRefused
from prefixd.store.names import BlobKey
from prefixd.store.store import PrefixStore
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home

# Every module that adds tables must be imported for the comparison.
assert tables.tenants.metadata is metadata


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty database."""
    url = f"sqlite:///{tmp_path}/empty.sqlite"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    engine = open_database(url)
    yield engine
    engine.dispose()


def test_the_migrations_create_exactly_the_declared_tables(database: Engine) -> None:
    upgrade(database)
    with database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    assert revision(database) == HEAD
    upgrade(database)


def test_the_migrations_are_linear(database: Engine) -> None:
    with database.connect() as connection:
        scripts = ScriptDirectory.from_config(configured(connection))
    assert scripts.get_heads() == [HEAD]
    assert scripts.get_bases() == [FIRST]


def test_postgres_lists_names_in_byte_order(postgres_url: str) -> None:
    engine = open_database(postgres_url)
    upgrade(engine)
    with engine.connect() as connection:
        found = inspect(connection).get_columns("prefixes")
    engine.dispose()
    types: list[Any] = [column["type"] for column in found if column["name"] == "name"]
    assert [kind.collation for kind in types] == ["C"]


def test_a_catalog_of_the_first_release_is_migrated(database: Engine, tmp_path: Path) -> None:
    with writing(database) as connection:
        command.upgrade(configured(connection), FIRST)
        connection.execute(text("DROP TABLE alembic_version"))  # which it did not have
        for statement in (
            "INSERT INTO tenants VALUES ('acme', '2026-01-01 00:00:00')",
            "INSERT INTO prefixes VALUES (1, 'acme', 'style', 3, 2)",
            *(
                f"INSERT INTO versions VALUES (1, {version}, 'acme', '{'a' * 64}', '{base}',"
                f" 'hard_prompt', NULL, 9, NULL, 113, NULL, '{free}', '2026-01-01')"
                for version, base, free in (
                    (1, "one", '{"labels":[]}'),
                    (2, "two", '{"labels":{"stage":2}}'),
                )
            ),
            "INSERT INTO aliases VALUES (1, 'prod', 1)",
        ):
            connection.exec_driver_sql(statement)
    upgrade(database)
    store = PrefixStore(database, None)  # type: ignore[arg-type]  # no blob is touched
    one, two = (replace(BASE, fingerprint=fingerprint) for fingerprint in ("one", "two"))
    manifest = store.resolve(tenant="acme", reference="style@prod", base=two)
    assert (manifest.version, manifest.metadata, manifest.labels) == (1, {"labels": []}, {})
    assert (manifest.creator, manifest.corrupt, manifest.base) == (None, False, "one")
    manifest = store.resolve(tenant="acme", reference="style", base=two)
    assert (manifest.version, manifest.metadata, manifest.labels) == (
        2,
        {"labels": {"stage": 2}},
        {},
    )
    assert store.resolve(tenant="acme", reference="style", base=one).version == 1
    with database.connect() as connection:
        rows = connection.execute(text("SELECT tenant, size_bytes, unreferenced_at FROM blobs"))
        assert rows.all() == [("acme", 113, None)]


def test_latest_stays_for_its_base_and_is_the_highest_version_of_the_others(
    database: Engine,
) -> None:
    with writing(database) as connection:
        command.upgrade(configured(connection), "0004")
        for statement in (
            "INSERT INTO prefixes VALUES (1, 'acme', 'style', 6, 2)",
            "INSERT INTO prefixes VALUES (2, 'acme', 'deleted', 2, NULL)",
            *(
                "INSERT INTO versions (prefix_id, version, tenant, digest, fingerprint, kind,"
                " num_virtual_tokens, size_bytes, metadata_json, created_at)"
                f" VALUES (1, {version}, 'acme', '{str(version) * 64}', '{base}', 'hard_prompt',"
                " 9, 113, '{}', '2026-01-01')"
                for version, base in enumerate(
                    ["a" * 64, "a" * 64, "a" * 64, "b" * 64, "b" * 64], 1
                )
            ),
        ):
            connection.exec_driver_sql(statement)
    upgrade(database)
    with database.connect() as connection:
        rows = connection.execute(select(latest_versions).order_by(latest_versions.c.version))
        assert rows.all() == [(1, "a" * 64, 2, 1), (1, "b" * 64, 5, 1)]
    listed = PrefixStore(database, None).list(tenant="acme")  # type: ignore[arg-type]
    assert [(one.version, one.base, one.aliases) for one in listed.manifests] == [
        (5, "b" * 12, ("latest",)),
        (2, "a" * 12, ("latest",)),
    ]


def test_existing_tenants_get_weight_one_and_kv_reuse(database: Engine) -> None:
    with writing(database) as connection:
        command.upgrade(configured(connection), "0002")
        connection.execute(
            text("INSERT INTO tenants (name, created_at) VALUES ('acme', '2026-01-01')")
        )
    upgrade(database)
    with database.connect() as connection:
        found = connection.execute(select(tables.tenants)).one()
    assert (found.name, found.weight, found.kv_reuse) == ("acme", 1.0, True)


def test_existing_blobs_are_referenced_and_collected_like_new_ones(database: Engine) -> None:
    wanted, idle = (BlobKey("acme", digit * 64) for digit in "ab")
    with writing(database) as connection:
        command.upgrade(configured(connection), "0003")
        for key in (wanted, idle):
            statement = (
                f"INSERT INTO blobs VALUES ('acme', '{key.digest}', 113, '2026-01-01', NULL)"
            )
            connection.exec_driver_sql(statement)
    upgrade(database)
    rows, now = BlobRows(database), datetime(2026, 1, 2, tzinfo=UTC)
    ticket = rows.want(wanted, size_bytes=113, now=now)
    with writing(database) as connection:
        claim(connection, wanted, ticket=ticket)
    assert list(rows.unreferenced(before=now)) == [(idle, 113)]
    assert rows.collect(idle, before=now, remove=lambda: None)


def test_a_database_of_a_later_version_is_rejected(database: Engine) -> None:
    upgrade(database)
    with writing(database) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaRefused, match=f"revision 9999.*up to {HEAD}"):
        upgrade(database)


def test_processes_that_start_together_migrate_once(database: Engine) -> None:
    barrier = threading.Barrier(8)

    def start(_: int) -> None:
        barrier.wait()
        upgrade(database)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(8)))
    assert revision(database) == HEAD


def test_unreferenced_blobs_of_the_first_release_are_adopted(home: Home) -> None:
    home.put()
    changes.delete(home.store, tenant="acme", name="style")
    with writing(home.database) as connection:
        connection.execute(text("DELETE FROM blobs"))
    assert home.store.collect(adopt=True).adopted == 1
    assert len(home.held()) == 1
    home.clock.ahead += timedelta(days=2)
    assert home.store.collect().blobs == 1
    assert home.held() == set()
