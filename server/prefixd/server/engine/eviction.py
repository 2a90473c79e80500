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
    forces its way in        | 2. prefixes with waiters, idle first    | waiters [6]; pins, unless
                             | 3. pins                                 | it cannot fit next to them
                             |                                         | [5]
                             | Those still in use are LEAVING: no      |
                             | sequence starts under them meanwhile    |
    a tenant's cap           | the tenant's own prefixes, by the rules | other tenants' prefixes
                             | of the two rows above                   |
    a place among those that | a staged prefix that no sequence waits  | one of more urgency (see
    are loading              | for, that the last step passed over, or | ``residency``)
                             | that is less urgent                     |

Before all of that, sequences of the background class yield: the youngest is preempted, until
there is room or none runs; then their prefixes that compile start over. For their own needs::

    room for                 | is taken from                           | but never from
    -------------------------+-----------------------------------------+-------------------------
    a block, a start or a    | idle prefixes [1]                       | the foreground; kept
    prefix                   |                                         | prefixes, waited for or
                             |                                         | unused with waiters [4]

Always: a prefix that is loading and has no claim is dropped; a retired one (deleted or replaced)
leaves when it has no claim and no running sequence.

[1] Least recently used first among equals: without waiters, then with waiters but used, then
    unused with waiters, then pinned.
[2] Pinned, LEAVING (its room is promised), or forced in and not yet used by its waiters.
[3] One block for each running sequence, so that none starts only to be preempted; and the blocks
    promised to an overdue prefix, except for the first use of a prefix that has just come in.
[4] Unless nothing of the foreground is alive, and nothing else of the background class runs.
[5] With the other prefixes of an ensemble, which it needs at the same time.
[6] That only ensembles wait for, other than the one that gathers its prefixes, count as used; those
    of that one never leave.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Entry, Stage
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.residency import Urgency
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Step


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """Which prefixes would leave for another, and whether that makes enough room for it."""

    victims: list[Entry]
    is_enough: bool
    lacks_blocks: bool

    @property
    def is_usable(self) -> bool:
        """Whether it makes enough room at once."""
        return self.is_enough and all(victim.idle for victim in self.victims)


class EvictionPolicy:
    """Chooses what leaves the pool, and evicts it.

    ``retired`` versions were deleted or replaced: each leaves as soon as it is not needed.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        memory: Memory,
        yield_blocks: Callable[[], bool] = lambda: False,
    ) -> None:
        """``yield_blocks()``: take blocks from the background class; False: it holds none."""
        self._config = config
        self._yield_blocks = yield_blocks
        self._memory = memory
        self._residency = memory.residency
        self.retired: set[PrefixKey] = set()

    # -- room for sequences ----

    def room_to_start(
        self,
        step: Step,
        sequence: Sequence,
        reused: Iterable[int],
        *,
        num_running: int,
        promised: int,
        kept: bool,
    ) -> bool:
        """Make room for all rows of ``sequence`` to start, if that is possible within the headroom
        [3].

        ``promised`` blocks are reserved for an overdue prefix. Of the ``reused`` blocks those held
        by running sequences take no room. ``kept``: kept prefixes may leave for it.
        """
        pool = self._memory.pool
        need = self._need(sequence, reused)
        headroom = num_running
        if num_running and not self._memory.is_first_use(sequence):
            headroom += promised
        while pool.num_free < need + headroom and not sequence.background and self._yield_blocks():
            need = self._need(sequence, reused)
        if pool.num_free >= need + headroom:
            return True
        idle = self._evictable(sequence, kept=kept)
        if sequence.background and not kept:
            idle = filter(self._is_spare, idle)
        victims = self._enough(idle, need + headroom - pool.num_free)
        if victims is None:
            return False
        self._evict_until(step, victims, need)
        return True

    def _need(self, sequence: Sequence, reused: Iterable[int]) -> int:
        held = sum(self._memory.pool.references(block) > 0 for block in reused)
        return sum(map(self._memory.blocks_to_start, sequence.rows)) - held

    def room_for_block(self, step: Step, *, alone: bool) -> bool:
        """Make sure that a block is free; ``alone``: only one sequence runs.

        Called before any compile is planned in ``step``: a planned one must keep its blocks.
        """
        while not self._memory.pool.num_free and self._yield_blocks():
            pass
        if self._memory.pool.num_free:
            return True
        if self._evict_one(step, kept=False):
            return True
        compiling = [e for e in self._residency.compiling() if alone or not self._is_kept(e)]
        if compiling:
            self._residency.unplace(compiling[-1])
        elif alone:
            self._evict_one(step, kept=True)
        return self._memory.pool.num_free > 0

    def room_for_background_block(self, step: Step, *, alone: bool) -> bool:
        """Make sure that a block is free for a sequence of the background class; ``alone``: nothing
        else runs, and nothing of the foreground waits. Called before any of its compiles is
        planned in ``step``."""
        if self._memory.pool.num_free:
            return True
        idle = self._evictable(None, kept=alone)
        victim = next(idle if alone else filter(self._is_spare, idle), None)
        if victim is not None:
            self.evict(step, victim)
            return True
        compiling = [e for e in self._residency.compiling() if not self._is_wanted(e)]
        if compiling:
            self._residency.unplace(compiling[-1])
        return self._memory.pool.num_free > 0

    def _is_wanted(self, entry: Entry) -> bool:
        return self._residency.is_wanted(entry.key)

    def _is_spare(self, entry: Entry) -> bool:
        """Whether a prefix may leave for the background class, as far as waiters are concerned."""
        is_new = not entry.num_uses and entry.key in self._residency.background_waiters
        return not is_new and entry.key not in self._residency.waiters

    def _evictable(self, sequence: Sequence | None, *, kept: bool) -> Iterator[Entry]:
        """Idle prefixes in the order [1], without those of ``sequence``, and without those that
        are kept [2] unless ``kept``. None may be evicted before the iteration has ended."""
        rows = () if sequence is None else sequence.rows
        own = {row.prefix.key for row in rows if row.prefix is not None}
        waiters = self._residency.waiters
        waited = []
        for entry in self._residency.order.idle():
            if entry.key in own or not (kept or not self._is_kept(entry)):
                continue
            if entry.key in waiters:
                waited.append(entry)
            else:
                yield entry
        yield from sorted(waited, key=lambda entry: not entry.num_uses)
        if kept:
            pinned = [e for e in self._residency.pinned() if e.idle and e.key not in own]
            yield from sorted(
                pinned, key=lambda e: (e.key in waiters and not e.num_uses, e.key in waiters)
            )

    def _is_kept(self, entry: Entry) -> bool:
        residency, is_leaving = self._residency, entry.stage is Stage.LEAVING
        return is_leaving or entry.key in residency.pins or residency.is_reserved(entry)

    @staticmethod
    def _enough(idle: Iterator[Entry], num_blocks: int) -> list[Entry] | None:
        """The first of ``idle`` that hold ``num_blocks``; None when all of them do not."""
        victims = []
        while num_blocks > 0:
            entry = next(idle, None)
            if entry is None:
                return None
            victims.append(entry)
            num_blocks -= entry.num_blocks
        return victims

    def _evict_until(self, step: Step, victims: list[Entry], num_free: int) -> None:
        """Evict from the front of ``victims`` until ``num_free`` blocks are free."""
        for entry in victims:
            if self._memory.pool.num_free >= num_free:
                break
            self.evict(step, entry)

    def _evict_one(self, step: Step, *, kept: bool) -> bool:
        """Evict the first of ``_evictable``; False: there is none."""
        entry = next(self._evictable(None, kept=kept), None)
        if entry is None:
            return False
        self.evict(step, entry)
        return True

    # -- room for prefixes ----

    def plan_for(
        self,
        entry: Entry,
        *,
        cap: int | None,
        forces: bool,
        promised: Entry | None = None,
        spares: bool = False,
    ) -> EvictionPlan:
        """Choose the prefixes that leave for ``entry``, so that it fits the pool, the budget and
        its tenant's ``cap``. Room that is ``promised`` to another prefix is not free.

        One that ``forces`` follows the rules of an overdue prefix. One that ``spares`` leaves those
        in place that the background class waits for and has not used.
        """
        residency, budget = self._residency, self._config.max_resident_tokens
        tenant, size = entry.key.tenant, entry.num_tokens
        over_cap = 0 if cap is None else residency.tokens_of(tenant) + size - cap
        over_budget = 0 if budget is None else residency.num_tokens + size - budget
        lacking = self._config.prefix_blocks(size) - self._memory.pool.num_free
        if promised is not None:
            over_budget += 0 if budget is None else promised.num_tokens
            lacking += self._config.prefix_blocks(promised.num_tokens)
        if max(over_cap, over_budget, lacking) <= 0:
            return EvictionPlan([], is_enough=True, lacks_blocks=False)
        victims: dict[PrefixKey, Entry] = {}
        candidates = partial(self._overdue_candidates, entry, cap) if forces else self._candidates
        is_candidate = self._is_spare if spares else _is_any
        if over_cap > 0:
            for own in filter(is_candidate, candidates(tenant)):
                victims[own.key] = own
                over_cap -= own.num_tokens
                if over_cap <= 0:
                    break
            else:
                return EvictionPlan(list(victims.values()), is_enough=False, lacks_blocks=False)
        over_budget -= sum(victim.num_tokens for victim in victims.values())
        lacking -= sum(victim.num_blocks for victim in victims.values())
        if max(over_budget, lacking) > 0:
            for candidate in filter(is_candidate, candidates(None)):
                if candidate.key not in victims:
                    victims[candidate.key] = candidate
                    over_budget -= candidate.num_tokens
                    lacking -= candidate.num_blocks
                    if max(over_budget, lacking) <= 0:
                        break
        is_enough = max(over_budget, lacking) <= 0
        return EvictionPlan(list(victims.values()), is_enough=is_enough, lacks_blocks=lacking > 0)

    def _candidates(self, tenant: str | None) -> Iterator[Entry]:
        """Idle prefixes, of one tenant or of all, that may leave for one that is not overdue."""
        waiters = self._residency.waiters
        for entry in self._residency.order.idle(tenant):
            if entry.key not in waiters and not self._is_kept(entry):
                yield entry

    def _overdue_candidates(
        self, entry: Entry, cap: int | None, tenant: str | None
    ) -> Iterator[Entry]:
        """Prefixes, of one tenant or of all, that may leave for ``entry``, which is overdue."""
        waiters, order = self._residency.waiters, self._residency.order
        waited = []
        for candidate in chain(order.idle(tenant), order.busy(tenant)):
            if candidate.key not in waiters:
                yield candidate
            elif self._may_be_displaced(candidate):
                waited.append(candidate)
        yield from waited
        pinned = [
            candidate
            for candidate in self._displaced_pins(entry, cap)
            if self._may_be_displaced(candidate) and tenant in {None, candidate.key.tenant}
        ]
        yield from sorted(pinned, key=lambda each: (each.key in waiters, not each.idle))

    def _may_be_displaced(self, entry: Entry) -> bool:
        urgency = self._residency.urgency(entry.key)
        return urgency < Urgency.GATHERED and (entry.num_uses > 0 or urgency < Urgency.ALONE)

    def _displaced_pins(self, entry: Entry, cap: int | None) -> list[Entry]:
        """Pins that may leave for an overdue prefix: none, unless it can never fit next to them,
        together with those that are gathered with it."""
        residency, budget = self._residency, self._config.max_resident_tokens
        sizes, prefix_blocks = residency.pin_sizes, self._config.prefix_blocks
        added, blocks = 0, 0
        together = residency.gathered if entry.key in residency.gathered else {}
        for key, num_tokens in {**together, entry.key: entry.num_tokens}.items():
            own = residency.pins.get(key)
            added += num_tokens - (own.num_tokens if own else 0)
            blocks += prefix_blocks(num_tokens) - (prefix_blocks(own.num_tokens) if own else 0)
        fits = sizes.blocks + blocks <= self._config.num_usable_blocks
        fits = fits and (budget is None or sizes.tokens + added <= budget)
        tenant = entry.key.tenant
        over_cap = cap is not None and sizes.by_tenant[tenant] + added > cap
        if fits and not over_cap:
            return []
        return [pin for pin in residency.pinned() if not fits or pin.key.tenant == tenant]

    # -- prefixes that are no longer needed ----

    def drop_stalled(self, *, last_step: int, urgency: Urgency) -> bool:
        """Drop one staged prefix that no sequence waits for, or that was last requested before
        ``last_step``, or is needed with less ``urgency``; False: there is none."""
        residency = self._residency
        for entry in residency.staged_entries():
            is_less = residency.urgency(entry.key) < urgency
            if entry.requested_at < last_step or entry.key not in residency.waiters or is_less:
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
            # What is saved now would come to the host tier later.
            if in_use or self._residency.is_claimed(key) or key in self._memory.saving:
                continue
            self.retired.discard(key)
            self._memory.host.drop(key)
            if retired is not None:
                self._residency.evict(retired)

    def evict(self, step: Step, entry: Entry) -> None:
        """Evict an idle prefix, to the host tier unless it is retired."""
        self._memory.evict(step, entry, save=entry.key not in self.retired)


def _is_any(_entry: Entry) -> bool:
    return True
