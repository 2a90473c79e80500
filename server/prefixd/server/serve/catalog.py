"""The configured catalog: the store and the tenants' tables over one database.

Imports neither torch nor FastAPI, so the command line opens it without a server.
"""

from dataclasses import dataclass

from sqlalchemy import Engine as Database

from prefixd.server.serve.settings import Settings
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.registry import Tenants
from prefixd.store.blobs.blobs import open_blobs
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from prefixd.store.store import PrefixStore


@dataclass(frozen=True, slots=True)
class CatalogParts:
    """Everything durable. ``database`` is what the others share, to be disposed of at the end."""

    database: Database
    store: PrefixStore
    tenants: Tenants
    bindings: Bindings
    limiter: Limiter
    audit: AuditLog
    idempotency: Idempotency


def open_catalog(settings: Settings) -> CatalogParts:
    """Open the catalog and the blobs; create the tables and folders that are missing."""
    database = open_database(settings.catalog_url)
    upgrade(database)
    return CatalogParts(
        database=database,
        store=PrefixStore(database, open_blobs(settings.blobs_url, settings.root)),
        tenants=Tenants(database),
        bindings=Bindings(database),
        limiter=Limiter(database),
        audit=AuditLog(database),
        idempotency=Idempotency(database),
    )
