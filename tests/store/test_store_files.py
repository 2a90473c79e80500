"""Files of tenants in the store: collected, copied and checked as the blobs of prefixes are."""

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert

from prefixd.server.tenants import tables
from prefixd.server.tenants.batch_state import BatchStatus
from prefixd.server.tenants.integrity import BindingIntegrity
from prefixd.server.tenants.registry import Tenants
from prefixd.store.backup import back_up, restore
from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.catalog.blob_rows import BlobCollected
from prefixd.store.copying import Place
from prefixd.store.db.database import open_database, utc_now, writing
from prefixd.store.errors import UnknownFile
from prefixd.store.file_store import FileRecord, Purpose, WrittenBlob
from prefixd.store.integrity import Problem, StoreIntegrity
from prefixd.store.names import BlobKey
from prefixd.store.store import PrefixStore
from tests.store.store_home import Home

NOW = timedelta(seconds=-60)
"""A grace that has always passed."""

TEXT = b"a line\n" * 1000


def written(home: Home, tenant: str = "acme") -> WrittenBlob:
    source = home.path / "source"
    source.write_bytes(TEXT)
    return home.store.files.write(source, tenant=tenant)


def added(home: Home, blob: WrittenBlob) -> FileRecord:
    with home.store.files.change() as connection:
        return home.store.files.add(
            connection, blob, purpose=Purpose.BATCH, filename="x", kept=None, creator="key"
        )


def test_the_blob_of_a_file_is_collected_when_the_last_file_is_deleted(home: Home) -> None:
    files = home.store.files
    first, second = added(home, written(home)), added(home, written(home))
    assert (first.digest, first.size_bytes) == (second.digest, len(TEXT))
    added(home, written(home, "umbrella"))
    assert home.store.collect(grace=NOW).blobs == 0
    for record, left in ((first, 2), (second, 1)):
        with files.change() as connection:
            files.delete(connection, record.id, tenant="acme")
        home.store.collect(grace=NOW)
        assert len(home.held()) == left
    with pytest.raises(UnknownFile), files.change() as connection:
        files.delete(connection, first.id, tenant="acme")


def test_a_blob_that_was_collected_meanwhile_is_not_made_a_file(home: Home) -> None:
    blob = written(home)
    home.store.collect(grace=NOW)
    with pytest.raises(BlobCollected):
        added(home, blob)
    assert home.store.files.page(tenant="acme", limit=9) == []


def test_a_backup_has_the_bytes_of_files(home: Home, tmp_path: Path) -> None:
    record = added(home, written(home))
    folder = tmp_path / "backup"
    assert back_up(Place(home.database, home.blobs), folder).blobs == 1
    database = open_database(f"sqlite:///{tmp_path}/restored.sqlite3")
    blobs = LocalBlobs(tmp_path / "blobs")
    restore(folder, Place(database, blobs), scratch=tmp_path)
    store = PrefixStore(database, blobs)
    assert store.files.get(record.id, tenant="acme") == record
    assert store.fetch(tenant="acme", digest=record.digest).read_bytes() == TEXT
    database.dispose()


def test_the_check_names_files_whose_bytes_are_gone_or_changed(home: Home) -> None:
    record = added(home, written(home))
    checked = StoreIntegrity(home.database, home.blobs, upload_dir=home.path / "uploads")
    assert list(checked.findings()) == []
    assert checked.counts["files"] == 1
    home.damage(BlobKey("acme", record.digest).place, b"other")
    (finding,) = checked.findings()
    assert (finding.problem, finding.subject) == (Problem.BLOB_CORRUPT, record.id)
    home.blobs.delete(tenant="acme", digest=record.digest)
    (finding,) = checked.findings()
    assert (finding.problem, finding.subject) == (Problem.BLOB_MISSING, record.id)


@pytest.mark.parametrize("status", [BatchStatus.IN_PROGRESS, BatchStatus.COMPLETED])
def test_the_check_names_open_batches_without_their_input(home: Home, status: BatchStatus) -> None:
    Tenants(home.database).create_tenant("acme")
    with writing(home.database) as connection:
        connection.execute(
            insert(tables.batches).values(
                id="batch_x",
                tenant="acme",
                key_id="key",
                endpoint="/v1/completions",
                input_file_id="file-gone",
                completion_window="24h",
                metadata_json="{}",
                errors_json="[]",
                status=status.value,
                total=0,
                completed=0,
                failed=0,
                created_at=utc_now(),
                expires_at=utc_now(),
            )
        )
    findings = [str(finding) for finding in BindingIntegrity(home.database).findings()]
    missing = "target_missing: tenant acme, the batch batch_x: its input file-gone does not exist"
    assert findings == ([missing] if status is BatchStatus.IN_PROGRESS else [])
