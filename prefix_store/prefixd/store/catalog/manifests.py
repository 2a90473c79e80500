"""Manifests: what the catalog records of a version, and the queries that read it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, select

from prefixd.store.artifact.config import METADATA_TEXTS, Kind
from prefixd.store.catalog.tables import aliases, blobs, pins, prefixes, versions
from prefixd.store.names import LATEST, MAX_VERSION, Reference


@dataclass(frozen=True, slots=True)
class Manifest:
    """An immutable version. Only ``aliases`` (the names, with ``latest``, that point at it now),
    ``pinned`` (it stays resident) and ``corrupt`` (its blob was damaged; upload it again) may
    differ the next time it is read.

    ``fingerprint`` is that of the base it was checked against, ``base_model_name_or_path`` the one
    its config states, ``creator`` the id of the key that published it. ``metadata`` is the upload's
    without the fields that have their own attribute here.
    """

    tenant: str
    name: str
    version: int
    digest: str
    kind: Kind
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    size_bytes: int
    fingerprint: str
    created_at: datetime
    base_model_name_or_path: str | None
    metadata: Mapping[str, Any]
    aliases: tuple[str, ...]
    creator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None
    prompt_template: str | None = None
    corrupt: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Some manifests in order; ``next_after`` is the name to continue after, None at the end."""

    manifests: tuple[Manifest, ...]
    next_after: str | None


_STORED = tuple(name for name in Manifest.__dataclass_fields__ if name in versions.c)


def versions_of(tenant: str) -> Select[Any]:
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


def referenced(tenant: str, reference: Reference) -> Select[Any]:
    """The version that a reference means."""
    statement = versions_of(tenant).where(prefixes.c.name == reference.name)
    if reference.version is not None:
        # A number too large for the column is no version; the driver would raise.
        known = reference.version if 0 <= reference.version <= MAX_VERSION else 0
        return statement.where(versions.c.version == known)
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


def unknown(reference: Reference) -> str:
    """The message for a missing prefix, the same for another tenant's."""
    selector = reference.version if reference.version is not None else reference.alias
    shown = reference.name if selector == LATEST else f"{reference.name}@{selector}"
    return f"no prefix {shown}"


def manifests(connection: Connection, statement: Select[Any]) -> tuple[Manifest, ...]:
    """Manifests of the versions that ``statement``, made by this module, selects; two queries."""
    rows = connection.execute(statement).all()
    names = _alias_names(connection, {(row.prefix_id, row.version) for row in rows})
    return tuple(_manifest(row, aliases_of=names[row.prefix_id, row.version]) for row in rows)


def _alias_names(
    connection: Connection, keys: set[tuple[int, int]]
) -> dict[tuple[int, int], list[str]]:
    names: dict[tuple[int, int], list[str]] = {key: [] for key in keys}
    numbers = [version for _, version in keys]
    statement = select(aliases.c.prefix_id, aliases.c.version, aliases.c.alias).where(
        aliases.c.prefix_id.in_({prefix_id for prefix_id, _ in keys}),
        # A range: a list of all version numbers of a prefix may exceed a statement's limit.
        aliases.c.version.between(min(numbers, default=0), max(numbers, default=0)),
    )
    for prefix_id, version, alias in connection.execute(statement):
        if (prefix_id, version) in names:
            names[prefix_id, version].append(alias)
    return names


def _manifest(row: Row[Any], *, aliases_of: Iterable[str]) -> Manifest:
    fields = {name: getattr(row, name) for name in _STORED}
    # Metadata stored before a field was known, with another type, stays in the free part.
    free = json.loads(row.metadata_json)
    for name in METADATA_TEXTS:
        fields[name] = free.pop(name) if isinstance(free.get(name), str) else None
    del fields["base_fingerprint"]
    labels = free.get("labels")
    if isinstance(labels, dict) and all(isinstance(value, str) for value in labels.values()):
        fields["labels"] = free.pop("labels")
    latest = (LATEST,) if row.version == row.latest_version else ()
    return Manifest(
        **fields | {"kind": Kind(row.kind)},
        name=row.name,
        metadata=free,
        aliases=tuple(sorted((*latest, *aliases_of))),
        corrupt=row.corrupt_at is not None,
        pinned=row.pinned_since is not None,
    )
