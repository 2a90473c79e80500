"""Eviction: every rule about what leaves the pool, and nothing else.

What needs room decides what may be taken for it. Blocks of KV that are only remembered for reuse
are free and always go first. Then, in this order::

    room for                 | is taken from                           | but never from
    -------------------------+-----------------------------------------+-------------------------
    the next block of a      | 1. idle prefixes [1]                    | kept prefixes [2]
    running sequence         | 2. the youngest compile, to start over  | kept prefixes
                             | 3. idle prefixes that are kept, if no   |
                             |    other sequence runs                  |
                             | 4. the youngest running sequence, which |
                             |    is preempted (by the scheduler)      |
    the start of a sequence  | idle prefixes [1]; those that are kept  | its own prefix; reserved
                             | too, if nothing runs                    | headroom [3]
    a prefix, not overdue    | idle prefixes without waiters           | kept prefixes
    an overdue prefix, which | 1. prefixes without waiters, idle first | unused prefixes with
    forces its way in        | 2. prefixes with waiters, idle first    | waiters; pins, unless it
                             | 3. pins                                 | cannot fit next to them
                             | Those still in use are LEAVING: no      |
                             | sequence starts under them meanwhile    |
    a tenant's cap           | the tenant's own prefixes, by the rules | other tenants' prefixes
                             | of the two rows above                   |
    a place among those that | a staged prefix that no sequence waits  |
    are loading              | for, or that the last step passed over  |

Always: a prefix that is loading and has no claim is dropped; a retired one (deleted or replaced)
leaves when it has no claim and no running sequence.

[1] Least recently used first among equals: without waiters, then with waiters but used, then
    unused with waiters, then pinned.
[2] Pinned, LEAVING (its room is promised), or forced in and not yet used by its waiters.
[3] One block for each running sequence, so that none starts only to be preempted; and the blocks
    promised to an overdue prefix, except for the first use of a prefix that has just come in.
"""

from dataclasses import dataclass

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.residency import Entry, Stage
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Step


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """Which prefixes would leave for another, and whether that makes enough room for it."""

    victims: list[Entry]
    is_enough: bool
    lacks_blocks: bool


class EvictionPolicy:
    """Chooses what leaves the pool, and evicts it.

    ``retired`` versions were deleted or replaced: each leaves as soon as it is not needed.
    """

    def __init__(self, config: SchedulerConfig, *, memory: Memory) -> None:
        self._config = config
        self._memory = memory
        self._residency = memory.residency
        self.retired: set[PrefixKey] = set()

    # -- room for sequences ----

    def room_to_start(
        self, step: Step, sequence: Sequence, reused: list[int], *, num_running: int, promised: int
    ) -> bool:
        """Make room for ``sequence`` to start, if that is possible within the headroom [3].

        ``promised`` blocks are kept for an overdue prefix. Of the ``reused`` blocks those held by
        running sequences take no room.
        """
        pool = self._memory.pool
        held = sum(pool.references(block) > 0 for block in reused)
        need = self._memory.own_blocks(sequence) - held
        headroom = num_running
        if num_running and not self._is_first_use(sequence):
            headroom += promised
        if pool.num_free >= need + headroom:
            return True
        idle = self._evictable(sequence, kept=not num_running)
        room = pool.num_free + sum(len(entry.blocks) for entry in idle)
        return room >= need + headroom and self._evict_until(step, idle, need)

    def room_for_block(self, step: Step, *, alone: bool) -> bool:
        """Make sure that a block is free; ``alone``: only one sequence runs.

        Called before any compile is planned in ``step``: a planned one must keep its blocks.
        """
        if self._memory.pool.num_free:
            return True
        if self._evict_until(step, self._evictable(None, kept=False), 1):
            return True
        compiling = [e for e in self._residency.compiling() if alone or not self._is_kept(e)]
        if compiling:
            self._residency.unplace(compiling[-1])
        elif alone:
            self._evict_until(step, self._evictable(None, kept=True), 1)
        return self._memory.pool.num_free > 0

    def _is_first_use(self, sequence: Sequence) -> bool:
        entry = self._residency.get(sequence.prefix.key) if sequence.prefix else None
        return entry is not None and not entry.num_uses

    def _evictable(self, sequence: Sequence | None, *, kept: bool) -> list[Entry]:
        """Idle prefixes in the order [1], without the one of ``sequence``, and without those that
        are kept [2] unless ``kept``."""
        own = sequence.prefix.key if sequence is not None and sequence.prefix else None
        waiters, pins = self._residency.waiters, self._residency.pins
        return sorted(
            (
                entry
                for entry in self._residency.resident()
                if entry.idle and entry.key != own and (kept or not self._is_kept(entry))
            ),
            key=lambda entry: (
                entry.key in pins,
                entry.key in waiters and not entry.num_uses,
                entry.key in waiters,
            ),
        )

    def _is_kept(self, entry: Entry) -> bool:
        residency, is_leaving = self._residency, entry.stage is Stage.LEAVING
        return is_leaving or entry.key in residency.pins or residency.is_reserved(entry)

    def _evict_until(self, step: Step, idle: list[Entry], num_free: int) -> bool:
        """Evict from the front of ``idle`` until ``num_free`` blocks are free. Evicts none and
        returns False when all of them are not enough."""
        pool = self._memory.pool
        if pool.num_free + sum(len(entry.blocks) for entry in idle) < num_free:
            return False
        for entry in idle:
            if pool.num_free >= num_free:
                break
            self.evict(step, entry)
        return True

    # -- room for prefixes ----

    def plan_for(
        self, entry: Entry, *, cap: int | None, forces: bool, promised: Entry | None = None
    ) -> EvictionPlan:
        """Choose the prefixes that leave for ``entry``, so that it fits the pool, the budget and
        its tenant's ``cap``. Room that is ``promised`` to another prefix is not free.

        One that ``forces`` follows the rules of an overdue prefix.
        """
        residency, budget = self._residency, self._config.max_resident_tokens
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
        candidates = self._overdue_candidates(entry, cap) if forces else self._candidates()
        for own in candidates:
            if over_cap > 0 and own.key.tenant == tenant:
                victims.append(own)
                over_cap -= own.num_tokens
        if over_cap > 0:
            return EvictionPlan(victims, is_enough=False, lacks_blocks=False)
        over_budget -= sum(victim.num_tokens for victim in victims)
        lacking -= sum(len(victim.blocks) for victim in victims)
        for candidate in candidates:
            if over_budget <= 0 and lacking <= 0:
                break
            if candidate not in victims:
                victims.append(candidate)
                over_budget -= candidate.num_tokens
                lacking -= len(candidate.blocks)
        is_enough = over_budget <= 0 and lacking <= 0
        return EvictionPlan(victims, is_enough=is_enough, lacks_blocks=lacking > 0)

    def _candidates(self) -> list[Entry]:
        waiters = self._residency.waiters
        return [e for e in self._evictable(None, kept=False) if e.key not in waiters]

    def _overdue_candidates(self, entry: Entry, cap: int | None) -> list[Entry]:
        waiters, pins = self._residency.waiters, self._residency.pins
        spared = self._spared_pins(entry, cap)
        return sorted(
            (
                candidate
                for candidate in self._residency.resident()
                if candidate.key not in spared
                and (candidate.num_uses or candidate.key not in waiters)
            ),
            key=lambda candidate: (
                candidate.key in pins,
                candidate.key in waiters,
                not candidate.idle,
            ),
        )

    def _spared_pins(self, entry: Entry, cap: int | None) -> set[PrefixKey]:
        """Pins that stay even for an overdue prefix: all, unless it can never fit next to them."""
        budget, tenant = self._config.max_resident_tokens, entry.key.tenant
        pins = [pin for pin in self._residency.pins.values() if pin.key != entry.key]
        sizes = [entry.num_tokens, *(pin.num_tokens for pin in pins)]
        blocks = sum(map(self._config.blocks_needed, sizes))
        if blocks > self._config.num_usable_blocks or (budget is not None and sum(sizes) > budget):
            return set()
        own = entry.num_tokens + sum(p.num_tokens for p in pins if p.key.tenant == tenant)
        over_cap = cap is not None and own > cap
        return {pin.key for pin in pins if not (over_cap and pin.key.tenant == tenant)}

    # -- prefixes that are no longer needed ----

    def drop_stalled(self, *, last_step: int) -> bool:
        """Drop one staged prefix that no sequence waits for, or that was last requested before
        ``last_step``; False: there is none."""
        for entry in self._residency.staged_entries():
            if entry.requested_at < last_step or entry.key not in self._residency.waiters:
                self._residency.drop(entry)
                return True
        return False

    def drop_unclaimed(self) -> None:
        """Drop what has lost its last claim: prefixes that are loading, and retired ones."""
        for entry in [*self._residency.staged_entries(), *self._residency.compiling()]:
            if not self._residency.is_claimed(entry.key):
                self._residency.drop(entry)
        for key in list(self.retired):
            retired = self._residency.get(key)
            in_use = retired is not None and not retired.idle
            if in_use or self._residency.is_claimed(key):
                continue
            self.retired.discard(key)
            self._memory.host.drop(key)
            if retired is not None:
                self._residency.evict(retired)

    def evict(self, step: Step, entry: Entry) -> None:
        """Evict an idle prefix, to the host tier unless it is retired."""
        self._memory.evict(step, entry, save=entry.key not in self.retired)
