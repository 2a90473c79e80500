"""Quotas for users, aliases, keys, versions, idempotency keys and requests that are not metered."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_NAMES = (
    "max_versions",
    "max_aliases",
    "max_users",
    "max_keys",
    "max_idempotency_keys",
    "other_requests_per_minute",
)


def upgrade() -> None:
    """Add columns; tenants that exist keep no limit."""
    for name in _NAMES:
        op.add_column("tenants", sa.Column(name, sa.BigInteger()))
    op.create_index("ix_audit_log_at", "audit_log", ["at"])
