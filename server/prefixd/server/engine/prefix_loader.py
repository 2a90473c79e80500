"""Loading prefixes: which ones come into the pool, and when.

A prefix is loaded when a waiting sequence needs it, when it is preloaded and when it is pinned. Its
room comes from idle prefixes that no sequence waits for. Meanwhile requests for resident prefixes
keep running; but a sequence whose turn came more than ``max_prefix_wait_s`` ago forces its prefix
in, one prefix at a time: enough others become LEAVING, so that no sequence starts under them, and
are evicted when those that run have ended. A prefix that has come in is used at least once before
it can be forced out again. So two prefixes that do not fit together alternate, instead of evicting
each other unused. ``eviction`` has the rules of what leaves.

An ensemble needs several prefixes at a time. One ensemble at a time gathers them: it forces those
that are missing, and each stays until it starts. What only other ensembles wait for yields, or
two of them could each keep what the other needs.

The background class loads its prefixes with what is left of a step, in at most half of the places,
and forces none in. What the foreground loads does not wait for it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain

from prefixd.server.engine.background import Background
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Entry, Stage
from prefixd.server.engine.eviction import EvictionPlan, EvictionPolicy
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.prefix_source import CORRUPT_PREFIX, STORAGE_UNAVAILABLE, StagedPrefix
from prefixd.server.engine.preloads import MAX_PRELOADS, Preloads
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.sequence import Sequence, State
from prefixd.server.engine.step import CompileChunk, Step

_SHORT_MEMORY_S = 1.0
_REMEMBERED_FAILURES = 1024


class PrefixLoader:
    """Decides which prefixes are fetched, placed and compiled in a step.

    ``load`` is called for waiting sequences in fair order. ``forcing`` is the overdue prefix that
    others make room for, and ``promised`` the free blocks that are kept for it.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        memory: Memory,
        waiting: FairQueue,
        eviction: EvictionPolicy,
        background: Background,
    ) -> None:
        self._config = config
        self._memory = memory
        self._residency = memory.residency
        self._waiting = waiting
        self._eviction = eviction
        self._background = background
        self._step = 0
        self._tried: set[tuple[PrefixKey, bool]] = set()
        self._caps: Mapping[str, int] = {}
        self.preloads = Preloads(limit=MAX_PRELOADS)
        self._residency.preloads = self.preloads.pending.keys()
        self.failures: OrderedDict[PrefixKey, tuple[str, str | None, float]] = OrderedDict()
        self.forcing: PrefixKey | None = None
        self._gathering: Sequence | None = None
        self.promised = 0
        self.num_loads: Counter[str] = Counter()
        self.num_swaps = 0

    # -- claims from outside ----

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Load these prefixes and keep them, instead of those pinned before. ``caps``: virtual
        tokens that tenants may have in the pool, where that is limited."""
        self._residency.set_pins({handle.key: handle for handle in handles})
        self._caps = caps or {}

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Let versions that were deleted or replaced leave when their last sequence ends, with all
        rows of them that are here by themselves, and what they are a part of."""
        retired = {(key.tenant, key.digest) for key in keys}
        resident = (entry.key for entry in self._residency)
        held = chain(resident, self._memory.host, self._memory.saving)
        self._eviction.retired.update(
            key for key in held if any((key.tenant, digest) in retired for digest in key.digests)
        )

    def forget_failure(self, key: PrefixKey) -> None:
        """Let a prefix that failed be fetched again at once, also parts of it, and what it is a
        part of."""
        for failed in list(self.failures):
            if failed.tenant == key.tenant and {failed.digest, *failed.digests} & {key.digest}:
                del self.failures[failed]

    # -- results ----

    def staged(self, key: PrefixKey, payload: StagedPrefix) -> str | None:
        """A fetch succeeded. Returns why its payload is unusable, if it is."""
        entry = self._residency.get(key)
        if entry is None or entry.stage is not Stage.FETCHING:
            return None
        # Fewer than the request was admitted with: a text that was counted again. It fits.
        if payload.num_tokens > entry.num_tokens:
            return (
                f"the stored prefix has {payload.num_tokens} virtual tokens, its manifest says "
                f"{entry.num_tokens}"
            )
        self._residency.staged(entry, payload)
        return None

    def failed(self, key: PrefixKey, message: str, *, code: str | None, now: float) -> None:
        """A fetch or compile failed: drop the entry, and remember the failure for a while."""
        entry = self._residency.get(key)
        if entry is not None:
            self._residency.drop(entry)
        self.preloads.drop(key)
        memory_s = self._config.failed_prefix_memory_s
        if code in {CORRUPT_PREFIX, STORAGE_UNAVAILABLE}:  # the store refuses both at once
            memory_s = min(memory_s, _SHORT_MEMORY_S)
        self.failures[key] = message, code, now + memory_s
        self.failures.move_to_end(key)
        while len(self.failures) > _REMEMBERED_FAILURES:
            self.failures.popitem(last=False)

    def failure(self, key: PrefixKey, *, now: float) -> tuple[str, str | None] | None:
        """Message and code of a recent failure to load ``key``; None when there was none."""
        failure = self.failures.get(key)
        if failure is None:
            return None
        message, code, until = failure
        if now < until:
            return message, code
        del self.failures[key]
        return None

    def compiled(self, part: CompileChunk) -> None:
        """A step has compiled ``part``. It counts for nothing if the entry has lost its blocks
        since: they would be another list."""
        entry = self._residency.get(part.key)
        if entry is None or entry.blocks is not part.block_table:
            return
        if part.stop == entry.num_tokens:
            self._residency.compiled(entry)

    def saved(self, payloads: dict[PrefixKey, StagedPrefix]) -> None:
        """Evicted prefixes arrived in host memory."""
        for key, payload in payloads.items():
            self._memory.saving.discard(key)
            if key not in self._eviction.retired:
                self._memory.host.put(key, payload)

    # -- within a step ----

    def start_step(self, *, now: float) -> None:
        """Drop what has become pointless since the last step."""
        self._step += 1
        if self._tried:
            self._tried.clear()
        if self.preloads.pending:
            for preload in self.preloads:
                entry = self._residency.get(preload.handle.key)
                if now >= preload.until or (entry is not None and entry.is_compiled):
                    self.preloads.drop(preload.handle.key)
        if self._residency.num_loading or self._eviction.retired:
            self._eviction.drop_unclaimed()
        if self._gathering is not None and self._gathering.state is not State.WAITING:
            self._gathering = None
            self._residency.gather({})
        if self.forcing is not None:
            entry = self._residency.get(self.forcing)
            is_staged = entry is not None and entry.stage is Stage.STAGED
            if not is_staged or self.forcing not in self._residency.waiters:
                self._stop_forcing()

    def load(self, step: Step, sequence: Sequence, *, now: float) -> None:
        """Take the prefix of a waiting sequence one stage further, or those of an ensemble."""
        due = sequence.due_since
        overdue = due is not None and now - due > self._config.max_prefix_wait_s
        cap = sequence.request.max_resident_tokens
        if not sequence.ensemble:
            assert sequence.prefix is not None
            self._advance(step, sequence.prefix, cap=cap, overdue=overdue)
            return
        handles = {row.prefix.key: row.prefix for row in sequence.ensemble if row.prefix}
        if overdue and self._gathering is None:
            self._gathering = sequence
            self._residency.gather({key: each.num_tokens for key, each in handles.items()})
        for handle in handles.values():
            self._advance(step, handle, cap=cap, overdue=self._gathering is sequence)

    def load_others(self, step: Step, *, now: float, has_room: bool) -> None:
        """Load pins and preloads, and continue with all prefixes that are loading: the sequences
        that wait for them may be further back in the queue than the lookahead. Unless the pool
        ``has_room`` for the next sequence that could run, only the forced prefix is placed."""
        residency = self._residency
        if self._gathering is not None and self._gathering.state is State.WAITING:
            self.load(step, self._gathering, now=now)  # it may be beyond the lookahead
        if has_room and residency.missing_pins:
            for handle in residency.take_missing_pins(self._config.max_staged):
                self._load_unrequested(step, handle, self._caps.get(handle.key.tenant), now)
        if has_room and self.preloads.pending:
            for preload in self.preloads.take_turns(self._config.max_staged):
                self._load_unrequested(step, preload.handle, preload.cap, now)
        if not residency.num_loading:
            return
        for entry in residency.staged_entries():
            if residency.is_wanted(entry.key) and (has_room or entry.key == self.forcing):
                self._place(step, entry, overdue=entry.key == self.forcing)
        for entry in residency.compiling():
            if residency.is_wanted(entry.key):
                self._compile(step, entry)

    @property
    def wants_room(self) -> bool:
        """Whether the foreground waits for a prefix that has been fetched and has no room yet."""
        return any(map(self._is_awaited, self._residency.staged_entries()))

    def _is_awaited(self, entry: Entry) -> bool:
        return entry.key in self._residency.waiters or entry.key in self.preloads.pending

    def load_for_background(self, step: Step, sequence: Sequence, *, forces: bool) -> None:
        """Take the prefix of a waiting sequence of the background class one stage further.
        ``forces``: nothing else is alive, and what is idle leaves for it."""
        assert sequence.prefix is not None
        key, residency = sequence.prefix.key, self._residency
        entry = residency.get(key)
        if entry is None and residency.num_loading < max(1, self._config.max_staged // 2):
            entry = self._fetch(step, sequence.prefix)
        if entry is None or residency.is_wanted(key):
            return
        entry.requested_at, entry.cap = self._step, sequence.request.max_resident_tokens
        if entry.stage is Stage.STAGED:
            self._place_for_background(step, entry, forces=forces)
        if entry.stage is Stage.COMPILING:
            self._compile(step, entry)

    def compile_for_background(self, step: Step) -> None:
        """Continue with the compiles that the background class alone waits for."""
        if self._residency.num_loading:
            for entry in self._residency.compiling():
                if not self._residency.is_wanted(entry.key):
                    self._compile(step, entry)

    def compile_alone(self, step: Step, entry: Entry) -> bool:
        """Continue with one prefix, in a step of its own; False: it has no room now."""
        self._advance(step, PrefixHandle(entry.key, entry.num_tokens), cap=entry.cap)
        return bool(step.compiles)

    def _load_unrequested(
        self, step: Step, handle: PrefixHandle, cap: int | None, now: float
    ) -> None:
        """Load a prefix that no sequence waits for. It is fetched only when there is room for it,
        and not again at once after a failure."""
        if self._residency.get(handle.key) is None:
            entry = Entry(handle.key, handle.num_tokens)
            spares = not self._is_awaited(entry)
            plan = self._eviction.plan_for(entry, cap=cap, forces=False, spares=spares)
            while not plan.is_enough and self._would_fit(entry) and self._yields_to(entry, plan):
                plan = self._eviction.plan_for(entry, cap=cap, forces=False)
            if not plan.is_enough or self.failure(handle.key, now=now) is not None:
                return
        self._advance(step, handle, cap=cap)

    def _advance(
        self, step: Step, handle: PrefixHandle, *, cap: int | None, overdue: bool = False
    ) -> None:
        entry = self._residency.get(handle.key) or self._fetch(step, handle)
        if entry is None:
            return
        entry.requested_at, entry.cap = self._step, cap
        if entry.stage is Stage.STAGED:
            self._place(step, entry, overdue=overdue)
        if entry.stage is Stage.COMPILING:
            self._compile(step, entry)

    def _fetch(self, step: Step, handle: PrefixHandle) -> Entry | None:
        """Have an absent prefix fetched, unless too many are loading."""
        if self._residency.num_loading >= self._config.max_staged:
            has_waiters = handle.key in self._residency.waiters
            if not has_waiters or not self._eviction.drop_stalled(
                last_step=self._step - 1, urgency=self._residency.urgency(handle.key)
            ):
                return None
        entry = self._residency.fetch(handle)
        payload = self._memory.host.get(handle.key)
        if payload is not None:
            self._residency.staged(entry, payload)
            self.num_loads["host"] += 1
        else:
            step.fetches.append(handle.key)
            self.num_loads["store"] += 1
        return entry

    def _compile(self, step: Step, entry: Entry) -> None:
        """Run the next part, unless this step has one already."""
        if any(part.key == entry.key for part in step.compiles):
            return
        remaining = entry.num_tokens - entry.num_compiled
        size = min(step.budget, step.max_chunk - step.num_compiled, remaining)
        if size <= 0:
            return
        assert entry.payload is not None
        start = entry.num_compiled
        part = CompileChunk(
            entry.key, entry.payload, start, start + size, entry.blocks, entry.side_blocks
        )
        step.compiles.append(part)
        self._residency.compiles(entry, size)
        step.budget -= size
        is_wanted = self._residency.is_wanted(entry.key)
        waiting = self._waiting if is_wanted else self._background.waiting
        waiting.charge(entry.key.tenant, size)

    def _place(self, step: Step, entry: Entry, *, overdue: bool) -> None:
        """Give a staged prefix its blocks if there is room; an overdue one may force it."""
        if (entry.key, overdue) in self._tried:
            return  # for another sequence, in this very step
        self._tried.add((entry.key, overdue))
        gathered = self._residency.gathered
        # Another may wait for room that the ensemble takes until it has all its prefixes.
        goes_first = entry.key in gathered and self.forcing not in gathered
        forces = overdue and (goes_first or self.forcing in {None, entry.key})
        if self.forcing == entry.key or (forces and self.forcing is not None):
            self._stop_forcing()  # chosen again, from the present state
        forced = None if self.forcing is None else self._residency.get(self.forcing)
        plan_for = partial(
            self._eviction.plan_for, entry, cap=entry.cap, forces=forces, promised=forced
        )
        plan = plan_for(spares=not self._is_awaited(entry))
        while not plan.is_usable and self._yields_to(entry, plan):
            plan = plan_for()
        if plan.is_usable:
            self.num_swaps += any(v.key in self._residency.waiters for v in plan.victims)
            for victim in plan.victims:
                self._eviction.evict(step, victim)
            step.fresh += self._residency.place(entry, forced=overdue)
        elif forces:
            self.forcing = entry.key
            # Blocks that running sequences release count too: no other sequence gets them.
            self.promised = self._config.prefix_blocks(entry.num_tokens) * plan.lacks_blocks
            for victim in plan.victims:
                self._residency.leave(victim)

    def _yields_to(self, entry: Entry, plan: EvictionPlan) -> bool:
        """Take what a plan lacks from the background class; False: it has nothing of it. It keeps
        it where a prefix is only pinned: a sequence that needs the room of a pin would never end.
        """
        if not self._is_awaited(entry):
            return False
        if plan.lacks_blocks:
            return self._background.yield_blocks()
        return self._background.yield_prefix()

    def _would_fit(self, entry: Entry) -> bool:
        """Whether a prefix fits into what is free and what the background class holds."""
        running, budget = self._background.running, self._config.max_resident_tokens
        num_free = self._memory.pool.num_free + sum(sequence.num_blocks for sequence in running)
        prefixes = {sequence.prefix for sequence in running if sequence.prefix is not None}
        num_tokens = self._residency.num_tokens - sum(each.num_tokens for each in prefixes)
        is_within = budget is None or num_tokens + entry.num_tokens <= budget
        return is_within and self._config.prefix_blocks(entry.num_tokens) <= num_free

    def _place_for_background(self, step: Step, entry: Entry, *, forces: bool) -> None:
        if (entry.key, forces) in self._tried:
            return
        self._tried.add((entry.key, forces))
        forced = None if self.forcing is None else self._residency.get(self.forcing)
        plan = self._eviction.plan_for(
            entry, cap=entry.cap, forces=forces, promised=forced, spares=True
        )
        if plan.is_usable:
            for victim in plan.victims:
                self._eviction.evict(step, victim)
            step.fresh += self._residency.place(entry, forced=False)

    def _stop_forcing(self) -> None:
        self.forcing, self.promised = None, 0
        self._residency.stay()

    def __repr__(self) -> str:
        return f"PrefixLoader(forcing={self.forcing}, preloading={len(self.preloads)})"
