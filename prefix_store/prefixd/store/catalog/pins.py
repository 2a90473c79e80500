"""Pins, and the blobs that no name, alias or pin refers to any more."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    and_,
    delete,
    func,
    or_,
    select,
    text,
)

from prefixd.store.artifact.composition import Member, read_members
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.template import num_in_front
from prefixd.store.catalog.manifests import present_members
from prefixd.store.catalog.tables import aliases, blobs, latest_versions, pins, versions
from prefixd.store.db.database import insert_into
from prefixd.store.errors import MemberDeleted
from prefixd.store.names import BlobKey

_BATCH = 500
_LOCK = 0x70696E73  # an arbitrary number, the same in all processes: "pins"


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pinned blob, the number of its virtual tokens, and the template of its version, if that
    places some. A stack or a blend has ``members``; an ensemble is its members."""

    key: BlobKey
    num_virtual_tokens: int
    prompt_template: str | None = None
    members: tuple[Member, ...] = ()
    is_blend: bool = False

    @property
    def num_in_front(self) -> int:
        """Virtual tokens that stand in front of all text: the pool keeps no others."""
        return num_in_front(self.prompt_template, num_virtual_tokens=self.num_virtual_tokens)


def pinned(connection: Connection, *, fingerprint: str) -> tuple[Pinned, ...]:
    """Pinned prefixes of one base, of all tenants, the oldest pin first; equal bytes under equal
    templates once for each tenant. Without corrupt blobs: they cannot be loaded."""
    columns = (
        pins.c.tenant,
        versions.c.kind,
        versions.c.members_json,
        versions.c.digest,
        versions.c.num_virtual_tokens,
        versions.c.metadata_json,
    )
    statement = (
        select(*columns)
        .join_from(
            pins,
            versions,
            and_(versions.c.prefix_id == pins.c.prefix_id, versions.c.version == pins.c.version),
        )
        .outerjoin(
            blobs, and_(blobs.c.tenant == pins.c.tenant, blobs.c.digest == versions.c.digest)
        )
        .where(versions.c.fingerprint == fingerprint, blobs.c.corrupt_at.is_(None))
        .group_by(*columns)
        .order_by(func.min(pins.c.since), pins.c.tenant, versions.c.digest)
    )
    found = (
        pin for row in connection.execute(statement).all() for pin in _pins_of(connection, row)
    )
    return tuple(dict.fromkeys(found))


def _pins_of(connection: Connection, row: Any) -> Iterator[Pinned]:
    """What the pin of a version keeps: of an ensemble its members. Nothing of a composition whose
    members were deleted, or are corrupt."""
    kind, members = Kind(row.kind), read_members(row.members_json)[0]
    if members:
        try:
            present = present_members(connection, row.tenant, members)
        except MemberDeleted:
            return
        if any(member.corrupt for member in present):
            return
        if kind is Kind.ENSEMBLE:
            for member in present:
                yield Pinned(
                    BlobKey(row.tenant, member.digest),
                    member.num_virtual_tokens,
                    member.prompt_template if member.places_tokens else None,
                    member.members,
                    member.kind is Kind.BLEND,
                )
            return
    template = _template(row.metadata_json)
    key = BlobKey(row.tenant, row.digest)
    yield Pinned(key, row.num_virtual_tokens, template, members, kind is Kind.BLEND)


def _template(metadata_json: str) -> str | None:
    template = json.loads(metadata_json).get("prompt_template")
    # One without markers says nothing about the pool.
    return template if isinstance(template, str) and "{prefix:" in template else None


def put_pin(
    connection: Connection, tenant: str, prefix_id: int, version: int, **columns: object
) -> None:
    """Pin a version in place of the pinned one of its prefix.

    Until the end of the transaction no other one pins: of two at once, the second counts the pin of
    the first.
    """
    if connection.dialect.name == "postgresql":  # SQLite has only one writer
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    row = {"version": version, **columns}
    statement = insert_into(connection, pins).values(tenant=tenant, prefix_id=prefix_id, **row)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["tenant", "prefix_id"], set_=row)
    )


def drop_pin(connection: Connection, tenant: str, prefix_id: int) -> bool:
    """Remove the pin of a prefix; whether there was one."""
    statement = delete(pins).where(pins.c.tenant == tenant, pins.c.prefix_id == prefix_id)
    return connection.execute(statement).rowcount > 0


def pinned_tokens(connection: Connection, tenant: str) -> int:
    """Virtual tokens that pins of ``tenant`` keep in pools, for all bases."""
    same = and_(versions.c.prefix_id == pins.c.prefix_id, versions.c.version == pins.c.version)
    columns = versions.c.num_virtual_tokens, versions.c.metadata_json
    statement = select(*columns).join_from(pins, versions, same).where(pins.c.tenant == tenant)
    return sum(
        num_in_front(_template(row.metadata_json), num_virtual_tokens=row.num_virtual_tokens)
        for row in connection.execute(statement)
    )


def pinned_version(connection: Connection, tenant: str, prefix_id: int) -> int | None:
    """The pinned version of a prefix."""
    statement = select(pins.c.version).where(pins.c.tenant == tenant, pins.c.prefix_id == prefix_id)
    return connection.execute(statement).scalar()


def orphans(connection: Connection, tenant: str, digests: Collection[str]) -> tuple[BlobKey, ...]:
    """Those of ``digests`` that no ``latest`` of any base, alias or pin of the tenant refers to."""
    candidates = sorted(set(digests))
    named: set[str] = set()
    for begin in range(0, len(candidates), _BATCH):
        named.update(_named(connection, tenant, candidates[begin : begin + _BATCH]))
    return tuple(BlobKey(tenant, digest) for digest in candidates if digest not in named)


def _named(connection: Connection, tenant: str, digests: Collection[str]) -> Iterable[str]:
    def same(table: Table) -> ColumnElement[bool]:
        return and_(
            table.c.prefix_id == versions.c.prefix_id, table.c.version == versions.c.version
        )

    return connection.execute(
        select(versions.c.digest)
        .outerjoin(latest_versions, same(latest_versions))
        .outerjoin(aliases, same(aliases))
        .outerjoin(pins, same(pins))
        .where(versions.c.tenant == tenant, versions.c.digest.in_(digests))
        .where(
            or_(
                latest_versions.c.fingerprint.is_not(None),
                aliases.c.alias.is_not(None),
                pins.c.since.is_not(None),
            )
        )
    ).scalars()
