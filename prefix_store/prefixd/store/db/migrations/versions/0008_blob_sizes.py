"""An index that holds the sizes of a tenant's blobs: every upload sums them."""

from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the index."""
    op.create_index("ix_blobs_tenant_size_bytes", "blobs", ["tenant", "size_bytes"])
