"""Tables of tenants and API keys, in the one database."""

from sqlalchemy import Column, ForeignKey, String, Table

from prefix_store.database import UtcDateTime, metadata

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
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
)
