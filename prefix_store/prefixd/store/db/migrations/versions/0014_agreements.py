"""How often the members of saved ensembles agree with their answers."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    """Add the table."""
    prefix_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "agreements",
        sa.Column("prefix_id", prefix_id, primary_key=True, autoincrement=False),
        sa.Column("version", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("member", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("agreed", sa.BigInteger(), nullable=False),
        sa.Column("compared", sa.BigInteger(), nullable=False),
    )
