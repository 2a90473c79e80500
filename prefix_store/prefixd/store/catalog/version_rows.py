"""The few columns of a version that may change after it was published; and its labels."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    Connection,
    and_,
    case,
    cast,
    exists,
    func,
    literal_column,
    select,
    update,
)

from prefixd.store.artifact.metadata import encode_fields
from prefixd.store.artifact.recipe import RECIPE, TEMPLATE
from prefixd.store.artifact.strict import shown
from prefixd.store.artifact.template import check_new_template
from prefixd.store.catalog.revisions import raise_revision
from prefixd.store.catalog.tables import prefixes, versions
from prefixd.store.errors import ArtifactRefused
from prefixd.store.names import BlobKey

_IDENTITY = ("task_id", "base_fingerprint")
"""Fields of the metadata that say which version it is."""


# -- virtual tokens -------------------------------------------------------------------------------


def has_other_count(connection: Connection, key: BlobKey, fingerprint: str, count: int) -> bool:
    """Whether a version with these bytes, for this base, has another number of virtual tokens."""
    statement = select(versions.c.version).where(_other_count(key, fingerprint, count)).limit(1)
    return connection.execute(statement).first() is not None


def set_count(connection: Connection, key: BlobKey, fingerprint: str, count: int) -> None:
    """Set the number of virtual tokens of the versions with these bytes, for this base."""
    where = _other_count(key, fingerprint, count)
    # In the order of names, as reference_locks: writers that lock several prefixes never deadlock.
    affected = (
        select(prefixes.c.id)
        .where(prefixes.c.id.in_(select(versions.c.prefix_id).where(where)))
        .order_by(prefixes.c.name)
        .with_for_update()
    )
    for prefix_id in connection.execute(affected).scalars().all():
        values = {"num_virtual_tokens": count, "revision": raise_revision(connection, prefix_id)}
        in_prefix = versions.c.prefix_id == prefix_id
        connection.execute(update(versions).where(where, in_prefix).values(values))


def _other_count(key: BlobKey, fingerprint: str, count: int) -> ColumnElement[bool]:
    return and_(
        versions.c.tenant == key.tenant,
        versions.c.digest == key.digest,
        versions.c.fingerprint == fingerprint,
        versions.c.num_virtual_tokens != count,
    )


# -- metadata -------------------------------------------------------------------------------------


def replace_metadata(
    connection: Connection, prefix_id: int, version: int, metadata: Mapping[str, Any]
) -> bool:
    """Replace the metadata of a version; whether it changed. The fields of its identity stay when
    ``metadata`` omits them. The caller has locked the prefix. Raises ArtifactRefused."""
    stored, fingerprint = _metadata(connection, prefix_id, version)
    kept = {name: stored[name] for name in _IDENTITY if name in stored and name not in metadata}
    merged = {**metadata, **kept}
    _check_identity(merged, stored, fingerprint)
    _write(connection, prefix_id, version, merged, stored)
    return merged != stored


def merge_metadata(
    connection: Connection, prefix_id: int, version: int, patch: Mapping[str, Any]
) -> None:
    """Merge ``patch`` into the metadata of a version, by RFC 7396. The caller has locked the
    prefix. Raises ArtifactRefused."""
    stored, fingerprint = _metadata(connection, prefix_id, version)
    merged = merge_patch(stored, patch)
    if isinstance(patch.get(TEMPLATE), str):
        check_new_template(patch[TEMPLATE])
    _check_identity(merged, stored, fingerprint)
    _write(connection, prefix_id, version, merged, stored)


def merge_patch(target: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7396 for two objects: null removes a member, an object is merged, any other value
    replaces."""
    merged = dict(target)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            inner = merged.get(name)
            merged[name] = merge_patch(inner if isinstance(inner, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def _metadata(connection: Connection, prefix_id: int, version: int) -> tuple[dict[str, Any], str]:
    """The metadata of a version, and the fingerprint of its base."""
    row = connection.execute(
        select(versions.c.metadata_json, versions.c.fingerprint).where(_is(prefix_id, version))
    ).one()
    return json.loads(row.metadata_json), row.fingerprint


def _check_identity(merged: Mapping[str, Any], stored: Mapping[str, Any], fingerprint: str) -> None:
    implied = {"base_fingerprint": fingerprint}
    for name in _IDENTITY:
        missing = name in stored and name not in merged
        before = stored.get(name, implied.get(name))
        if missing or (name in merged and json.dumps(merged[name]) != json.dumps(before)):
            received = "its removal" if missing else shown(merged[name])
            raise ArtifactRefused(
                "immutable_metadata",
                f"expected {name} to stay {shown(before)}, got {received}: it belongs to the "
                "version; upload the prefix again for another one",
                param=f"metadata.{name}",
            )


def _write(
    connection: Connection,
    prefix_id: int,
    version: int,
    metadata: Mapping[str, Any],
    stored: Mapping[str, Any],
) -> None:
    """Replace ``stored`` by ``metadata``, and count another recipe."""
    values: dict[str, Any] = {"metadata_json": encode_fields(metadata)}
    if _recipe_text(metadata) != _recipe_text(stored):
        values["recipe_revision"] = versions.c.recipe_revision + 1
    connection.execute(update(versions).where(_is(prefix_id, version)).values(values))


def _recipe_text(metadata: Mapping[str, Any]) -> str:
    # As JSON: 1 and true are equal in Python.
    return json.dumps([metadata.get(TEMPLATE), metadata.get(RECIPE) or None], sort_keys=True)


def _is(prefix_id: int, version: int) -> ColumnElement[bool]:
    return and_(versions.c.prefix_id == prefix_id, versions.c.version == version)


# -- labels ---------------------------------------------------------------------------------------


def has_label(connection: Connection, label: str, value: str) -> ColumnElement[bool]:
    """The condition that a version has this label with this value. Names and values may hold
    colons: a label is compared as the text ``label:value``."""
    text = versions.c.metadata_json
    if connection.dialect.name == "postgresql":
        # PostgreSQL cannot read a JSON text with an escaped NUL anywhere in it.
        labels = cast(func.replace(text, "\\u0000", "\\ufffd"), JSON).op("->")("labels")
        is_object = func.json_typeof(labels) == "object"
        each = func.json_each_text(case((is_object, labels), else_=literal_column("'{}'::json")))
    else:
        each = func.json_each(text, "$.labels")
    rows = each.table_valued("key", "value")
    written = rows.c.key.op("||")(":").op("||")(rows.c.value)
    return exists().select_from(rows).where(written == f"{label}:{value}")
