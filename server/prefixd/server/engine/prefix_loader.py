"""Which prefixes come into the pool, and which leave for them.

A prefix comes when a waiting sequence needs it, when it is warmed and when it is pinned. It takes
the room of idle prefixes that nobody waits for, least recently used first. Requests for prefixes
that are there ride along meanwhile; but a sequence whose turn it has been for longer than
``max_prefix_wait_s`` forces its prefix in, one at a time: enough others are marked as leaving,
take no more sequences, and make room when those they have are done. A prefix that has come is used
at least once before it can be forced out again, so two that do not fit together alternate and
never chase each other.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.eviction import EvictionPolicy
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.preloads import Preloads
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.residency import Entry, Residency, Stage
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import StagedPrefix
from prefixd.server.engine.step_builder import StepBuilder

_REMEMBERED_FAILURES = 1024
_MOST_WARMING = 256


class PrefixLoader:
    """Residency's decisions. ``bring`` is called for waiting sequences in fair order."""

    def __init__(self, config: SchedulerConfig, *, memory: Memory, waiting: FairQueue) -> None:
        self._config = config
        self._memory = memory
        self._waiting = waiting
        self._victims = EvictionPolicy(config, memory=memory, waiting=waiting)
        self._step = 0
        self._tried: set[tuple[PrefixKey, bool]] = set()
        self._pins: dict[PrefixKey, PrefixHandle] = {}
        self._caps: Mapping[str, int] = {}
        self.preloads = Preloads(most=_MOST_WARMING)
        self._failures: OrderedDict[PrefixKey, tuple[str, str | None, float]] = OrderedDict()
        self._retired: set[PrefixKey] = set()
        self.forcing: PrefixKey | None = None
        self.reserve = 0
        self.num_loads: Counter[str] = Counter()
        self.num_swaps = 0

    @property
    def _residency(self) -> Residency:
        return self._memory.residency

    @property
    def pins(self) -> tuple[PrefixKey, ...]:
        """What is to stay."""
        return tuple(self._pins)

    # -- wishes from outside ----

    def set_pins(
        self, handles: Iterable[PrefixHandle], *, caps: Mapping[str, int] | None = None
    ) -> None:
        """Bring these in and keep them; those pinned before are as others again. ``caps``: what
        tenants may have in the pool, where that is limited."""
        self._pins = {handle.key: handle for handle in handles}
        self._caps = caps or {}
        self._memory.pinned = self._pins.keys()

    def retire(self, keys: Iterable[PrefixKey]) -> None:
        """Let versions that were deleted or replaced leave when their last sequence does."""
        self._retired.update(keys)

    # -- what became of a fetch ----

    def staged(self, key: PrefixKey, payload: StagedPrefix) -> str | None:
        """A fetch ended well. Returns why it is of no use, if it is not what was announced."""
        entry = self._residency.get(key)
        if entry is None or entry.stage is not Stage.FETCHING:
            return None
        if payload.num_tokens != entry.num_tokens:
            return (
                f"the stored prefix has {payload.num_tokens} virtual tokens, its manifest says "
                f"{entry.num_tokens}"
            )
        self._residency.fetched(entry, payload)
        return None

    def failed(self, key: PrefixKey, message: str, *, code: str | None, now: float) -> None:
        """A fetch or compile failed: forget the entry, and remember the failure for a while."""
        entry = self._residency.get(key)
        if entry is not None:
            self._residency.drop(entry)
        self.preloads.drop(key)
        self._failures[key] = message, code, now + self._config.failed_prefix_memory_s
        self._failures.move_to_end(key)
        while len(self._failures) > _REMEMBERED_FAILURES:
            self._failures.popitem(last=False)

    def failure(self, key: PrefixKey, *, now: float) -> tuple[str, str | None] | None:
        """Message and code of a recent failure to load ``key``; None when there was none."""
        failure = self._failures.get(key)
        if failure is None:
            return None
        message, code, until = failure
        if now < until:
            return message, code
        del self._failures[key]
        return None

    def saved(self, saved: dict[PrefixKey, StagedPrefix]) -> None:
        """Evicted prefixes arrived in host memory."""
        for key, payload in saved.items():
            if key not in self._retired:
                self._memory.host.put(key, payload)

    # -- within a step ----

    def tend(self, *, now: float) -> None:
        """Let go what has become pointless since the last step."""
        self._step += 1
        self._tried.clear()
        for warm in self.preloads:
            entry = self._residency.get(warm.handle.key)
            if now >= warm.until or (entry is not None and entry.stage is Stage.RESIDENT):
                self.preloads.drop(warm.handle.key)
        for entry in [*self._residency.staged(), *self._residency.compiling()]:
            if not self._wanted(entry.key):
                self._residency.drop(entry)
        for key in list(self._retired):
            self._let_go(key)
        if self.forcing is not None:
            entry = self._residency.get(self.forcing)
            coming = entry is not None and entry.stage is Stage.STAGED
            if not coming or not self._waiting.wants(self.forcing):
                self._stop_forcing()

    def bring(self, builder: StepBuilder, sequence: Sequence, *, now: float) -> None:
        """Take the prefix of a waiting sequence one stage further."""
        assert sequence.prefix is not None
        due = sequence.due_since
        overdue = due is not None and now - due > self._config.max_prefix_wait_s
        cap = sequence.request.max_resident_tokens
        self._advance(builder, sequence.prefix, cap=cap, overdue=overdue)

    def bring_others(self, builder: StepBuilder, *, now: float, has_room: bool) -> None:
        """Bring what is pinned or warmed, and go on with whatever is under way: the sequences that
        wait for it may be further back in the queue than a step looks. Unless the pool
        ``has_room`` for the next that could run, nothing new takes any, but for what is forced."""
        if has_room:
            for handle in self._pins.values():
                self._wish(builder, handle, cap=self._caps.get(handle.key.tenant), now=now)
            for warm in self.preloads.take_turns(self._config.max_staged):
                self._wish(builder, warm.handle, cap=warm.cap, now=now)
        for entry in self._residency.staged():
            if has_room or entry.key == self.forcing:
                self._place(builder, entry, overdue=entry.key == self.forcing)
        for entry in self._residency.compiling():
            self._compile(builder, entry)

    def prove(self, builder: StepBuilder) -> bool:
        """Go on with a prefix whose compile was in a step that failed, and with nothing else."""
        for entry in [*self._residency.compiling(), *self._residency.staged()]:
            if entry.suspect:
                self._advance(builder, PrefixHandle(entry.key, entry.num_tokens), cap=entry.cap)
                if builder.compiles:
                    return True
                entry.suspect = False  # no room to try it alone; it takes its chance with others
        return False

    def _wish(
        self, builder: StepBuilder, handle: PrefixHandle, *, cap: int | None, now: float
    ) -> None:
        """Bring a prefix nobody waits for. It is fetched when there is room for it and not before,
        and not again at once if it could not be had."""
        if self._residency.get(handle.key) is None:
            coming = Entry(handle.key, handle.num_tokens)
            room = self._victims.choose(coming, cap=cap, pins=self._pins, forces=False)
            if not room.is_enough or self.failure(handle.key, now=now) is not None:
                return
        self._advance(builder, handle, cap=cap)

    def _advance(
        self, builder: StepBuilder, handle: PrefixHandle, *, cap: int | None, overdue: bool = False
    ) -> None:
        entry = self._residency.get(handle.key) or self._want(builder, handle)
        if entry is None:
            return
        entry.asked, entry.cap = self._step, cap
        if entry.stage is Stage.STAGED:
            self._place(builder, entry, overdue=overdue)
        if entry.stage is Stage.COMPILING:
            self._compile(builder, entry)

    def _want(self, builder: StepBuilder, handle: PrefixHandle) -> Entry | None:
        """Have an absent prefix fetched, unless too many are on their way."""
        full = self._residency.num_coming >= self._config.max_staged
        if full and not (self._waiting.wants(handle.key) and self._give_way()):
            return None
        entry = self._residency.want(handle)
        payload = self._memory.host.get(handle.key)
        if payload is not None:
            self._residency.fetched(entry, payload)
            self.num_loads["host"] += 1
        else:
            builder.fetches.append(handle.key)
            self.num_loads["store"] += 1
        return entry

    def _give_way(self) -> bool:
        """Let go of a prefix on its way that is only pinned or warmed, or that a whole step did not
        come to ask for; False: there is none."""
        for entry in self._residency.staged():
            if entry.asked < self._step - 1 or not self._waiting.wants(entry.key):
                self._residency.drop(entry)
                return True
        return False

    def _compile(self, builder: StepBuilder, entry: Entry) -> None:
        """Run the next part, unless this step has one already."""
        if all(part.key != entry.key for part in builder.compiles):
            self._waiting.charge(entry.key.tenant, builder.compile(entry))

    def _place(self, builder: StepBuilder, entry: Entry, *, overdue: bool) -> None:
        """Give a staged prefix its blocks if room can be had; an overdue one may force it."""
        if (entry.key, overdue) in self._tried:
            return  # for another sequence, in this very step
        self._tried.add((entry.key, overdue))
        forces = overdue and self.forcing in {None, entry.key}
        if self.forcing == entry.key:
            self._stop_forcing()  # chosen anew, as things are now
        promised = None if self.forcing is None else self._residency.get(self.forcing)
        choice = self._victims.choose(
            entry, cap=entry.cap, pins=self._pins, forces=forces, promised=promised
        )
        if choice.is_enough and all(victim.idle for victim in choice.victims):
            self.num_swaps += any(self._waiting.wants(victim.key) for victim in choice.victims)
            for victim in choice.victims:
                self._memory.evict(builder, victim)
            builder.fresh += self._residency.place(entry)
            entry.forced = overdue
        elif forces:
            self.forcing = entry.key
            # Blocks that running sequences hold themselves come free too: nobody else gets them.
            self.reserve = self._residency.blocks_needed(entry.num_tokens) * choice.lacks_blocks
            for victim in choice.victims:
                victim.leaving = True

    def _wanted(self, key: PrefixKey) -> bool:
        return self._waiting.wants(key) or key in self.preloads or key in self._pins

    def _let_go(self, key: PrefixKey) -> None:
        """Drop a retired prefix once nothing runs under it and nobody waits for it."""
        entry = self._residency.get(key)
        if entry is not None:
            entry.retired = True
        if self._wanted(key) or (entry is not None and not entry.idle):
            return
        self._retired.discard(key)
        self._memory.host.drop(key)
        if entry is not None:
            self._residency.evict(entry)

    def _stop_forcing(self) -> None:
        self.forcing, self.reserve = None, 0
        for entry in self._residency.resident():
            entry.leaving = False

    def __repr__(self) -> str:
        return f"PrefixLoader(forcing={self.forcing}, preloading={len(self.preloads)})"
