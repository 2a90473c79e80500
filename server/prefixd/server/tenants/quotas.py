"""Quotas and settings of a tenant, and the checks of stored and pinned prefixes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from sqlalchemy import Connection, Row, exists, func, select

from prefixd.server.errors import BadRequest, Conflict, QuotaExceeded
from prefixd.server.tenants.tables import tenants
from prefixd.store.catalog.pins import Pinned
from prefixd.store.catalog.tables import prefixes, versions

LEAST_WEIGHT = 0.01
MOST_WEIGHT = 100.0

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
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})

    @property
    def is_metered(self) -> bool:
        """Whether requests must be counted."""
        rates = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent_requests)
        return any(rate is not None for rate in rates)


QUOTAS = tuple(field.name for field in fields(Quota))
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


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """Settings of one tenant. The fields are columns of the table ``tenants``.

    ``weight`` is the tenant's share of a busy server: 2 gets twice as much as 1. ``kv_reuse``: its
    requests may share KV of equal tokens with each other.
    """

    weight: float = 1.0
    kv_reuse: bool = True


SETTINGS = tuple(field.name for field in fields(TenantSettings))


def checked_settings(changes: Mapping[str, float | bool]) -> dict[str, float | bool]:
    """``changes`` by name. Raises BadRequest for an unknown name or a value out of range."""
    for name, value in changes.items():
        if name not in SETTINGS:
            raise BadRequest(f"expected one of {', '.join(SETTINGS)}; received {name[:80]!a}")
        if name == "kv_reuse" and not isinstance(value, bool):
            raise BadRequest(f"expected kv_reuse to be true or false; received {value}", param=name)
        if name == "weight" and not _is_weight(value):
            raise BadRequest(
                f"expected a weight from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}; received {value}",
                param=name,
            )
    return dict(changes)


def _is_weight(value: float) -> bool:
    # JSON's true is Python's 1, and NaN is in no range.
    return not isinstance(value, bool) and LEAST_WEIGHT <= value <= MOST_WEIGHT


def check_stored(connection: Connection, tenant: str, quota: Quota) -> None:
    """Raise QuotaExceeded when ``tenant`` has more prefixes or bytes than its quota.

    To be called at the end of the transaction that added them: it locks the tenant's row, so that
    the second of two concurrent publishes counts what the first added.
    """
    if quota.max_prefixes is None and quota.max_bytes is None:
        return
    row = select(tenants.c.name).where(tenants.c.name == tenant)
    connection.execute(row.with_for_update())
    if quota.max_prefixes is not None:
        names = select(func.count()).select_from(prefixes)
        has_version = exists().where(versions.c.prefix_id == prefixes.c.id)
        existing = (prefixes.c.tenant == tenant, has_version)
        count = connection.execute(names.where(*existing)).scalar_one()
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
    """The part of a pool for pins of all tenants: ``tokens`` positions, in whole blocks."""

    tokens: int
    block_size: int

    def taken_by(self, num_virtual_tokens: int) -> int:
        """Positions of the blocks that hold so many virtual tokens."""
        return -(-num_virtual_tokens // self.block_size) * self.block_size


def check_pinned(pinned: Iterable[Pinned], tenant: str, quota: Quota, *, room: PinRoom) -> None:
    """Check the pins of all tenants, with the new one of ``tenant``. Raise QuotaExceeded when the
    tenant's own exceed its quota, Conflict when all together exceed ``room``."""
    pins = tuple(pinned)
    own = sum(pin.num_virtual_tokens for pin in pins if pin.key.tenant == tenant)
    if quota.max_resident_tokens is not None and own > quota.max_resident_tokens:
        raise QuotaExceeded(
            f"the tenant may keep {quota.max_resident_tokens} virtual tokens resident and would "
            f"have {own} pinned; unpin a prefix first",
            param="max_resident_tokens",
        )
    total = sum(room.taken_by(pin.num_virtual_tokens) for pin in pins)
    if total > room.tokens:
        raise Conflict(
            f"the server keeps {room.tokens} positions for pinned prefixes and would need "
            f"{total}; unpin a prefix first",
            code="pins_full",
        )


def pins_that_fit(
    pinned: Iterable[Pinned], caps: Mapping[str, int], room: PinRoom
) -> tuple[Pinned, ...]:
    """As many of ``pinned``, in that order, as fit now: limits may be lower than when they were
    pinned, or differ between servers. ``caps`` are the limits of tenants that have one."""
    kept: list[Pinned] = []
    free, remaining = room.tokens, dict(caps)
    for pin in pinned:
        needed, cap = room.taken_by(pin.num_virtual_tokens), remaining.get(pin.key.tenant)
        if needed > free or (cap is not None and pin.num_virtual_tokens > cap):
            continue
        kept.append(pin)
        free -= needed
        if cap is not None:
            remaining[pin.key.tenant] = cap - pin.num_virtual_tokens
    return tuple(kept)
