"""Reading versions from the catalog's tables: which rows, and what manifest a row makes."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, select

from prefixd.store.artifact.artifact import Kind
from prefixd.store.artifact.metadata import decode_metadata
from prefixd.store.catalog.tables import aliases, blobs, pins, prefixes, versions
from prefixd.store.manifest import Manifest
from prefixd.store.names import LATEST, MAX_VERSION, Reference


def rows(tenant: str) -> Select[Any]:
    """Every version of a tenant."""
    return (
        select(
            prefixes.c.name,
            prefixes.c.latest_version,
            versions,
            blobs.c.corrupt_at,
            pins.c.since.label("pinned_since"),
        )
        .join_from(prefixes, versions, versions.c.prefix_id == prefixes.c.id)
        .outerjoin(
            blobs, and_(blobs.c.tenant == versions.c.tenant, blobs.c.digest == versions.c.digest)
        )
        .outerjoin(
            pins,
            and_(
                pins.c.tenant == versions.c.tenant,
                pins.c.prefix_id == versions.c.prefix_id,
                pins.c.version == versions.c.version,
            ),
        )
        .where(prefixes.c.tenant == tenant)
    )


def one_version(tenant: str, name: str, version: int) -> Select[Any]:
    """One numbered version."""
    # A number beyond the column is no version; the driver would raise on it.
    known = version if 0 <= version <= MAX_VERSION else 0
    return rows(tenant).where(prefixes.c.name == name, versions.c.version == known)


def referenced(tenant: str, reference: Reference) -> Select[Any]:
    """The version that a reference means."""
    if reference.version is not None:
        return one_version(tenant, reference.name, reference.version)
    statement = rows(tenant).where(prefixes.c.name == reference.name)
    if reference.alias == LATEST:
        return statement.where(versions.c.version == prefixes.c.latest_version)
    return statement.join(
        aliases,
        and_(
            aliases.c.prefix_id == versions.c.prefix_id,
            aliases.c.version == versions.c.version,
            aliases.c.alias == reference.alias,
        ),
    )


def manifests(connection: Connection, statement: Select[Any]) -> tuple[Manifest, ...]:
    """Manifests of the versions that ``statement``, made here, selects; two queries."""
    found = connection.execute(statement).all()
    names = _alias_names(connection, {(row.prefix_id, row.version) for row in found})
    return tuple(_manifest(row, aliases_of=names[row.prefix_id, row.version]) for row in found)


def _alias_names(
    connection: Connection, keys: set[tuple[int, int]]
) -> dict[tuple[int, int], list[str]]:
    found: dict[tuple[int, int], list[str]] = {key: [] for key in keys}
    numbers = [version for _, version in keys]
    statement = select(aliases.c.prefix_id, aliases.c.version, aliases.c.alias).where(
        aliases.c.prefix_id.in_({prefix_id for prefix_id, _ in keys}),
        # A range, as a list of all numbers of a prefix may be longer than a statement may be.
        aliases.c.version.between(min(numbers, default=0), max(numbers, default=0)),
    )
    for prefix_id, version, alias in connection.execute(statement):
        if (prefix_id, version) in found:
            found[prefix_id, version].append(alias)
    return found


def _manifest(row: Row[Any], *, aliases_of: Iterable[str]) -> Manifest:
    details = decode_metadata(row.metadata_json)
    latest = (LATEST,) if row.version == row.latest_version else ()
    return Manifest(
        tenant=row.tenant,
        name=row.name,
        version=row.version,
        digest=row.digest,
        kind=Kind(row.kind),
        peft_type=row.peft_type,
        num_virtual_tokens=row.num_virtual_tokens,
        dtype=row.dtype,
        size_bytes=row.size_bytes,
        fingerprint=row.fingerprint,
        created_at=row.created_at,
        base_model_name_or_path=row.base_model_name_or_path,
        metadata=details.free,
        aliases=tuple(sorted((*latest, *aliases_of))),
        creator=row.creator,
        labels=details.labels,
        description=details.description,
        prompt_template=details.prompt_template,
        corrupt=row.corrupt_at is not None,
        pinned=row.pinned_since is not None,
    )
