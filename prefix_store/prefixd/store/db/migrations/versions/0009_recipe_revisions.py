"""The number of recipes that each version had."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column."""
    counted = sa.Column("recipe_revision", sa.BigInteger(), nullable=False, server_default="1")
    op.add_column("versions", counted)
