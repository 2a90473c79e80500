"""The catalog's tables.

::

    prefixes ──< versions      immutable; numbered from 1 within a prefix
        │           │
        └──< aliases┘          movable names for a version

A deleted prefix keeps its row, with ``latest_version`` null: the next version number lives there,
and a number once given out never means other bytes.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from prefix_store.database import UtcDateTime, metadata

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only

prefixes = Table(
    "prefixes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("next_version", Integer, nullable=False),
    Column("latest_version", Integer),
    UniqueConstraint("tenant", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("prefix_id", _Id, ForeignKey("prefixes.id"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("tenant", String(128), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("peft_type", String(32)),
    Column("num_virtual_tokens", Integer, nullable=False),
    Column("dtype", String(16)),
    Column("size_bytes", BigInteger, nullable=False),
    Column("base_model_name_or_path", Text),
    Column("metadata_json", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # The same bytes for another base are another version: its manifest names another fingerprint.
    UniqueConstraint("prefix_id", "digest", "fingerprint"),
    Index("ix_versions_tenant_digest", "tenant", "digest"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("prefix_id", _Id, primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["prefix_id", "version"], ["versions.prefix_id", "versions.version"]),
)
