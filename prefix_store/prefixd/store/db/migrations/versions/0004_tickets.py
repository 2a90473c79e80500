"""Tickets of blobs' rows, which tell a row from the one that another publish made before it."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add a column; the next publish that wants a blob gives its row a ticket."""
    op.add_column("blobs", sa.Column("ticket", sa.String(length=32)))
