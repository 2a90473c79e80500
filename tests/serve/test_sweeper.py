"""The background collection of a server: deleted prefixes and expired rows."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prefixd.server.serve.catalog import open_catalog
from prefixd.server.serve.settings import Settings
from prefixd.server.serve.sweeper import make_sweeper
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Replay
from prefixd.server.tenants.principal import COMMAND_LINE
from prefixd.store.db.database import utc_now, writing
from prefixd.store.files import UPLOAD_PREFIX, file_in_progress


def test_a_sweep_removes_expired_rows(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, audit_days=0.5)
    catalog = open_catalog(settings)
    catalog.tenants.create_tenant("acme")  # an entry of the audit log, and young
    catalog.idempotency._now = lambda: utc_now() - timedelta(days=2)
    with writing(catalog.database) as connection:
        actor: dict[str, Any] = {"actor": COMMAND_LINE, "tenant": "acme", "subject": ""}
        record(connection, Action.PIN_SET, at=utc_now() - timedelta(days=1), **actor)
        replay = Replay(201, {})
        catalog.idempotency.keep(connection, "acme", "k", request_digest="d", replay=replay)
    engine: Any = SimpleNamespace(held_prefixes=tuple)
    make_sweeper(settings, catalog, engine)._sweep()
    entries, _ = catalog.audit.page(tenant="acme", limit=9)
    assert [entry.action for entry in entries] == [Action.TENANT_CREATE]
    with catalog.database.connect() as connection:
        rows = connection.exec_driver_sql("SELECT count(*) FROM idempotency_keys")
        assert rows.scalar() == 0
    catalog.database.dispose()


def test_interrupted_uploads_of_all_folders_are_removed(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    catalog = open_catalog(settings)
    folders = [tmp_path / "uploads", tmp_path / "blobs" / ".tmp"]
    engine: Any = None
    sweeper = make_sweeper(settings, catalog, engine)
    sweeper._tidy()  # also without the folders
    for folder in folders:
        folder.mkdir(parents=True)
    left = [folder / "upload-1" for folder in folders]
    for path in left:
        path.write_bytes(b"half")
    with file_in_progress(folders[0], prefix=UPLOAD_PREFIX) as (running, _):
        sweeper._tidy()
        assert running.exists()
    assert not any(path.exists() for path in left)
    catalog.database.dispose()
