"""Rows for blobs, creators; quotas, bindings, rate limits, idempotency keys and the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add tables and columns, and a row for the blob of every version."""
    op.create_table(
        "audit_log",
        sa.Column("id", _ID, nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=512), nullable=False),
        sa.Column("actor_tenant", sa.String(length=64)),
        sa.Column("actor_key", sa.String(length=16)),
        sa.Column("request_id", sa.String(length=64)),
        sa.Column("detail_json", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_tenant_id", "audit_log", ["tenant", "id"])

    op.create_table(
        "blobs",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("unreferenced_at", sa.DateTime()),
        sa.Column("corrupt_at", sa.DateTime()),
        sa.PrimaryKeyConstraint("tenant", "digest", name=op.f("pk_blobs")),
    )
    op.create_index("ix_blobs_unreferenced_at", "blobs", ["unreferenced_at"])

    op.create_table(
        "bindings",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("user_id", sa.String(length=256), nullable=False),
        sa.Column("reference", sa.String(length=257), nullable=False),
        sa.Column("updated_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenants.name"], name=op.f("fk_bindings_tenant_tenants")
        ),
        sa.PrimaryKeyConstraint("tenant", "user_id", name=op.f("pk_bindings")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body_json", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenants.name"], name=op.f("fk_idempotency_keys_tenant_tenants")
        ),
        sa.PrimaryKeyConstraint("tenant", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])

    op.create_table(
        "rate_limits",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("requests", sa.Double(), nullable=False),
        sa.Column("tokens", sa.Double(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenants.name"], name=op.f("fk_rate_limits_tenant_tenants")
        ),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_rate_limits")),
    )
    op.create_table(
        "request_leases",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenants.name"], name=op.f("fk_request_leases_tenant_tenants")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_request_leases")),
    )
    op.create_index("ix_request_leases_holder", "request_leases", ["holder"])
    op.create_index(
        "ix_request_leases_tenant_expires_at", "request_leases", ["tenant", "expires_at"]
    )

    op.add_column("api_keys", sa.Column("replaced_by", sa.String(length=16)))

    op.add_column("tenants", sa.Column("default_prefix", sa.String(length=257)))
    op.add_column("tenants", sa.Column("max_prefixes", sa.BigInteger()))
    op.add_column("tenants", sa.Column("max_bytes", sa.BigInteger()))
    op.add_column("tenants", sa.Column("max_virtual_tokens", sa.BigInteger()))
    op.add_column("tenants", sa.Column("max_resident_tokens", sa.BigInteger()))
    op.add_column("tenants", sa.Column("requests_per_minute", sa.BigInteger()))
    op.add_column("tenants", sa.Column("tokens_per_minute", sa.BigInteger()))
    op.add_column("tenants", sa.Column("max_concurrent_requests", sa.BigInteger()))

    op.add_column("versions", sa.Column("creator", sa.String(length=64)))
    op.execute(
        "INSERT INTO blobs (tenant, digest, size_bytes) "
        "SELECT tenant, digest, max(size_bytes) FROM versions GROUP BY tenant, digest"
    )
