"""The tables of the first release, which made them without migrations."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_NAME = sa.String(128).with_variant(sa.String(128, collation="C"), "postgresql")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "prefixes",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.Column("latest_version", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prefixes")),
        sa.UniqueConstraint("tenant", "name", name=op.f("uq_prefixes_tenant_name")),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_tenants")),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("label", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime()),
        sa.Column("revoked_at", sa.DateTime()),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenants.name"], name=op.f("fk_api_keys_tenant_tenants")
        ),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
    )
    op.create_index("ix_api_keys_tenant", "api_keys", ["tenant"])

    op.create_table(
        "versions",
        sa.Column("prefix_id", _ID, nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("peft_type", sa.String(length=32)),
        sa.Column("num_virtual_tokens", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.String(length=16)),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_model_name_or_path", sa.Text()),
        sa.Column("metadata_json", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prefix_id"], ["prefixes.id"], name=op.f("fk_versions_prefix_id_prefixes")
        ),
        sa.PrimaryKeyConstraint("prefix_id", "version", name=op.f("pk_versions")),
        sa.UniqueConstraint(
            "prefix_id",
            "digest",
            "fingerprint",
            name=op.f("uq_versions_prefix_id_digest_fingerprint"),
        ),
    )
    op.create_index("ix_versions_tenant_digest", "versions", ["tenant", "digest"])

    op.create_table(
        "aliases",
        sa.Column("prefix_id", _ID, nullable=False),
        sa.Column("alias", sa.String(length=128), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prefix_id", "version"],
            ["versions.prefix_id", "versions.version"],
            name=op.f("fk_aliases_prefix_id_version_versions"),
        ),
        sa.PrimaryKeyConstraint("prefix_id", "alias", name=op.f("pk_aliases")),
    )
