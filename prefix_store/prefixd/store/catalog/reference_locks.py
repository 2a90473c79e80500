"""Locks for references that are about to be stored: none of their versions is deleted meanwhile."""

from collections.abc import Mapping

from sqlalchemy import Connection, select, tuple_

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.catalog.manifests import check_base, find
from prefixd.store.catalog.tables import prefixes, versions
from prefixd.store.names import parse_reference

_PAGE = 500


def lock_references(
    connection: Connection, tenant: str, resolved: Mapping[str, tuple[str, int]], *, base: BaseSpec
) -> None:
    """Lock the prefixes of references until the end of the transaction, so that no version of them
    is deleted before it.

    ``resolved`` has the name and the version that each reference meant before. Raises UnknownPrefix
    or BaseMismatch for a reference that means no version of ``base`` any more.
    """
    existing: set[tuple[str, int]] = set()
    pairs = sorted(set(resolved.values()))
    for begin in range(0, len(pairs), _PAGE):
        page = pairs[begin : begin + _PAGE]
        _lock(connection, tenant, {name for name, _ in page})
        statement = (
            select(prefixes.c.name, versions.c.version)
            .join_from(prefixes, versions, versions.c.prefix_id == prefixes.c.id)
            .where(prefixes.c.tenant == tenant)
            .where(tuple_(prefixes.c.name, versions.c.version).in_(page))
        )
        existing.update((row.name, row.version) for row in connection.execute(statement))
    for reference, version in resolved.items():
        if version not in existing:
            check_base(find(connection, tenant, parse_reference(reference), base=base), base)


def _lock(connection: Connection, tenant: str, names: set[str]) -> None:
    """Lock the rows of prefixes, by name, for readers that may share them."""
    statement = select(prefixes.c.id).where(
        prefixes.c.tenant == tenant, prefixes.c.name.in_(sorted(names))
    )
    connection.execute(statement.order_by(prefixes.c.name).with_for_update(read=True)).all()
