"""Writing a version: the row of its name, locked, and its own row."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select

from prefixd.store.artifact.artifact import Summary
from prefixd.store.catalog.tables import prefixes, versions
from prefixd.store.db.database import insert_into


@dataclass(frozen=True, slots=True)
class Draft:
    """A version that has everything but its number."""

    summary: Summary
    digest: str
    size_bytes: int
    fingerprint: str
    metadata_json: str
    creator: str | None
    created_at: datetime
    ticket: str
    """What its blob was wanted with; see ``prefixd.store.catalog.blob_rows``."""


def locked(connection: Connection, tenant: str, name: str) -> int | None:
    """Row id of a name, locked; None when it never was."""
    return connection.execute(
        select(prefixes.c.id)
        .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        .with_for_update()
    ).scalar()


def prefix_for_writing(
    connection: Connection, tenant: str, name: str
) -> tuple[int, int, int | None]:
    """Row id, next and latest version number of a name, locked; made when there is none."""
    made = insert_into(connection, prefixes).values(tenant=tenant, name=name, next_version=1)
    statement = (
        select(prefixes.c.id, prefixes.c.next_version, prefixes.c.latest_version)
        .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        .with_for_update()
    )
    row = connection.execute(statement).first()
    if row is None:
        connection.execute(made.on_conflict_do_nothing(index_elements=["tenant", "name"]))
        row = connection.execute(statement).one()
    return row.id, row.next_version, row.latest_version


def insert_version(
    connection: Connection, draft: Draft, prefix_id: int, *, tenant: str, version: int
) -> None:
    """Give a draft its number."""
    summary = draft.summary
    connection.execute(
        insert(versions).values(
            prefix_id=prefix_id,
            version=version,
            tenant=tenant,
            digest=draft.digest,
            fingerprint=draft.fingerprint,
            kind=str(summary.kind),
            peft_type=summary.peft_type,
            num_virtual_tokens=summary.num_virtual_tokens,
            dtype=summary.dtype,
            size_bytes=draft.size_bytes,
            base_model_name_or_path=summary.base_model_name_or_path,
            metadata_json=draft.metadata_json,
            creator=draft.creator,
            created_at=draft.created_at,
        )
    )
