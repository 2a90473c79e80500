"""Which prefixes are in the pool or loading, and who needs them. Decides nothing.

One entry per digest and tenant, so a prefix is fetched once, compiled once and stored once however
many sequences use it (single flight). Every change of an entry's stage is a method of Residency::

    absent --fetch--> FETCHING --staged--> STAGED --place--> COMPILING --compiled--> RESIDENT
                                             ^                   |                    |   ^
                                             +------unplace------+               leave|   |stay
                                                                                      v   |
    any stage --drop, evict--> absent                                                LEAVING

| Stage     | Payload | Blocks | Sequences under it      | Ends with                           |
|-----------|---------|--------|-------------------------|-------------------------------------|
| FETCHING  | no      | no     | wait                    | the fetch                           |
| STAGED    | yes     | no     | wait                    | room in the pool, or no claim       |
| COMPILING | yes     | all    | wait                    | its last token, or blocks run short |
| RESIDENT  | no      | all    | start and run           | eviction, when idle                 |
| LEAVING   | no      | all    | run on, but none starts | eviction, when idle                 |

Two counts complete the stage. ``num_users`` sequences run under an entry now; it is idle without
any. ``num_uses`` have started under it since it was compiled; one without any that was ``forced``
in is reserved for the sequences that wait for it, while its ``Urgency`` is more than OTHER.

A prefix is claimed by each sequence that waits for it (``waiters``; those of the background class
are ``background_waiters``), by a pin (``pins``) and by a preload (``preloads``). Its ``Urgency`` is
that of the most urgent sequence of the foreground that waits for it: one that could start as soon
as it is there (``alone``), or the ensemble whose prefixes are ``gathered`` (``prefix_loader``).

The blocks of an entry are referenced by the entry itself and by the block table of each sequence
under it, unless the prefix is gated: then by the entry alone, which cannot leave while it has
users.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import IntEnum
from itertools import islice

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import COMPILED, Entry, Stage, UseOrder
from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.request import PrefixHandle, PrefixKey

_PLACED = COMPILED | {Stage.COMPILING}


class Urgency(IntEnum):
    """How much a prefix is needed. OTHER: by no sequence, or only by ensembles that lack others
    too; ALONE: by a sequence that needs no other; GATHERED: by the ensemble that gathers."""

    OTHER = 0
    ALONE = 1
    GATHERED = 2


class PinSizes:
    """Virtual tokens and blocks of all pins together, and virtual tokens by tenant."""

    def __init__(self, pins: Iterable[PrefixHandle], *, config: SchedulerConfig) -> None:
        self.by_tenant: Counter[str] = Counter()
        self.blocks = 0
        for pin in pins:
            self.by_tenant[pin.key.tenant] += pin.num_tokens
            self.blocks += config.prefix_blocks(pin.num_tokens)
        self.tokens = self.by_tenant.total()


class Residency:
    """Entries by prefix key.

    What a step looks at is kept by itself, so that it walks no other entries: ``order`` of use;
    ``ready`` and ``reserved`` entries, for which sequences wait, and ``background_ready`` ones, for
    which sequences of the background class do; ``missing_pins``, which are not compiled; and
    ``changed``, the keys whose tier may be another since the set was cleared.
    """

    def __init__(self, config: SchedulerConfig, *, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self._block_size = config.block_size
        self._entries: dict[PrefixKey, Entry] = {}
        self._by_stage: dict[Stage, dict[PrefixKey, Entry]] = {stage: {} for stage in Stage}
        self._tokens_by_tenant: Counter[str] = Counter()
        self.waiters: Counter[PrefixKey] = Counter()
        self.background_waiters: Counter[PrefixKey] = Counter()
        self.alone: Counter[PrefixKey] = Counter()
        self.gathered: Mapping[PrefixKey, int] = {}
        self.pins: Mapping[PrefixKey, PrefixHandle] = {}
        self.pin_sizes = PinSizes((), config=config)
        self.preloads: Collection[PrefixKey] = ()
        self.order = UseOrder()
        self.ready: dict[PrefixKey, Entry] = {}
        self.background_ready: dict[PrefixKey, Entry] = {}
        self.reserved: dict[PrefixKey, Entry] = {}
        self.missing_pins: dict[PrefixKey, PrefixHandle] = {}
        self.changed: set[PrefixKey] = set()
        self.num_loading = 0
        self.num_tokens = 0
        self.num_blocks = 0
        self.num_compiles = 0
        self.num_evictions = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: PrefixKey) -> Entry | None:
        """The entry of ``key``, or None when it is absent."""
        return self._entries.get(key)

    # -- claims ----

    def add_waiter(self, key: PrefixKey, *, alone: bool = True, background: bool = False) -> None:
        """Count a sequence that waits to run under the prefix, or with ``alone`` False a row of an
        ensemble."""
        waiters = self.background_waiters if background else self.waiters
        waiters[key] += 1
        is_new = waiters[key] == 1
        if alone and not background:
            self.alone[key] += 1
            is_new = is_new or self.alone[key] == 1
        if is_new:
            self._waiters_changed(key)

    def remove_waiter(
        self, key: PrefixKey, *, alone: bool = True, background: bool = False
    ) -> None:
        """Count a sequence, or a row, that no longer waits."""
        counts = [self.background_waiters if background else self.waiters]
        if alone and not background:
            counts.append(self.alone)
        is_last = False
        for waiters in counts:
            waiters[key] -= 1
            if not waiters[key]:
                del waiters[key]
                is_last = True
        if is_last:
            self._waiters_changed(key)

    def gather(self, sizes: Mapping[PrefixKey, int]) -> None:
        """Let these be the prefixes that are ``gathered``, each with its virtual tokens."""
        changed, self.gathered = self.gathered.keys() ^ sizes.keys(), sizes
        for key in changed:
            self._waiters_changed(key)

    def set_pins(self, handles: Mapping[PrefixKey, PrefixHandle]) -> None:
        """Pin these and no others."""
        if handles == self.pins:
            return
        self.pins = handles
        self.pin_sizes = PinSizes(handles.values(), config=self._config)
        compiled = {**self._by_stage[Stage.RESIDENT], **self._by_stage[Stage.LEAVING]}
        self.order.rebuild(compiled.values(), pinned=handles.keys())
        self.missing_pins = {key: pin for key, pin in handles.items() if key not in compiled}

    def take_missing_pins(self, count: int) -> list[PrefixHandle]:
        """The next ``count`` of the pins that are not compiled; they move to the end of the
        order."""
        keys = list(islice(self.missing_pins, count))
        for key in keys:
            self.missing_pins[key] = self.missing_pins.pop(key)
        return [self.missing_pins[key] for key in keys]

    def is_wanted(self, key: PrefixKey) -> bool:
        """Whether the foreground needs the prefix: a waiting sequence, a pin or a preload."""
        return key in self.waiters or key in self.pins or key in self.preloads

    def is_claimed(self, key: PrefixKey) -> bool:
        """Whether it is wanted, or a sequence of the background class waits for it."""
        return self.is_wanted(key) or key in self.background_waiters

    def urgency(self, key: PrefixKey) -> Urgency:
        """How much the prefix is needed by sequences that wait."""
        if key in self.gathered and key in self.waiters:
            return Urgency.GATHERED
        return Urgency.ALONE if self.alone[key] else Urgency.OTHER

    def is_reserved(self, entry: Entry) -> bool:
        """Whether it was forced in for waiting sequences, and is not used yet."""
        is_unused = entry.forced and not entry.num_uses
        return is_unused and self.urgency(entry.key) > Urgency.OTHER

    # -- transitions ----

    def fetch(self, handle: PrefixHandle) -> Entry:
        """Absent to FETCHING: a new entry. The caller fetches the prefix."""
        assert handle.key not in self._entries
        entry = self._entries[handle.key] = Entry(handle.key, handle.num_tokens)
        self._by_stage[Stage.FETCHING][handle.key] = entry
        self.changed.add(handle.key)
        self.num_loading += 1
        return entry

    def staged(self, entry: Entry, payload: StagedPrefix) -> None:
        """FETCHING to STAGED. The payload's number of tokens is the one that counts; the caller has
        checked that it is not larger than the entry's."""
        assert entry.stage is Stage.FETCHING
        entry.payload, entry.num_tokens = payload, payload.num_tokens
        entry.gated_from = payload.gated_from
        self._move(entry, Stage.STAGED)

    def place(self, entry: Entry, *, forced: bool) -> list[int]:
        """STAGED to COMPILING: allocate all its blocks, which the caller zeroes."""
        assert entry.stage is Stage.STAGED
        entry.blocks = self._pool.allocate(self._config.blocks_needed(entry.num_tokens))
        entry.side_blocks = self._pool.allocate(self._config.state_blocks)
        entry.forced = forced
        self._count(entry, 1)
        self._move(entry, Stage.COMPILING)
        return entry.blocks + entry.side_blocks

    def unplace(self, entry: Entry) -> None:
        """COMPILING back to STAGED: release its blocks. The compile starts over later, in other
        side blocks: a state that has advanced is of no use to it."""
        assert entry.stage is Stage.COMPILING
        self._release_blocks(entry)
        entry.num_compiled = 0
        self._move(entry, Stage.STAGED)

    def compiles(self, entry: Entry, num_tokens: int) -> None:
        """A step that was planned compiles ``num_tokens`` more."""
        assert entry.stage is Stage.COMPILING
        entry.num_compiled += num_tokens

    def compiled(self, entry: Entry) -> None:
        """COMPILING to RESIDENT: all its tokens are in the pool."""
        assert entry.stage is Stage.COMPILING
        entry.payload = None
        self.num_compiles += 1
        self.num_loading -= 1
        self._move(entry, Stage.RESIDENT)
        self.order.use(entry, pinned=entry.key in self.pins)
        self.missing_pins.pop(entry.key, None)

    def leave(self, entry: Entry) -> None:
        """RESIDENT to LEAVING: no sequence starts under it, because its room is promised."""
        assert entry.is_compiled
        self._move(entry, Stage.LEAVING)

    def stay(self) -> None:
        """All that are LEAVING back to RESIDENT."""
        for entry in list(self._by_stage[Stage.LEAVING].values()):
            self._move(entry, Stage.RESIDENT)

    def acquire(self, key: PrefixKey) -> Entry:
        """A sequence starts under a RESIDENT entry and references its full blocks."""
        entry = self._entries[key]
        assert entry.stage is Stage.RESIDENT
        entry.num_users += 1
        entry.num_uses += 1
        self._pool.share(entry.head(self._block_size))
        self.order.use(entry, pinned=key in self.pins)
        self.reserved.pop(key, None)
        return entry

    def release(self, key: PrefixKey) -> None:
        """A sequence under the prefix stopped running. Its own table releases the blocks."""
        entry = self._entries[key]
        entry.num_users -= 1
        self.order.use(entry, pinned=key in self.pins)

    def evict(self, entry: Entry) -> None:
        """Idle to absent: release its blocks."""
        assert entry.idle
        self.drop(entry)
        self.num_evictions += 1

    def drop(self, entry: Entry) -> None:
        """Any stage to absent, without running sequences: the load failed, or has no claim."""
        assert entry.num_users == 0
        if entry.blocks:
            self._release_blocks(entry)
        del self._entries[entry.key]
        del self._by_stage[entry.stage][entry.key]
        self.order.remove(entry)
        self._waiters_changed(entry.key)
        if entry.key in self.pins:
            self.missing_pins[entry.key] = self.pins[entry.key]
        self.changed.add(entry.key)
        self.num_loading -= not entry.is_compiled

    # -- lookups ----

    def pinned(self) -> list[Entry]:
        """Compiled entries that are pinned, least recently used first. Walks all pins."""
        entries = (self._entries.get(key) for key in self.pins)
        compiled = [entry for entry in entries if entry is not None and entry.is_compiled]
        return sorted(compiled, key=lambda entry: entry.last_use)

    def staged_entries(self) -> list[Entry]:
        """Entries that wait for blocks, oldest first."""
        return list(self._by_stage[Stage.STAGED].values())

    def compiling(self) -> list[Entry]:
        """Entries whose compile is in progress, oldest first."""
        return list(self._by_stage[Stage.COMPILING].values())

    def loading(self) -> Iterator[Entry]:
        """Entries that are fetched, wait for blocks or compile."""
        for stage in (Stage.FETCHING, Stage.STAGED, Stage.COMPILING):
            yield from self._by_stage[stage].values()

    def tokens_of(self, tenant: str) -> int:
        """Virtual tokens that a tenant's prefixes hold in the pool, those compiling included."""
        return self._tokens_by_tenant[tenant]

    def check_integrity(self) -> None:
        """Prove that the counts are what the entries add up to."""
        holders = [entry for entry in self if entry.blocks]
        assert self.num_tokens == sum(entry.num_tokens for entry in holders)
        assert self.num_blocks == sum(entry.num_blocks for entry in holders)
        assert self.num_loading == sum(not entry.is_compiled for entry in self)
        for tenant, tokens in self._tokens_by_tenant.items():
            assert tokens == sum(e.num_tokens for e in holders if e.key.tenant == tenant)
        for entry in self:
            assert self._by_stage[entry.stage][entry.key] is entry
            placed = entry.stage in _PLACED
            assert bool(entry.blocks) == placed, f"{entry} and its stage differ in blocks"
            num_side = self._config.state_blocks if placed else 0
            assert len(entry.side_blocks) == num_side, f"{entry} and its stage differ in its state"
            has_payload = entry.stage in {Stage.STAGED, Stage.COMPILING}
            assert (entry.payload is not None) == has_payload, f"{entry} differs in payload"
            assert entry.is_compiled or not entry.num_uses, f"{entry} was used before its compile"
        self._check_order()

    def _check_order(self) -> None:
        """Prove that what is kept by itself is what a walk over all entries would give."""
        compiled = sorted((e for e in self if e.is_compiled), key=lambda entry: entry.last_use)
        unpinned = [entry for entry in compiled if entry.key not in self.pins]
        assert list(self.order.idle()) == [entry for entry in unpinned if entry.idle]
        assert self.order.busy() == [entry for entry in unpinned if not entry.idle]
        for tenant in {entry.key.tenant for entry in compiled}:
            of_tenant = [e for e in self.order.idle() if e.key.tenant == tenant]
            assert list(self.order.idle(tenant)) == of_tenant
        waited = [entry for entry in compiled if entry.key in self.waiters]
        assert self.ready.keys() == {e.key for e in waited if e.stage is Stage.RESIDENT}
        resident = {entry.key for entry in compiled if entry.stage is Stage.RESIDENT}
        assert self.background_ready.keys() == resident & self.background_waiters.keys()
        assert self.reserved.keys() == {e.key for e in waited if self.is_reserved(e)}
        assert self.missing_pins.keys() == self.pins.keys() - {entry.key for entry in compiled}

    def _move(self, entry: Entry, stage: Stage) -> None:
        del self._by_stage[entry.stage][entry.key]
        entry.stage = stage
        self._by_stage[stage][entry.key] = entry
        self._waiters_changed(entry.key)
        self.changed.add(entry.key)

    def _waiters_changed(self, key: PrefixKey) -> None:
        """Keep ``ready`` and ``reserved`` right: the prefix, or what waits for it, has changed."""
        self.ready.pop(key, None)
        self.reserved.pop(key, None)
        self.background_ready.pop(key, None)
        entry = self._entries.get(key)
        if entry is not None and key in self.waiters:
            if entry.stage is Stage.RESIDENT:
                self.ready[key] = entry
            if entry.is_compiled and self.is_reserved(entry):
                self.reserved[key] = entry
        if entry is not None and key in self.background_waiters and entry.stage is Stage.RESIDENT:
            self.background_ready[key] = entry

    def _release_blocks(self, entry: Entry) -> None:
        self._count(entry, -1)
        self._pool.release(entry.blocks)
        self._pool.release(entry.side_blocks)
        entry.blocks, entry.side_blocks = [], []

    def _count(self, entry: Entry, sign: int) -> None:
        self.num_tokens += sign * entry.num_tokens
        self.num_blocks += sign * entry.num_blocks
        self._tokens_by_tenant[entry.key.tenant] += sign * entry.num_tokens
        if not self._tokens_by_tenant[entry.key.tenant]:
            del self._tokens_by_tenant[entry.key.tenant]

    def __repr__(self) -> str:
        counts = Counter(entry.stage for entry in self)
        return f"Residency({ {stage.name.lower(): counts[stage] for stage in Stage} })"
