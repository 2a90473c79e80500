"""The few columns of a version that may change after it was published."""

from sqlalchemy import ColumnElement, Connection, and_, select, update

from prefixd.store.catalog.tables import versions
from prefixd.store.names import BlobKey


def has_other_count(connection: Connection, key: BlobKey, fingerprint: str, count: int) -> bool:
    """Whether a version with these bytes, for this base, has another number of virtual tokens."""
    statement = select(versions.c.version).where(_other_count(key, fingerprint, count)).limit(1)
    return connection.execute(statement).first() is not None


def set_count(connection: Connection, key: BlobKey, fingerprint: str, count: int) -> None:
    """Set the number of virtual tokens of the versions with these bytes, for this base."""
    where = _other_count(key, fingerprint, count)
    connection.execute(update(versions).where(where).values(num_virtual_tokens=count))


def _other_count(key: BlobKey, fingerprint: str, count: int) -> ColumnElement[bool]:
    return and_(
        versions.c.tenant == key.tenant,
        versions.c.digest == key.digest,
        versions.c.fingerprint == fingerprint,
        versions.c.num_virtual_tokens != count,
    )
