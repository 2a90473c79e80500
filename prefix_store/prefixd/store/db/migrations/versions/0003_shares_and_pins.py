"""Weight and KV reuse of tenants, and pins."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add a table and columns; existing tenants get equal weights and reuse KV."""
    op.add_column(
        "tenants", sa.Column("weight", sa.Double(), nullable=False, server_default=sa.text("1"))
    )
    op.add_column(
        "tenants", sa.Column("kv_reuse", sa.Boolean(), nullable=False, server_default=sa.true())
    )
    op.create_table(
        "pins",
        sa.Column("tenant", sa.String(length=128), nullable=False),
        sa.Column("prefix_id", _ID, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("since", sa.DateTime(), nullable=False),
        sa.Column("pinned_by", sa.String(length=64)),
        sa.ForeignKeyConstraint(
            ["prefix_id", "version"],
            ["versions.prefix_id", "versions.version"],
            name=op.f("fk_pins_prefix_id_version_versions"),
        ),
        sa.PrimaryKeyConstraint("tenant", "prefix_id", name=op.f("pk_pins")),
    )
