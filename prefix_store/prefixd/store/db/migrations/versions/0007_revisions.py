"""Revisions of prefixes, versions, aliases, bindings and defaults: the basis of their ETags."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_TABLES = ("prefixes", "versions", "latest_versions", "aliases", "bindings")


def upgrade() -> None:
    """Add columns; existing rows start at revision 1."""
    for table in _TABLES:
        op.add_column(table, _counter("revision"))
    op.add_column("tenants", _counter("last_revision"))
    op.add_column("tenants", _counter("default_revision"))
    op.add_column("idempotency_keys", sa.Column("etag", sa.String(length=64)))


def _counter(name: str) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger(), nullable=False, server_default=sa.text("1"))
