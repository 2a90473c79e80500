"""Who leaves the pool for a prefix that comes: a choice, performed by others."""

from collections.abc import Mapping
from dataclasses import dataclass

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.residency import Entry

Pins = Mapping[PrefixKey, PrefixHandle]


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """Who would leave for a prefix, and whether that makes room for it."""

    victims: list[Entry]
    is_enough: bool
    lacks_blocks: bool


class EvictionPolicy:
    """Chooses among resident prefixes, the least recently used first."""

    def __init__(self, config: SchedulerConfig, *, memory: Memory, waiting: FairQueue) -> None:
        self._config = config
        self._memory = memory
        self._waiting = waiting

    def choose(
        self,
        entry: Entry,
        *,
        cap: int | None,
        pins: Pins,
        forces: bool,
        promised: Entry | None = None,
    ) -> EvictionPlan:
        """Whose leaving makes room for ``entry`` in the pool, under the budget and under its
        tenant's ``cap``. For the cap only the tenant's own leave. Room that another one was
        ``promised`` is none.

        One that ``forces`` may take any but those that were not used yet; another only idle ones
        that nobody waits for.
        """
        residency, budget = self._memory.residency, self._config.max_resident_tokens
        tenant, size = entry.key.tenant, entry.num_tokens
        over_cap = 0 if cap is None else residency.tokens_of(tenant) + size - cap
        over_budget = 0 if budget is None else residency.num_tokens + size - budget
        lacking = residency.blocks_needed(size) - self._memory.pool.num_free
        if promised is not None:
            over_budget += 0 if budget is None else promised.num_tokens
            lacking += residency.blocks_needed(promised.num_tokens)
        if max(over_cap, over_budget, lacking) <= 0:
            return EvictionPlan([], is_enough=True, lacks_blocks=False)
        victims: list[Entry] = []
        candidates = self._candidates(entry, cap=cap, pins=pins, forces=forces)
        for own in candidates:
            if over_cap > 0 and own.key.tenant == tenant:
                victims.append(own)
                over_cap -= own.num_tokens
        if over_cap > 0:
            return EvictionPlan(victims, is_enough=False, lacks_blocks=False)
        over_budget -= sum(victim.num_tokens for victim in victims)
        lacking -= sum(len(victim.blocks) for victim in victims)
        for other in candidates:
            if over_budget <= 0 and lacking <= 0:
                break
            if other not in victims:
                victims.append(other)
                over_budget -= other.num_tokens
                lacking -= len(other.blocks)
        return EvictionPlan(
            victims, is_enough=over_budget <= 0 and lacking <= 0, lacks_blocks=lacking > 0
        )

    def _candidates(
        self, entry: Entry, *, cap: int | None, pins: Pins, forces: bool
    ) -> list[Entry]:
        """Prefixes that may leave for ``entry``, the best to lose first."""
        wanted = self._waiting.wants
        if not forces:
            idle = self._memory.evictable(None, desperate=False)
            return [other for other in idle if not wanted(other.key)]
        spared = self._spared(entry, cap=cap, pins=pins)
        return sorted(
            (
                other
                for other in self._memory.residency.resident()
                if other.key not in spared and not (other.unused and wanted(other.key))
            ),
            key=lambda other: (other.key in pins, wanted(other.key), not other.idle),
        )

    def _spared(self, entry: Entry, *, cap: int | None, pins: Pins) -> set[PrefixKey]:
        """Pins that stay even for an overdue prefix: all but those beside which it never fits."""
        budget, tenant = self._config.max_resident_tokens, entry.key.tenant
        others = [pin for pin in pins.values() if pin.key != entry.key]
        sizes = [entry.num_tokens, *(pin.num_tokens for pin in others)]
        blocks = sum(map(self._config.blocks_needed, sizes))
        if blocks > self._config.num_usable_blocks or (budget is not None and sum(sizes) > budget):
            return set()
        own = entry.num_tokens + sum(p.num_tokens for p in others if p.key.tenant == tenant)
        tight = cap is not None and own > cap
        return {pin.key for pin in others if not (tight and pin.key.tenant == tenant)}
