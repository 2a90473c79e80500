"""Which prefixes are in the pool, coming, or gone. Counts and keeps order; decides nothing.

::

    absent --want--> FETCHING --staged--> STAGED --place--> COMPILING --compiled--> RESIDENT
       ^                |                   ^                   |                      |
       +----failed------+                   +------unplace------+                      |
       +------------------------------------evict--------------------------------------+

One entry per digest and tenant, so a prefix is fetched once, compiled once and stored once however
many sequences use it (single flight). The blocks of an entry are referenced by the entry itself
and by the block table of each sequence under it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.step import StagedPrefix


class Stage(Enum):
    """How far a prefix has come."""

    FETCHING = auto()
    STAGED = auto()
    COMPILING = auto()
    RESIDENT = auto()


@dataclass(eq=False, slots=True)
class Entry:
    """One prefix on its way into the pool or in it.

    ``unused``: no sequence ran under it yet. ``forced``: nor did one that forced it in, for which
    its room is kept. ``leaving``: it takes no more sequences, since its
    room is promised to another. ``retired``: its version was deleted or replaced. ``suspect``: its
    compile was in a step that failed. ``cap``: of its tenant.
    ``asked``: the step in which it was last asked for.
    """

    key: PrefixKey
    num_tokens: int
    stage: Stage = Stage.FETCHING
    payload: StagedPrefix | None = None
    blocks: list[int] = field(default_factory=list)
    num_compiled: int = 0
    num_users: int = 0
    unused: bool = True
    forced: bool = False
    leaving: bool = False
    retired: bool = False
    suspect: bool = False
    cap: int | None = None
    asked: int = 0

    @property
    def idle(self) -> bool:
        """Resident, and no running sequence under it."""
        return self.stage is Stage.RESIDENT and self.num_users == 0


class Residency:
    """Entries by prefix key, the resident ones in the order of their last use."""

    def __init__(self, *, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._stages: dict[Stage, OrderedDict[PrefixKey, Entry]] = {
            stage: OrderedDict() for stage in Stage
        }
        self._entries: dict[PrefixKey, Entry] = {}
        self._held_tokens: Counter[str] = Counter()
        self.num_tokens = 0
        self.num_blocks = 0
        self.num_changes = 0
        self.num_compiles = 0
        self.num_evictions = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: PrefixKey) -> Entry | None:
        """The entry of ``key``, or None when it is absent."""
        return self._entries.get(key)

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` positions."""
        return -(-num_tokens // self._block_size)

    def want(self, handle: PrefixHandle) -> Entry:
        """Note that ``handle`` is absent and needed: a new entry, to be fetched by the caller."""
        assert handle.key not in self._entries
        entry = self._entries[handle.key] = Entry(handle.key, handle.num_tokens)
        self._stages[Stage.FETCHING][handle.key] = entry
        self.num_changes += 1
        return entry

    def fetched(self, entry: Entry, payload: StagedPrefix) -> None:
        """A fetch ended well. The caller has compared the number of tokens."""
        assert entry.stage is Stage.FETCHING
        entry.payload = payload
        self._move(entry, Stage.STAGED)

    def place(self, entry: Entry) -> list[int]:
        """Give a staged prefix its blocks, fresh from the pool; all or nothing."""
        assert entry.stage is Stage.STAGED
        entry.blocks = self._pool.allocate(self.blocks_needed(entry.num_tokens))
        self._count(entry, 1)
        self._move(entry, Stage.COMPILING)
        return entry.blocks

    def unplace(self, entry: Entry) -> None:
        """Take the blocks of a compiling prefix back; it stays staged and starts over later."""
        assert entry.stage is Stage.COMPILING
        self._give_back(entry)
        entry.num_compiled = 0
        self._move(entry, Stage.STAGED)

    def compiled(self, key: PrefixKey, upto: int) -> None:
        """The first ``upto`` virtual tokens are in the pool; all of them makes it resident."""
        entry = self._entries[key]
        assert entry.stage is Stage.COMPILING
        entry.num_compiled = upto
        if upto == entry.num_tokens:
            entry.payload, entry.suspect = None, False
            self.num_compiles += 1
            self._move(entry, Stage.RESIDENT)

    def acquire(self, key: PrefixKey) -> Entry:
        """A sequence starts to run under a resident prefix; it holds the whole blocks too."""
        entry = self._entries[key]
        assert entry.stage is Stage.RESIDENT
        entry.num_users += 1
        entry.unused = entry.forced = False
        self._pool.share(self.whole_blocks(entry))
        self._stages[Stage.RESIDENT].move_to_end(key)
        return entry

    def release(self, key: PrefixKey) -> None:
        """A sequence under the prefix stopped running (its own table releases the blocks)."""
        self._entries[key].num_users -= 1
        self._stages[Stage.RESIDENT].move_to_end(key)

    def whole_blocks(self, entry: Entry) -> list[int]:
        """The blocks filled to the brim: shared as they are. A tail is copied to each sequence."""
        return entry.blocks[: entry.num_tokens // self._block_size]

    def resident(self) -> list[Entry]:
        """Resident entries, least recently used first."""
        return list(self._stages[Stage.RESIDENT].values())

    def idle(self) -> list[Entry]:
        """Resident entries no running sequence uses, least recently used first."""
        return [entry for entry in self._stages[Stage.RESIDENT].values() if entry.idle]

    def staged(self) -> list[Entry]:
        """Entries fetched and waiting for blocks."""
        return list(self._stages[Stage.STAGED].values())

    def compiling(self) -> list[Entry]:
        """Entries whose compile is under way, oldest first."""
        return list(self._stages[Stage.COMPILING].values())

    def tokens_of(self, tenant: str) -> int:
        """Virtual tokens that a tenant's prefixes hold in the pool, those compiling included."""
        return self._held_tokens[tenant]

    def num_at(self, stage: Stage) -> int:
        """How many entries are at ``stage``."""
        return len(self._stages[stage])

    @property
    def num_coming(self) -> int:
        """Entries on their way into the pool: their payloads take host memory."""
        return len(self._entries) - self.num_at(Stage.RESIDENT)

    def evict(self, entry: Entry) -> None:
        """Drop an idle entry and its blocks."""
        assert entry.idle
        self.drop(entry)
        self.num_evictions += 1

    def drop(self, entry: Entry) -> None:
        """Forget an entry no sequence runs under: its fetch or compile failed, or nobody waits."""
        assert entry.num_users == 0
        if entry.blocks:
            self._give_back(entry)
        del self._entries[entry.key]
        del self._stages[entry.stage][entry.key]
        self.num_changes += 1

    def tables(self) -> Iterable[list[int]]:
        """The block lists of all entries, for the integrity check."""
        return [entry.blocks for entry in self]

    def check_integrity(self) -> None:
        """Prove that the counts are what the entries add up to."""
        holders = [entry for entry in self if entry.blocks]
        assert self.num_tokens == sum(entry.num_tokens for entry in holders)
        assert self.num_blocks == sum(len(entry.blocks) for entry in holders)
        for tenant, tokens in self._held_tokens.items():
            assert tokens == sum(e.num_tokens for e in holders if e.key.tenant == tenant)
        for entry in self:
            assert self._stages[entry.stage][entry.key] is entry
            placed = entry.stage in {Stage.COMPILING, Stage.RESIDENT}
            assert bool(entry.blocks) == placed, f"{entry} holds what its stage does not"

    def _move(self, entry: Entry, stage: Stage) -> None:
        del self._stages[entry.stage][entry.key]
        entry.stage = stage
        self._stages[stage][entry.key] = entry
        self.num_changes += 1

    def _give_back(self, entry: Entry) -> None:
        self._count(entry, -1)
        self._pool.release(entry.blocks)
        entry.blocks = []

    def _count(self, entry: Entry, sign: int) -> None:
        self.num_tokens += sign * entry.num_tokens
        self.num_blocks += sign * len(entry.blocks)
        self._held_tokens[entry.key.tenant] += sign * entry.num_tokens
        if not self._held_tokens[entry.key.tenant]:
            del self._held_tokens[entry.key.tenant]

    def __repr__(self) -> str:
        return f"Residency({ {s.name.lower(): self.num_at(s) for s in Stage} })"
