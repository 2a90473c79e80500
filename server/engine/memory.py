"""The blocks of sequences and prefixes together: who holds them, and who gives them back first."""

from server.engine.block_pool import BlockPool
from server.engine.fair_queue import FairQueue
from server.engine.residency import Entry, Residency, Stage
from server.engine.sequence import Sequence
from server.engine.step import BlockCopy


class Memory:
    """One pool, shared by the prefixes in residence and the running sequences."""

    def __init__(self, *, num_blocks: int, block_size: int, waiting: FairQueue) -> None:
        """``num_blocks`` counts the null block; ``waiting`` tells which prefixes are wanted."""
        self.pool = BlockPool(num_blocks=num_blocks)
        self.residency = Residency(pool=self.pool, block_size=block_size)
        self._block_size = block_size
        self._waiting = waiting

    def is_resident(self, sequence: Sequence) -> bool:
        """Whether the prefix of ``sequence``, if it has one, is in the pool."""
        if sequence.prefix is None:
            return True
        entry = self.residency.get(sequence.prefix.key)
        return entry is not None and entry.stage is Stage.RESIDENT

    def table_length(self, sequence: Sequence) -> int:
        """Blocks in the table of ``sequence`` once all its tokens are in the pool."""
        return self.residency.blocks_needed(sequence.num_prefix_tokens + len(sequence.tokens))

    def own_blocks(self, sequence: Sequence) -> int:
        """How many of those are its own; the others it shares with its prefix."""
        return self.table_length(sequence) - sequence.num_prefix_tokens // self._block_size

    def hold(self, sequence: Sequence) -> tuple[list[int], list[BlockCopy]]:
        """Give a starting sequence its block table. Returns its fresh blocks and what to copy.

        The caller has made room. A prefix's last block is never shared for writing: unless it is
        full, its positions are copied into the first block of the sequence's own.
        """
        own = self.pool.allocate(self.own_blocks(sequence))
        sequence.block_table = own
        if sequence.prefix is None:
            return own, []
        entry = self.residency.acquire(sequence.prefix.key)
        whole = self.residency.whole_blocks(entry)
        sequence.block_table = whole + own
        if len(whole) == len(entry.blocks):
            return own, []
        return own, [BlockCopy(source=entry.blocks[-1], target=own[0])]

    def free(self, sequence: Sequence) -> None:
        """Take everything back from a sequence that stops running."""
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        if sequence.prefix is not None:
            self.residency.release(sequence.prefix.key)

    def idle_prefixes(self, sequence: Sequence | None) -> list[Entry]:
        """Prefixes that may leave for ``sequence`` (not its own), the best to lose first: those
        nobody waits for before those somebody does, least recently used first."""
        own = sequence.prefix.key if sequence is not None and sequence.prefix else None
        idle = [entry for entry in self.residency.idle() if entry.key != own]
        return sorted(idle, key=lambda entry: (self._waiting.wants(entry.key), entry.last_used))

    def evict(self, idle: list[Entry], *, until: int) -> bool:
        """Evict from the front of ``idle`` until that many blocks are free; evicts none and says
        False when all of them would not be enough."""
        if self.pool.num_free + sum(len(entry.blocks) for entry in idle) < until:
            return False
        for entry in idle:
            if self.pool.num_free >= until:
                break
            self.residency.evict(entry)
        return True

    def make_room_for_one(self) -> bool:
        """See to it that a block is free: evict an idle prefix, else take a compile's blocks back.

        Called before any compile is planned: a planned one must keep its blocks.
        """
        if self.evict(self.idle_prefixes(None), until=1):
            return True
        if compiling := self.residency.compiling():
            self.residency.unplace(compiling[-1])
        return self.pool.num_free > 0

    def check_integrity(self, running: list[Sequence]) -> None:
        """Prove that free + used = total and that every reference is held by a living table."""
        tables = [sequence.block_table for sequence in running]
        self.pool.check_integrity([*tables, *self.residency.tables()])
        for entry in self.residency:
            users = [s for s in running if s.prefix and s.prefix.key == entry.key]
            assert entry.num_users == len(users), f"{entry} counts users that do not run"

    def __repr__(self) -> str:
        return f"Memory({self.pool}, {self.residency})"
