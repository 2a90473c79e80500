"""Tables of tenants, keys, bindings, limits and audit, in the one database.

::

    tenants ──< api_keys            who may ask, and for what
       │   ├──< bindings            end user -> prefix reference
       │   ├──< idempotency_keys    answers that are given again for a day
       │   ├─── rate_limits         one row: what is left of the tenant's two buckets
       │   └──< request_leases      requests that run now, on any replica
    audit_log                       what was done; outlives what it speaks of
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    text,
    true,
)

from prefixd.store.db.database import UtcDateTime, metadata

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only

USER_CHARACTERS = 256
REFERENCE_CHARACTERS = 257  # name@alias

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    # The prefix of users without a binding.
    Column("default_prefix", String(REFERENCE_CHARACTERS)),
    # Quotas; null is no limit.
    Column("max_prefixes", BigInteger),
    Column("max_bytes", BigInteger),
    Column("max_virtual_tokens", BigInteger),
    Column("max_resident_tokens", BigInteger),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("max_concurrent_requests", BigInteger),
    # How the tenant is treated beside others: see TenantSettings.
    Column("weight", Double, nullable=False, server_default=text("1")),
    Column("kv_reuse", Boolean, nullable=False, server_default=true()),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(16), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False, index=True),
    Column("label", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    # Space-separated, in the order of the Scope enumeration.
    Column("scopes", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    # The key that a rotation made in place of this one.
    Column("replaced_by", String(16)),
)

bindings = Table(
    "bindings",
    metadata,
    Column("tenant", String(64), ForeignKey("tenants.name"), primary_key=True),
    # Called user_id, as "user" is a word of SQL.
    Column("user_id", String(USER_CHARACTERS), primary_key=True),
    Column("reference", String(REFERENCE_CHARACTERS), nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    # Whose thing was changed. No foreign keys: the log outlives what it speaks of.
    Column("tenant", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(512), nullable=False),
    # Who did it; both null for the command line.
    Column("actor_tenant", String(64)),
    Column("actor_key", String(16)),
    Column("request_id", String(64)),
    Column("detail_json", Text, nullable=False),
    Index("ix_audit_log_tenant_id", "tenant", "id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", String(64), ForeignKey("tenants.name"), primary_key=True),
    Column("key", String(255), primary_key=True),
    # SHA-256 of what was asked; the same key with another one is a mistake.
    Column("request_digest", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("body_json", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False, index=True),
)

rate_limits = Table(
    "rate_limits",
    metadata,
    Column("tenant", String(64), ForeignKey("tenants.name"), primary_key=True),
    # What was left at the Unix time ``at``, in seconds; tokens may be below zero.
    Column("requests", Double, nullable=False),
    Column("tokens", Double, nullable=False),
    Column("at", Double, nullable=False),
)

request_leases = Table(
    "request_leases",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False),
    # The process that runs it, which keeps pushing ``expires_at`` on: a killed one stops counting.
    Column("holder", String(32), nullable=False, index=True),
    Column("expires_at", Double, nullable=False),
    Index("ix_request_leases_tenant_expires_at", "tenant", "expires_at"),
)
