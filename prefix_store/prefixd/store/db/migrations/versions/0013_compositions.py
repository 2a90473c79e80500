"""The members of stacks, blends and ensembles."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Add the column."""
    op.add_column("versions", sa.Column("members_json", sa.Text()))
