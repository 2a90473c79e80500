"""Tables of tenants, keys, bindings, limits and audit, in the one database.

::

    tenants ──< api_keys            secrets of callers, and their scopes
       │   ├──< bindings            end user -> prefix reference
       │   ├──< idempotency_keys    responses that are repeated for a day
       │   ├─── rate_limits         one row: the levels of the tenant's two buckets
       │   └──< request_leases      running requests, on any replica
    audit_log                       audited actions; kept when their subjects are deleted
"""

from datetime import timedelta

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

KEPT_FOR = timedelta(hours=24)
"""How long the response under an idempotency key is repeated."""

USER_CHARACTERS = 256
REFERENCE_CHARACTERS = 257  # name@alias

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
    # The prefix of users without a binding.
    Column("default_prefix", String(REFERENCE_CHARACTERS)),
    # Counts the writes to the tenant's bindings and default. Each of these has the number of its
    # last write as its revision, so that no revision is used twice, even after a deletion.
    Column("last_revision", BigInteger, nullable=False, server_default=text("1")),
    Column("default_revision", BigInteger, nullable=False, server_default=text("1")),
    # Quotas; null is no limit.
    Column("max_prefixes", BigInteger),
    Column("max_versions", BigInteger),
    Column("max_aliases", BigInteger),
    Column("max_bytes", BigInteger),
    Column("max_users", BigInteger),
    Column("max_keys", BigInteger),
    Column("max_idempotency_keys", BigInteger),
    Column("max_virtual_tokens", BigInteger),
    Column("max_resident_tokens", BigInteger),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("other_requests_per_minute", BigInteger),
    Column("max_concurrent_requests", BigInteger),
    Column("max_files", BigInteger),
    Column("max_file_bytes", BigInteger),
    Column("max_batch_lines", BigInteger),
    Column("max_open_batches", BigInteger),
    # See TenantSettings.
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
    # The successor of a rotated key.
    Column("replaced_by", String(16)),
)

bindings = Table(
    "bindings",
    metadata,
    Column("tenant", String(64), ForeignKey("tenants.name"), primary_key=True),
    # Not "user", a reserved word of SQL.
    Column("user_id", String(USER_CHARACTERS), primary_key=True),
    Column("reference", String(REFERENCE_CHARACTERS), nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("revision", BigInteger, nullable=False, server_default=text("1")),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", UtcDateTime, nullable=False),
    # The owner of the subject. No foreign keys: entries stay when their subjects are deleted.
    Column("tenant", String(64), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(512), nullable=False),
    # The caller; both null for the command line.
    Column("actor_tenant", String(64)),
    Column("actor_key", String(16)),
    Column("request_id", String(64)),
    Column("detail_json", Text, nullable=False),
    Index("ix_audit_log_tenant_id", "tenant", "id"),
    Index("ix_audit_log_at", "at"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant", String(64), ForeignKey("tenants.name"), primary_key=True),
    Column("key", String(255), primary_key=True),
    # SHA-256 of the request; the same key with another digest is refused.
    Column("request_digest", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("body_json", Text, nullable=False),
    Column("etag", String(64)),
    Column("created_at", UtcDateTime, nullable=False, index=True),
)

rate_limits = Table(
    "rate_limits",
    metadata,
    Column("tenant", String(64), ForeignKey("tenants.name"), primary_key=True),
    # Levels at the Unix time ``at``, in seconds; tokens may be below zero.
    Column("requests", Double, nullable=False),
    Column("tokens", Double, nullable=False),
    Column("at", Double, nullable=False),
)

request_leases = Table(
    "request_leases",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False),
    # The process that runs it and renews ``expires_at``: leases of a killed one expire.
    Column("holder", String(32), nullable=False, index=True),
    Column("expires_at", Double, nullable=False),
    Index("ix_request_leases_tenant_expires_at", "tenant", "expires_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), ForeignKey("tenants.name"), nullable=False),
    # The key that created it, whose rights its lines have.
    Column("key_id", String(16), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False, index=True),
    Column("completion_window", String(16), nullable=False),
    Column("metadata_json", Text, nullable=False),
    # Seconds for which its output is kept; null: as other files.
    Column("output_expires_after", BigInteger),
    Column("status", String(16), nullable=False),
    # The status that it gets when its files are written; null before all of it is decided.
    Column("outcome", String(16)),
    Column("errors_json", Text, nullable=False),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    # Of lines; those that failed are in the error file.
    Column("total", BigInteger, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("in_progress_at", UtcDateTime),
    Column("finalizing_at", UtcDateTime),
    Column("completed_at", UtcDateTime),
    Column("failed_at", UtcDateTime),
    Column("expired_at", UtcDateTime),
    Column("cancelling_at", UtcDateTime),
    Column("cancelled_at", UtcDateTime),
    # The server that works on it, until ``leased_until`` (Unix time, in seconds).
    Column("holder", String(32)),
    Column("leased_until", Double),
    Index("ix_batches_tenant_created_at_id", "tenant", "created_at", "id"),
    Index("ix_batches_status_created_at", "status", "created_at"),
)

batch_answers = Table(
    "batch_answers",
    metadata,
    Column("batch", String(64), ForeignKey("batches.id"), primary_key=True),
    # The line of the input file, from 1.
    Column("line", BigInteger, primary_key=True, autoincrement=False),
    Column("failed", Boolean, nullable=False),
    # A line of the output file, or of the error file.
    Column("answer_json", Text, nullable=False),
)
