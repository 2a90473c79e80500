"""The catalog's tables.

::

    prefixes ───────────< versions    immutable; numbered from 1 within a prefix
        │                   │   │
        ├──< latest_versions┤   │     the version that ``latest`` means, for each base
        ├──< aliases────────┤   │     movable names for a version
        ├─── pins───────────┤   │     the one version of a prefix that stays resident
        └──< agreements─────┘   │     how often the members of an ensemble agree with it
                                │
                       blobs ──<┘     one row for every blob that exists, or may exist
                         └───< files  files of a tenant, such as the input of a batch

A deleted prefix keeps its row: it holds the next version number, and a used number never refers to
other bytes. It also holds ``revision``, the number of writes to the prefix; a version, ``latest``
or alias has that number as of the last write that changed it. So no revision is used twice, even
when something is deleted and created again.

A blob's row is created before the blob and removed after it, so collecting needs no listing of the
blobs; ``unreferenced_at`` is null while a version has it, and otherwise the time it was last
wanted.
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
    text,
)

from prefixd.store.db.database import UtcDateTime, metadata

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only

# Sorted by bytes, regardless of the language of the database, as in all other places.
_Name = String(128).with_variant(String(128, collation="C"), "postgresql")


def _revision() -> Column[int]:
    return Column("revision", BigInteger, nullable=False, server_default=text("1"))


prefixes = Table(
    "prefixes",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", _Name, nullable=False),
    Column("next_version", Integer, nullable=False),
    _revision(),
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
    # The name the base was served under at the upload; null for versions from before it was kept.
    Column("base", Text),
    Column("kind", String(32), nullable=False),
    Column("peft_type", String(32)),
    # Of a text: raw or system; null for versions from before texts had a role, which are raw.
    Column("role", String(16)),
    # Of a stack, a blend or an ensemble: its members and how they are combined; null for others.
    Column("members_json", Text),
    Column("num_virtual_tokens", Integer, nullable=False),
    Column("dtype", String(16)),
    Column("size_bytes", BigInteger, nullable=False),
    Column("base_model_name_or_path", Text),
    Column("metadata_json", Text, nullable=False),
    # Counts the recipes that the version had, from 1.
    Column("recipe_revision", BigInteger, nullable=False, server_default=text("1")),
    # The key that published it; null for versions from before keys were recorded.
    Column("creator", String(64)),
    Column("created_at", UtcDateTime, nullable=False),
    _revision(),
    # The same bytes for another base are another version: its manifest names another fingerprint.
    UniqueConstraint("prefix_id", "digest", "fingerprint"),
    Index("ix_versions_tenant_digest", "tenant", "digest"),
)

latest_versions = Table(
    "latest_versions",
    metadata,
    Column("prefix_id", _Id, primary_key=True),
    Column("fingerprint", Text, primary_key=True),
    Column("version", Integer, nullable=False),
    _revision(),
    ForeignKeyConstraint(["prefix_id", "version"], ["versions.prefix_id", "versions.version"]),
)

aliases = Table(
    "aliases",
    metadata,
    Column("prefix_id", _Id, primary_key=True),
    Column("alias", String(128), primary_key=True),
    Column("version", Integer, nullable=False),
    _revision(),
    ForeignKeyConstraint(["prefix_id", "version"], ["versions.prefix_id", "versions.version"]),
)

pins = Table(
    "pins",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("prefix_id", _Id, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("since", UtcDateTime, nullable=False),
    # The key that pinned it.
    Column("pinned_by", String(64)),
    ForeignKeyConstraint(["prefix_id", "version"], ["versions.prefix_id", "versions.version"]),
)

agreements = Table(
    # Without foreign keys: counts may come after their version was deleted.
    "agreements",
    metadata,
    Column("prefix_id", _Id, primary_key=True, autoincrement=False),
    Column("version", Integer, primary_key=True, autoincrement=False),
    # The place of a member of an ensemble, and how often it agreed of how many times.
    Column("member", Integer, primary_key=True, autoincrement=False),
    Column("agreed", BigInteger, nullable=False),
    Column("compared", BigInteger, nullable=False),
)

blobs = Table(
    "blobs",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("unreferenced_at", UtcDateTime, index=True),
    # When its bytes were found changed or missing; not read again until they are uploaded again.
    Column("corrupt_at", UtcDateTime),
    # A publish must find the same ticket after writing the blob as before it; null: start over.
    Column("ticket", String(32)),
    Index("ix_blobs_tenant_size_bytes", "tenant", "size_bytes"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # When it is removed; null: never.
    Column("expires_at", UtcDateTime, index=True),
    # The key that uploaded it, or that created the batch it is the output of.
    Column("creator", String(64)),
    Index("ix_files_tenant_created_at_id", "tenant", "created_at", "id"),
    Index("ix_files_tenant_digest", "tenant", "digest"),
)
