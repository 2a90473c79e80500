"""Rows of prefixes and versions: locking a name, and inserting its next version."""

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.composition import write_members
from prefixd.store.catalog.changes import Draft
from prefixd.store.catalog.tables import prefixes, versions
from prefixd.store.db.database import insert_into
from prefixd.store.errors import UnknownPrefix


@dataclass(frozen=True, slots=True)
class PrefixRow:
    """A locked row of ``prefixes``."""

    id: int
    next_version: int
    revision: int


def lock(connection: Connection, tenant: str, name: str, *, missing: str) -> PrefixRow:
    """The row of a name, locked; raise UnknownPrefix(missing) when there never was one."""
    row = _locked(connection, tenant, name)
    if row is None:
        raise UnknownPrefix(missing)
    return row


def lock_or_create(connection: Connection, tenant: str, name: str) -> PrefixRow:
    """The row of a name, locked."""
    row = _locked(connection, tenant, name)
    if row is None:
        # Revision 0: the write that creates the prefix raises it to 1.
        first = {"tenant": tenant, "name": name, "next_version": 1, "revision": 0}
        created = insert_into(connection, prefixes).values(first)
        connection.execute(created.on_conflict_do_nothing(index_elements=["tenant", "name"]))
        row = _locked(connection, tenant, name)
        assert row is not None
    return row


def _locked(connection: Connection, tenant: str, name: str) -> PrefixRow | None:
    statement = (
        select(prefixes.c.id, prefixes.c.next_version, prefixes.c.revision)
        .where(prefixes.c.tenant == tenant, prefixes.c.name == name)
        .with_for_update()
    )
    row = connection.execute(statement).first()
    return None if row is None else PrefixRow(row.id, row.next_version, row.revision)


def has_versions(connection: Connection, prefix_id: int) -> bool:
    """Whether a prefix has any version, of any base."""
    statement = select(versions.c.version).where(versions.c.prefix_id == prefix_id).limit(1)
    return connection.execute(statement).first() is not None


def insert_version(
    connection: Connection, draft: Draft, row: PrefixRow, *, tenant: str, revision: int
) -> int:
    """Insert the draft as the next version of a prefix; its number."""
    summary, version = draft.summary, row.next_version
    connection.execute(
        update(prefixes).where(prefixes.c.id == row.id).values(next_version=version + 1)
    )
    connection.execute(
        insert(versions).values(
            prefix_id=row.id,
            version=version,
            tenant=tenant,
            digest=draft.packed.digest,
            fingerprint=draft.base.fingerprint,
            base=draft.base.name,
            kind=str(summary.kind),
            peft_type=summary.peft_type,
            role=None if summary.role is None else str(summary.role),
            members_json=write_members(summary.members, summary.combine),
            num_virtual_tokens=summary.num_virtual_tokens,
            dtype=summary.dtype,
            size_bytes=draft.packed.size_bytes,
            base_model_name_or_path=summary.base_model_name_or_path,
            metadata_json=draft.metadata_json,
            creator=draft.creator,
            created_at=draft.created_at,
            revision=revision,
        )
    )
    return version


def name_base(connection: Connection, prefix_id: int, version: int, base: BaseSpec) -> None:
    """Record the base's name for a version from before names were recorded."""
    connection.execute(
        update(versions)
        .where(
            versions.c.prefix_id == prefix_id,
            versions.c.version == version,
            versions.c.base.is_(None),
        )
        .values(base=base.name)
    )
