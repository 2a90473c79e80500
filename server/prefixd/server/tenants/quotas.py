"""What a tenant may have: limits as a value, and the check of those on stored prefixes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from sqlalchemy import Connection, Row, func, select

from prefixd.server.errors import BadRequest, Conflict, QuotaExceeded
from prefixd.server.tenants.tables import tenants
from prefixd.store.catalog.pins import Pinned
from prefixd.store.catalog.tables import prefixes, versions

_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one tenant; None is no limit. The fields are columns of the table ``tenants``."""

    max_prefixes: int | None = None
    max_bytes: int | None = None
    max_virtual_tokens: int | None = None
    max_resident_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """From a row that has the columns of ``tenants``."""
        return cls(**{one.name: getattr(row, one.name) for one in fields(cls)})

    @property
    def is_metered(self) -> bool:
        """Whether requests must be counted."""
        rates = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent_requests)
        return any(rate is not None for rate in rates)


QUOTAS = tuple(one.name for one in fields(Quota))
_RATES = frozenset({"requests_per_minute", "tokens_per_minute", "max_concurrent_requests"})


def checked_quota(changes: Mapping[str, int | None]) -> dict[str, int | None]:
    """``changes`` by name. Raises BadRequest for an unknown name or a value out of range."""
    for name, value in changes.items():
        if name not in QUOTAS:
            raise BadRequest(f"expected one of {', '.join(QUOTAS)}; received {name[:80]!a}")
        lowest = 1 if name in _RATES else 0
        if value is not None and not lowest <= value <= _LARGEST:
            raise BadRequest(
                f"expected {name} from {lowest}, or none for no limit; received {value}", param=name
            )
    return dict(changes)


def check_stored(connection: Connection, tenant: str, quota: Quota) -> None:
    """Raise QuotaExceeded when ``tenant`` has more prefixes or bytes than it may.

    To be called at the end of the transaction that added some: it locks the tenant's row, so that
    of two publishes at once the second counts what the first added.
    """
    if quota.max_prefixes is None and quota.max_bytes is None:
        return
    row = select(tenants.c.name).where(tenants.c.name == tenant)
    connection.execute(row.with_for_update())
    if quota.max_prefixes is not None:
        names = select(func.count()).select_from(prefixes)
        here = (prefixes.c.tenant == tenant, prefixes.c.latest_version.is_not(None))
        count = connection.execute(names.where(*here)).scalar_one()
        if count > quota.max_prefixes:
            raise QuotaExceeded(
                f"the tenant may have {quota.max_prefixes} prefixes and has them; delete one first",
                param="max_prefixes",
            )
    if quota.max_bytes is not None:
        blobs = (
            select(versions.c.digest, func.max(versions.c.size_bytes).label("size"))
            .where(versions.c.tenant == tenant)
            .group_by(versions.c.digest)
            .subquery()
        )
        total = connection.execute(select(func.coalesce(func.sum(blobs.c.size), 0))).scalar_one()
        if total > quota.max_bytes:
            raise QuotaExceeded(
                f"the tenant may store {quota.max_bytes} bytes and would store {total}; "
                "delete a prefix first",
                param="max_bytes",
            )


@dataclass(frozen=True, slots=True)
class PinRoom:
    """What the pins of all tenants may take of a pool: ``tokens`` positions, in whole blocks."""

    tokens: int
    block_size: int

    def taken_by(self, num_virtual_tokens: int) -> int:
        """Positions of the blocks that so many virtual tokens are in."""
        return -(-num_virtual_tokens // self.block_size) * self.block_size


def check_pinned(found: Iterable[Pinned], tenant: str, quota: Quota, *, room: PinRoom) -> None:
    """``found`` is what all tenants have pinned, with what ``tenant`` just did. Raise QuotaExceeded
    when its own is more than it may keep resident, Conflict when all together is more than there is
    room for."""
    pins = tuple(found)
    own = sum(one.num_virtual_tokens for one in pins if one.key.tenant == tenant)
    if quota.max_resident_tokens is not None and own > quota.max_resident_tokens:
        raise QuotaExceeded(
            f"the tenant may keep {quota.max_resident_tokens} virtual tokens resident and would "
            f"have {own} pinned; unpin a prefix first",
            param="max_resident_tokens",
        )
    total = sum(room.taken_by(one.num_virtual_tokens) for one in pins)
    if total > room.tokens:
        raise Conflict(
            f"the server keeps {room.tokens} positions for pinned prefixes and would need "
            f"{total}; unpin a prefix first",
            code="pins_full",
        )


def pins_that_fit(
    found: Iterable[Pinned], caps: Mapping[str, int], room: PinRoom
) -> tuple[Pinned, ...]:
    """As many of ``found``, in that order, as there is room for now: limits may have been lowered
    since, and another server's may be others. ``caps`` are those of tenants that have one."""
    kept: list[Pinned] = []
    free, left = room.tokens, dict(caps)
    for one in found:
        takes, cap = room.taken_by(one.num_virtual_tokens), left.get(one.key.tenant)
        if takes > free or (cap is not None and one.num_virtual_tokens > cap):
            continue
        kept.append(one)
        free -= takes
        if cap is not None:
            left[one.key.tenant] = cap - one.num_virtual_tokens
    return tuple(kept)
