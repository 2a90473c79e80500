"""Backup, restore and move, as docs/operations.md describes them."""

import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select
from typer.testing import CliRunner

from prefixd.server.cli.main import app
from prefixd.server.tenants import tables
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.registry import Tenants
from prefixd.store.artifact.artifact import read_artifact
from prefixd.store.blobs.blobs import open_blobs
from prefixd.store.db.database import metadata, open_database, reading, writing
from prefixd.store.db.migrate import upgrade
from prefixd.store.errors import CorruptArtifact
from prefixd.store.names import BlobKey
from prefixd.store.store import Manifest, PrefixStore
from tests.real_services import S3_TIMEOUT_S, Postgres
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE


class Opened:
    """A store with tenants on it."""

    def __init__(self, database_url: str, blobs_url: str | None, root: Path) -> None:
        self.engine = open_database(database_url)
        upgrade(self.engine)
        self.blobs = open_blobs(blobs_url, root, timeout_s=S3_TIMEOUT_S)
        self.store = PrefixStore(self.engine, self.blobs)
        self.tenants = Tenants(self.engine)

    def publish(self, name: str, text: str) -> BlobKey:
        published = changes.publish_text(
            self.store,
            tenant="acme",
            name=name,
            text=text,
            metadata=None,
            base=BASE,
            count_tokens=len,
        )
        return BlobKey("acme", published.manifest.digest)

    def rows(self) -> dict[str, list[Any]]:
        """Every row of every table."""
        with reading(self.engine) as connection:
            return {
                table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
                for table in metadata.sorted_tables
            }

    def texts(self) -> dict[str, str | None]:
        """Every name's text, its blob verified."""
        return {manifest.name: self._text(manifest) for manifest in self._latest()}

    def _latest(self) -> Iterator[Manifest]:
        after = None
        while True:
            page = self.store.list(tenant="acme", limit=5, after=after)
            yield from page.manifests
            if (after := page.next_after) is None:
                return

    def _text(self, manifest: Manifest) -> str | None:
        path = self.store.fetch(tenant="acme", digest=manifest.digest)
        return read_artifact(path, base=BASE, count_tokens=len).text


@contextmanager
def opened(database_url: str, blobs_url: str | None, root: Path) -> Iterator[Opened]:
    found = Opened(database_url, blobs_url, root)
    yield found
    found.engine.dispose()


def sqlite_url(folder: Path) -> str:
    return f"sqlite:///{folder}/catalog.sqlite3"


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Opened]:
    """SQLite and files in ``home``, with something in most tables, and a deleted prefix."""
    home = tmp_path / "home"
    with opened(sqlite_url(home), None, home) as source:
        source.tenants.create_tenant("acme")
        source.tenants.create_key(tenant="acme")
        Bindings(source.engine).bind_many("acme", [("alice", "style@prod"), ("bob", "style")])
        source.publish("style", "one")
        source.publish("style", "two")
        source.publish("other", "three")
        source.publish("gone", "four")
        changes.set_alias(source.store, tenant="acme", name="style", alias="prod", version=1)
        changes.set_pin(source.store, tenant="acme", reference="style@prod", creator="k1")
        source.tenants.set_settings("acme", {"weight": 2.5, "kv_reuse": False})
        changes.delete(source.store, tenant="acme", name="gone")
        with writing(source.engine) as connection:
            connection.execute(
                insert(tables.rate_limits).values(tenant="acme", requests=1.5, tokens=-2.5, at=0.1)
            )
        yield source


def run(*words: str) -> Any:
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_copy_from_sqlite_and_files_to_postgres_and_s3_is_complete(
    full: Opened, postgres_url: str, s3_url: str, tmp_path: Path
) -> None:
    done = run(
        *("copy", "--data-dir", str(tmp_path / "home")),
        *("--to-database-url", postgres_url, "--to-blobs-url", s3_url),
    )
    before = full.rows()
    assert {name for name, rows in before.items() if rows} >= {
        *("tenants", "api_keys", "bindings", "audit_log", "prefixes", "versions", "aliases"),
        *("blobs", "rate_limits", "pins", "latest_versions"),
    }
    before["blobs"] = [
        row for row in before["blobs"] if row[3] is None
    ]  # no version has the others
    assert done["rows"] == {name: len(rows) for name, rows in before.items()} | {"blobs": 4}
    assert (done["blobs"], done["corrupt"]) == (3, [])
    with opened(postgres_url, s3_url, tmp_path / "replica") as moved:
        assert moved.rows() == before
        assert moved.texts() == {"style": "two", "other": "three"} == full.texts()
        assert moved.store.resolve(tenant="acme", reference="style@prod", base=BASE).version == 1
        assert moved.store.resolve(tenant="acme", reference="style@prod", base=BASE).pinned
        # Counters of the database continue; numbers are not reused.
        moved.publish("new", "five")
        moved.publish("gone", "four")
        assert moved.store.resolve(tenant="acme", reference="gone", base=BASE).version == 2
        moved.tenants.create_key(tenant="acme")


def test_a_copy_needs_an_empty_target(full: Opened, tmp_path: Path) -> None:
    words = ["copy", "--data-dir", f"{tmp_path}/home", "--to-data-dir", f"{tmp_path}/copy"]
    run(*words)
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1
    assert "expected an empty database to copy to" in again.stderr
    nowhere = CliRunner().invoke(app, words[:3])
    assert nowhere.exit_code == 1
    assert "--to-data-dir" in nowhere.stderr


def test_a_copy_lists_and_marks_corrupt_blobs(full: Opened, tmp_path: Path) -> None:
    found = full.store.resolve(tenant="acme", reference="other", base=BASE)
    full.store.fetch(tenant="acme", digest=found.digest).write_bytes(b"changed")
    done = run("copy", "--data-dir", f"{tmp_path}/home", "--to-data-dir", f"{tmp_path}/copy")
    assert done["corrupt"] == [{"tenant": "acme", "digest": found.digest}]
    with opened(sqlite_url(tmp_path / "copy"), None, tmp_path / "copy") as copy:
        assert copy.store.resolve(tenant="acme", reference="other", base=BASE).corrupt
        with pytest.raises(CorruptArtifact):
            copy.store.fetch(tenant="acme", digest=found.digest)
        copy.publish("other", "three")
        assert copy.texts() == {"style": "two", "other": "three"}


def test_a_backup_taken_while_the_server_runs_is_complete(full: Opened, tmp_path: Path) -> None:
    """The catalog is copied first: all blobs it names existed before."""
    home, backup = tmp_path / "home", tmp_path / "backup"
    backup.mkdir()
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection:
        connection.execute("VACUUM INTO ?", [str(backup / "catalog.sqlite3")])
    late = full.publish("late", "after the catalog")
    shutil.copytree(home / "blobs", backup / "blobs")
    with opened(sqlite_url(backup), None, backup) as restored:
        assert restored.texts() == {"style": "two", "other": "three"}
        # Blobs added in between are in no catalog; a collection adopts and later removes them.
        done = run("gc", "--data-dir", str(backup), "--grace", "0")
        assert done["adopted"] == 1
        run("gc", "--data-dir", str(backup), "--grace", "0")
        assert late not in {key for key, _ in restored.blobs.walk()}
        assert restored.texts() == {"style": "two", "other": "three"}


def test_a_backup_of_postgres_with_pg_dump_is_complete(
    full: Opened, postgres_server: Postgres, postgres_url: str, tmp_path: Path
) -> None:
    data = ["--data-dir", f"{tmp_path}/home"]
    run("copy", *data, "--to-data-dir", f"{tmp_path}/on-pg", "--to-database-url", postgres_url)
    tools = postgres_server.binaries
    dump = tmp_path / "catalog.dump"
    subprocess.run([tools / "pg_dump", "-Fc", "-f", dump, postgres_url], check=True)
    postgres_server.execute("CREATE DATABASE restored")
    restored_url = postgres_server.url + "restored"
    subprocess.run([tools / "pg_restore", "-d", restored_url, dump], check=True)
    with opened(restored_url, None, tmp_path / "on-pg") as restored:
        assert restored.texts() == full.texts()
    postgres_server.execute("DROP DATABASE restored WITH (FORCE)")


def test_migrate_prints_the_previous_revision(tmp_path: Path) -> None:
    first = run("migrate", "--data-dir", str(tmp_path))
    assert first["from"] is None
    assert run("migrate", "--data-dir", str(tmp_path)) == {"from": first["to"], "to": first["to"]}
