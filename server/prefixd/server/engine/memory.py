"""The blocks of sequences and prefixes together: who holds them, and who gives them back first."""

from collections.abc import Collection

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.host_tier import HostTier
from prefixd.server.engine.kv_reuse import KVReuse
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.residency import Entry, Residency, Stage
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import BlockCopy, Save
from prefixd.server.engine.step_builder import StepBuilder


class Memory:
    """One pool, shared by prefixes in residence, running sequences and KV that may be reused."""

    def __init__(self, config: SchedulerConfig, *, waiting: FairQueue, namespace: str) -> None:
        """``waiting`` tells which prefixes are wanted, ``namespace`` seeds KV reuse."""
        self._block_size = config.block_size
        self._waiting = waiting
        self.pool = BlockPool(num_blocks=config.num_blocks)
        self.residency = Residency(pool=self.pool, block_size=config.block_size)
        self.reuse = KVReuse(pool=self.pool, block_size=config.block_size, namespace=namespace)
        self.host = HostTier(max_tokens=config.host_tokens)
        self.pinned: Collection[PrefixKey] = frozenset()

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether the prefix of ``sequence``, if it has one, is there for it to run under."""
        if sequence.prefix is None:
            return True
        entry = self.residency.get(sequence.prefix.key)
        return entry is not None and entry.stage is Stage.RESIDENT and not entry.leaving

    def ready_prefixes(self) -> list[PrefixKey]:
        """Resident prefixes that a waiting sequence could run under now."""
        return [
            entry.key
            for entry in self.residency.resident()
            if not entry.leaving and self._waiting.wants(entry.key)
        ]

    def first_users(self) -> list[Sequence]:
        """Who waits to run first under each prefix that was forced in, the first to come first."""
        return [
            self._waiting.first_under(entry.key)
            for entry in self.residency.resident()
            if entry.forced and self._waiting.wants(entry.key)
        ]

    def is_first_use(self, sequence: Sequence) -> bool:
        """Whether no sequence ran yet under the resident prefix of ``sequence``."""
        entry = self.residency.get(sequence.prefix.key) if sequence.prefix else None
        return entry is not None and entry.unused

    def table_length(self, sequence: Sequence) -> int:
        """Blocks in the table of ``sequence`` once all its tokens are in the pool."""
        return self.residency.blocks_needed(sequence.num_prefix_tokens + len(sequence.tokens))

    def own_blocks(self, sequence: Sequence) -> int:
        """How many of those are its own; the others it shares with its prefix."""
        return self.table_length(sequence) - sequence.num_prefix_tokens // self._block_size

    def blocks_to_start(self, sequence: Sequence) -> int:
        """Free blocks that ``sequence`` takes when it starts: its own but for those of running
        sequences that it reuses."""
        held = sum(self.pool.references(block) > 0 for block in self.reuse.find(sequence))
        return self.own_blocks(sequence) - held

    def hold(self, builder: StepBuilder, sequence: Sequence) -> int:
        """Give a starting sequence its block table. Returns how many of its tokens are in it.

        The caller has made room. A prefix's last block is never shared for writing: unless it is
        full, its positions are copied into the first block of the sequence's own (or are in it,
        where that is reused).
        """
        reused = self.reuse.find(sequence)
        self.pool.share(reused)
        own = self.pool.allocate(self.own_blocks(sequence) - len(reused))
        builder.fresh += own
        sequence.block_table = reused + own
        if sequence.prefix is not None:
            entry = self.residency.acquire(sequence.prefix.key)
            whole = self.residency.whole_blocks(entry)
            sequence.block_table = whole + sequence.block_table
            if len(whole) < len(entry.blocks) and not reused:
                builder.copies.append(BlockCopy(source=entry.blocks[-1], target=own[0]))
        return self.reuse.covered(sequence, len(reused))

    def free(self, sequence: Sequence) -> None:
        """Take everything back from a sequence that stops running."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        if sequence.prefix is not None:
            self.residency.release(sequence.prefix.key)

    def evictable(self, sequence: Sequence | None, *, desperate: bool) -> list[Entry]:
        """Prefixes that may leave for ``sequence`` (not its own), the best to lose first: those
        nobody waits for before those somebody does, least recently used first.

        Those that are pinned, were forced in for somebody or are to leave for somebody stay, unless
        the need is ``desperate``: nothing could run otherwise.
        """
        own = sequence.prefix.key if sequence is not None and sequence.prefix else None
        idle = [
            entry
            for entry in self.residency.idle()
            if entry.key != own and (desperate or not self._is_kept(entry))
        ]
        return sorted(idle, key=self._worth)

    def _is_kept(self, entry: Entry) -> bool:
        awaited = entry.forced and self._waiting.wants(entry.key)
        return awaited or entry.leaving or entry.key in self.pinned

    def _worth(self, entry: Entry) -> tuple[bool, bool, bool]:
        wanted = self._waiting.wants(entry.key)
        return entry.key in self.pinned, wanted and entry.unused, wanted

    def evict(self, builder: StepBuilder, entry: Entry) -> None:
        """Let an idle prefix go; with a host tier it is read back to host memory first."""
        if self.host.takes(entry.num_tokens) and not entry.retired and entry.key not in self.host:
            builder.saves.append(Save(entry.key, entry.num_tokens, tuple(entry.blocks)))
        self.residency.evict(entry)

    def make_room(self, builder: StepBuilder, idle: list[Entry], *, until: int) -> bool:
        """Evict from the front of ``idle`` until that many blocks are free; evicts none and says
        False when all of them would not be enough."""
        if self.pool.num_free + sum(len(entry.blocks) for entry in idle) < until:
            return False
        for entry in idle:
            if self.pool.num_free >= until:
                break
            self.evict(builder, entry)
        return True

    def make_room_for_one(self, builder: StepBuilder, *, desperate: bool) -> bool:
        """See to it that a block is free: evict an idle prefix, else take a compile's blocks back.

        Called before any compile is planned: a planned one must keep its blocks.
        """
        if self.make_room(builder, self.evictable(None, desperate=False), until=1):
            return True
        compiling = [
            entry for entry in self.residency.compiling() if desperate or not self._is_kept(entry)
        ]
        if compiling:
            self.residency.unplace(compiling[-1])
        elif desperate:
            self.make_room(builder, self.evictable(None, desperate=True), until=1)
        return self.pool.num_free > 0

    def check_integrity(self, running: list[Sequence]) -> None:
        """Prove that free + used = total and that every reference is held by a living table."""
        tables = [sequence.block_table for sequence in running]
        self.pool.check_integrity([*tables, *self.residency.tables()])
        self.residency.check_integrity()
        for entry in self.residency:
            users = [s for s in running if s.prefix and s.prefix.key == entry.key]
            assert entry.num_users == len(users), f"{entry} counts users that do not run"

    def __repr__(self) -> str:
        return f"Memory({self.pool}, {self.residency}, {self.host})"
