"""The room that pinned prefixes may take in the KV pool, of one tenant and of all together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from prefixd.server.errors import Conflict, QuotaExceeded
from prefixd.server.tenants.quotas import Quota
from prefixd.store.catalog.pins import Pinned


@dataclass(frozen=True, slots=True)
class PinRoom:
    """The part of a pool for pins of all tenants: ``tokens`` positions, in whole blocks.
    ``state_blocks`` are those of a prefix's state, where the base's layers keep one."""

    tokens: int
    block_size: int
    state_blocks: int = 0

    def taken_by(self, pin: Pinned) -> int:
        """Positions of the blocks that a pin keeps."""
        if not pin.num_in_front:
            return 0
        return (-(-pin.num_in_front // self.block_size) + self.state_blocks) * self.block_size


def check_pinned(pinned: Iterable[Pinned], tenant: str, quota: Quota, *, room: PinRoom) -> None:
    """Check the pins of all tenants, with the new one of ``tenant``. Raise QuotaExceeded when the
    tenant's own exceed its quota, Conflict when all together exceed ``room``."""
    pins = tuple(pinned)
    own = sum(pin.num_in_front for pin in pins if pin.key.tenant == tenant)
    if quota.max_resident_tokens is not None and own > quota.max_resident_tokens:
        raise QuotaExceeded(
            f"the tenant may keep {quota.max_resident_tokens} virtual tokens resident and would "
            f"have {own} pinned; unpin a prefix first",
            param="max_resident_tokens",
        )
    total = sum(room.taken_by(pin) for pin in pins)
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
        needed, cap = room.taken_by(pin), remaining.get(pin.key.tenant)
        if needed > free or (cap is not None and pin.num_in_front > cap):
            continue
        kept.append(pin)
        free -= needed
        if cap is not None:
            remaining[pin.key.tenant] = cap - pin.num_in_front
    return tuple(kept)
