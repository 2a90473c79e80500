"""The name of the base of each version, and ``latest`` for each base of a prefix."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Add a column and a table. ``latest`` keeps its version for the base of that version; for any
    other base of the prefix it becomes the highest version."""
    op.add_column("versions", sa.Column("base", sa.Text()))
    op.create_table(
        "latest_versions",
        sa.Column("prefix_id", _ID, nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prefix_id", "version"],
            ["versions.prefix_id", "versions.version"],
            name=op.f("fk_latest_versions_prefix_id_version_versions"),
        ),
        sa.PrimaryKeyConstraint("prefix_id", "fingerprint", name=op.f("pk_latest_versions")),
    )
    op.execute(
        "INSERT INTO latest_versions (prefix_id, fingerprint, version) "
        "SELECT versions.prefix_id, versions.fingerprint, coalesce("
        "max(CASE WHEN versions.version = prefixes.latest_version THEN versions.version END), "
        "max(versions.version)) "
        "FROM versions JOIN prefixes ON prefixes.id = versions.prefix_id "
        "GROUP BY versions.prefix_id, versions.fingerprint"
    )
    op.drop_column("prefixes", "latest_version")
