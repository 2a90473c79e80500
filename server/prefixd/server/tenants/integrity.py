"""Whether bindings, default prefixes and batches refer to something, checked while servers change
them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, Row, and_, select

from prefixd.server.tenants.batch_state import OPEN
from prefixd.server.tenants.tables import batches, bindings, tenants
from prefixd.store.catalog.tables import files
from prefixd.store.errors import InvalidReference
from prefixd.store.integrity import Finding, Problem, pages, resolvable
from prefixd.store.names import Reference, parse_reference

_PAGE = 500


class BindingIntegrity:
    """Checks that every binding and default prefix means a version, of any base, and that every
    batch that has not ended has its input.

    A tenant may delete a prefix that users are bound to: their requests get 404 until it is
    uploaded again or they are bound to another one. Such a binding is a finding too.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.counts = Counter(bindings=0, default_prefixes=0, open_batches=0)

    def findings(self) -> Iterator[Finding]:
        """Every binding and default without a target. Holds one page of rows at a time."""
        order = (bindings.c.tenant, bindings.c.user_id)
        bound = select(*order, bindings.c.reference).order_by(*order).limit(_PAGE)
        yield from pages(self._engine, bound, order, self._check_bindings)
        defaults = (
            select(tenants.c.name, tenants.c.default_prefix)
            .where(tenants.c.default_prefix.is_not(None))
            .order_by(tenants.c.name)
            .limit(_PAGE)
        )
        yield from pages(self._engine, defaults, (tenants.c.name,), self._check_defaults)
        inputs = (
            select(
                batches.c.id, batches.c.tenant, batches.c.input_file_id, files.c.id.label("file")
            )
            .outerjoin_from(
                batches,
                files,
                and_(files.c.id == batches.c.input_file_id, files.c.tenant == batches.c.tenant),
            )
            .where(batches.c.status.in_(OPEN))
            .order_by(batches.c.id)
            .limit(_PAGE)
        )
        yield from pages(self._engine, inputs, (batches.c.id,), self._check_inputs)

    def _check_bindings(
        self, connection: Connection, rows: Sequence[Row[Any]]
    ) -> Iterable[Finding]:
        self.counts["bindings"] += len(rows)
        subjects = [
            (row.tenant, f"the binding of the user {row.user_id!a}", row.reference) for row in rows
        ]
        return list(_without_target(connection, subjects))

    def _check_defaults(
        self, connection: Connection, rows: Sequence[Row[Any]]
    ) -> Iterable[Finding]:
        self.counts["default_prefixes"] += len(rows)
        subjects = [(row.name, "the default prefix", row.default_prefix) for row in rows]
        return list(_without_target(connection, subjects))

    def _check_inputs(self, _: Connection, rows: Sequence[Row[Any]]) -> Iterable[Finding]:
        self.counts["open_batches"] += len(rows)
        return [
            Finding(
                Problem.TARGET_MISSING,
                row.tenant,
                f"the batch {row.id}",
                f"its input {row.input_file_id} does not exist",
            )
            for row in rows
            if row.file is None
        ]


def _without_target(
    connection: Connection, subjects: Iterable[tuple[str, str, str]]
) -> Iterator[Finding]:
    """Findings among subjects of a tenant, each with the reference that it stores."""
    by_tenant: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for tenant, subject, reference in subjects:
        by_tenant[tenant].append((subject, reference))
    for tenant, members in by_tenant.items():
        parsed = {reference: _parsed(reference) for _, reference in members}
        wanted = [reference for reference in parsed.values() if reference is not None]
        known = resolvable(connection, tenant, wanted)
        for subject, reference in members:
            if parsed[reference] not in known:
                detail = f"{reference!a} means no version; bind another one or upload it"
                yield Finding(Problem.TARGET_MISSING, tenant, subject, detail)


def _parsed(reference: str) -> Reference | None:
    """None for a malformed one."""
    try:
        return parse_reference(reference)
    except InvalidReference:
        return None
