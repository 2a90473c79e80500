"""Which prefixes are in the pool, coming, or gone. Decides and counts; performs nothing.

::

    absent --want--> FETCHING --staged--> STAGED --place--> COMPILING --compiled--> RESIDENT
       ^                |                   ^                   |                      |
       +----failed------+                   +------unplace------+                      |
       +------------------------------------evict--------------------------------------+

One entry per digest and tenant, so a prefix is fetched once, compiled once and stored once however
many sequences use it (single flight). The blocks of an entry are referenced by the entry itself
and by the block table of each sequence under it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from server.engine.block_pool import BlockPool
from server.engine.request import PrefixHandle, PrefixKey
from server.engine.step import StagedPrefix


class Stage(Enum):
    """How far a prefix has come."""

    FETCHING = auto()
    STAGED = auto()
    COMPILING = auto()
    RESIDENT = auto()


@dataclass(eq=False, slots=True)
class Entry:
    """One prefix on its way into the pool or in it."""

    key: PrefixKey
    num_tokens: int
    stage: Stage = Stage.FETCHING
    payload: StagedPrefix | None = None
    blocks: list[int] = field(default_factory=list)
    num_compiled: int = 0
    num_users: int = 0
    last_used: int = 0

    @property
    def idle(self) -> bool:
        """Resident, and no running sequence under it."""
        return self.stage is Stage.RESIDENT and self.num_users == 0


class Residency:
    """Entries by prefix key, least recently used evicted first."""

    def __init__(self, *, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._entries: dict[PrefixKey, Entry] = {}
        self._clock = 0
        self.num_fetches = 0
        self.num_compiles = 0
        self.num_evictions = 0

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

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
        self.num_fetches += 1
        return entry

    def fetched(self, key: PrefixKey, payload: StagedPrefix) -> None:
        """A fetch ended well. The caller has compared the number of tokens."""
        entry = self._entries[key]
        assert entry.stage is Stage.FETCHING
        entry.stage, entry.payload = Stage.STAGED, payload

    def place(self, entry: Entry) -> list[int]:
        """Give a staged prefix its blocks, fresh from the pool; all or nothing."""
        assert entry.stage is Stage.STAGED
        entry.blocks = self._pool.allocate(self.blocks_needed(entry.num_tokens))
        entry.stage = Stage.COMPILING
        return entry.blocks

    def unplace(self, entry: Entry) -> None:
        """Take the blocks of a compiling prefix back; it stays staged and starts over later."""
        assert entry.stage is Stage.COMPILING
        self._pool.release(entry.blocks)
        entry.blocks, entry.num_compiled, entry.stage = [], 0, Stage.STAGED

    def compiled(self, key: PrefixKey, upto: int) -> None:
        """The first ``upto`` virtual tokens are in the pool; all of them makes it resident."""
        entry = self._entries[key]
        assert entry.stage is Stage.COMPILING
        entry.num_compiled = upto
        if upto == entry.num_tokens:
            entry.stage, entry.payload = Stage.RESIDENT, None
            self.num_compiles += 1
            self._touch(entry)

    def acquire(self, key: PrefixKey) -> Entry:
        """A sequence starts to run under a resident prefix; it holds the whole blocks too."""
        entry = self._entries[key]
        assert entry.stage is Stage.RESIDENT
        entry.num_users += 1
        self._pool.share(self.whole_blocks(entry))
        self._touch(entry)
        return entry

    def release(self, key: PrefixKey) -> None:
        """A sequence under the prefix stopped running (its own table releases the blocks)."""
        entry = self._entries[key]
        entry.num_users -= 1
        self._touch(entry)

    def whole_blocks(self, entry: Entry) -> list[int]:
        """The blocks filled to the brim: shared as they are. A tail is copied to each sequence."""
        return entry.blocks[: entry.num_tokens // self._block_size]

    def idle(self) -> list[Entry]:
        """Resident entries no running sequence uses."""
        return [e for e in self._entries.values() if e.idle]

    def staged(self) -> list[Entry]:
        """Entries fetched and waiting for blocks."""
        return self._at(Stage.STAGED)

    def compiling(self) -> list[Entry]:
        """Entries whose compile is under way, oldest first."""
        return self._at(Stage.COMPILING)

    def tokens_of(self, tenant: str) -> int:
        """Virtual tokens that a tenant's prefixes hold in the pool, those compiling included."""
        return sum(e.num_tokens for e in self if e.key.tenant == tenant and e.blocks)

    @property
    def num_coming(self) -> int:
        """Entries between store and pool: their payloads take host memory."""
        return len(self._at(Stage.FETCHING)) + len(self._at(Stage.STAGED))

    def evict(self, entry: Entry) -> None:
        """Drop an idle entry and its blocks."""
        assert entry.idle
        self.drop(entry)
        self.num_evictions += 1

    def drop(self, entry: Entry) -> None:
        """Forget an entry no sequence runs under: its fetch or compile failed, or nobody waits."""
        assert entry.num_users == 0
        self._pool.release(entry.blocks)
        del self._entries[entry.key]

    def tables(self) -> Iterable[list[int]]:
        """The block lists of all entries, for the integrity check."""
        return [entry.blocks for entry in self._entries.values()]

    def _at(self, stage: Stage) -> list[Entry]:
        return [e for e in self._entries.values() if e.stage is stage]

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.last_used = self._clock

    def __repr__(self) -> str:
        stages = {s.name.lower(): sum(e.stage is s for e in self) for s in Stage}
        return f"Residency({stages})"
