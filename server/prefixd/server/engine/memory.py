"""The KV of sequences and prefixes together: one pool of blocks, and a tier in host memory."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from prefixd.server.engine.block_pool import BlockPool
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.entries import Entry, Stage
from prefixd.server.engine.kv_reuse import KVReuse
from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.residency import Residency
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import BlockCopy, Save, Step


class HostTier:
    """Compiled prefixes in host memory, which return to the pool by a copy.

    Above ``max_tokens`` virtual tokens the least recently used are dropped; the state of a prefix
    counts as ``state_tokens`` more. ``num_tokens`` are those it holds, without states. ``changed``
    are the keys that came or went since the set was cleared.
    """

    def __init__(self, *, max_tokens: int, state_tokens: int = 0) -> None:
        self._max_tokens = max_tokens
        self._state_tokens = state_tokens
        self._payloads: OrderedDict[PrefixKey, StagedPrefix] = OrderedDict()
        self.num_tokens = 0
        self.changed: set[PrefixKey] = set()

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._payloads

    def __iter__(self) -> Iterator[PrefixKey]:
        return iter(self._payloads)

    def __len__(self) -> int:
        return len(self._payloads)

    def takes(self, num_tokens: int) -> bool:
        """Whether a prefix of this size fits into an empty tier."""
        return num_tokens + self._state_tokens <= self._max_tokens

    def get(self, key: PrefixKey) -> StagedPrefix | None:
        """The compiled prefix, which becomes the most recently used; None when it is not here."""
        payload = self._payloads.get(key)
        if payload is not None:
            self._payloads.move_to_end(key)
        return payload

    def put(self, key: PrefixKey, payload: StagedPrefix) -> None:
        """Keep a compiled prefix, and drop the least recently used ones that no longer fit."""
        self.drop(key)
        if not self.takes(payload.num_tokens):
            return
        self._payloads[key] = payload
        self.changed.add(key)
        self.num_tokens += payload.num_tokens
        while self.num_tokens + len(self) * self._state_tokens > self._max_tokens:
            self.drop(next(iter(self._payloads)))

    def drop(self, key: PrefixKey) -> None:
        """Drop the saved KV of ``key``, if there is any."""
        payload = self._payloads.pop(key, None)
        if payload is not None:
            self.changed.add(key)
            self.num_tokens -= payload.num_tokens

    def __repr__(self) -> str:
        return f"HostTier({len(self)} prefixes, {self.num_tokens}/{self._max_tokens} tokens)"


class Memory:
    """One pool, shared by prefixes, running sequences and KV that may be reused."""

    def __init__(self, config: SchedulerConfig, *, namespace: str) -> None:
        """``namespace`` seeds KV reuse."""
        self.block_size = config.block_size
        self.pool = BlockPool(num_blocks=config.num_blocks)
        self.state_blocks = config.state_blocks
        self.residency = Residency(config, pool=self.pool)
        self.reuse = KVReuse(
            pool=self.pool,
            block_size=config.block_size,
            namespace=namespace,
            enabled=not config.state_blocks,
        )
        self.host = HostTier(
            max_tokens=config.host_tokens, state_tokens=config.state_blocks * config.block_size
        )
        self.saving: set[PrefixKey] = set()  # by a step that was not collected yet

    def take_tier_changes(self) -> dict[PrefixKey, str | None]:
        """How far the prefixes are of which that may have changed since the last call; None: in
        none of the tiers."""
        changed = self.residency.changed | self.host.changed
        self.residency.changed.clear()
        self.host.changed.clear()
        return {key: self._tier(key) for key in changed}

    def _tier(self, key: PrefixKey) -> str | None:
        entry = self.residency.get(key)
        if entry is None:
            return "host" if key in self.host else None
        return entry.tier

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` could start now as far as its prefix is concerned, and those of all
        rows of an ensemble."""
        return all(row.prefix is None or self._is_resident(row.prefix.key) for row in sequence.rows)

    def _is_resident(self, key: PrefixKey) -> bool:
        entry = self.residency.get(key)
        return entry is not None and entry.stage is Stage.RESIDENT

    def is_first_use(self, sequence: Sequence) -> bool:
        """Whether none has started under its prefix, or one of its prefixes, since that was
        compiled."""
        entries = [self.residency.get(row.prefix.key) for row in sequence.rows if row.prefix]
        return any(entry is not None and not entry.num_uses for entry in entries)

    def add_waiters(self, sequence: Sequence) -> None:
        """Count that ``sequence`` waits for its prefix, and an ensemble for those of all rows."""
        alone, background = not sequence.ensemble, sequence.background
        for row in sequence.rows:
            if row.prefix is not None:
                self.residency.add_waiter(row.prefix.key, alone=alone, background=background)

    def remove_waiters(self, sequence: Sequence) -> None:
        """Count that it no longer waits."""
        alone, background = not sequence.ensemble, sequence.background
        for row in sequence.rows:
            if row.prefix is not None:
                self.residency.remove_waiter(row.prefix.key, alone=alone, background=background)

    def adopt_prefix(self, sequence: Sequence) -> None:
        """Give a ready sequence the positions of its prefix in the pool.

        It was admitted with the size in the manifest, which may have been corrected since.
        """
        if sequence.prefix is not None:
            entry = self.residency.get(sequence.prefix.key)
            assert entry is not None
            sequence.num_prefix_tokens = 0 if entry.is_gated else entry.num_tokens

    def own_blocks(self, sequence: Sequence) -> int:
        """Blocks that ``sequence`` does not share with its prefix, once all its tokens are in the
        pool."""
        prefix, size = sequence.num_prefix_tokens, self.block_size
        return -(-(prefix + len(sequence.tokens)) // size) - prefix // size

    def num_side_blocks(self, sequence: Sequence) -> int:
        """Side blocks of ``sequence`` while it runs."""
        return self.state_blocks + sequence.request.num_side_blocks

    def blocks_to_start(self, sequence: Sequence) -> int:
        """Blocks that ``sequence`` does not share with its prefix when it starts."""
        return self.own_blocks(sequence) + self.num_side_blocks(sequence)

    def hold(self, step: Step, sequence: Sequence, reused: list[int]) -> int:
        """Give a starting sequence its block table. Returns how many of its tokens are in it.

        The caller has made room; ``reused`` are the blocks that KV reuse found, which it has shared
        for this table. The last block of a
        prefix is never shared for writing: unless it is full, its positions are copied into the
        sequence's first own block (or are already there, where that block is reused). So is the
        state of the prefix; without a prefix the state is that of fresh blocks.
        """
        own = self.pool.allocate(self.own_blocks(sequence) - len(reused))
        sequence.side_blocks = self.pool.allocate(self.num_side_blocks(sequence))
        step.fresh += own + sequence.side_blocks
        sequence.block_table = reused + own
        if sequence.prefix is not None:
            entry = self.residency.acquire(sequence.prefix.key)
            full, sequence.gated = entry.head(self.block_size), entry.gated
            sequence.block_table = full + sequence.block_table
            if sequence.num_prefix_tokens % self.block_size and not reused:
                step.copies.append(BlockCopy(source=entry.blocks[-1], target=own[0]))
            # Its first side blocks are those of the state; an entry has no others.
            if not entry.is_gated:
                step.copies += map(BlockCopy, entry.side_blocks, sequence.side_blocks)
        return self.reuse.covered(sequence, len(reused))

    def free(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence that stops running."""
        self.pool.release(sequence.block_table)
        self.pool.release(sequence.side_blocks)
        sequence.block_table, sequence.side_blocks, sequence.gated = [], [], None
        if sequence.prefix is not None:
            self.residency.release(sequence.prefix.key)

    def evict(self, step: Step, entry: Entry, *, save: bool) -> None:
        """Evict an idle prefix; with ``save`` and room in the host tier it is read back first."""
        if save and self.host.takes(entry.num_tokens) and entry.key not in self.host:
            blocks, side_blocks = tuple(entry.blocks), tuple(entry.side_blocks)
            step.saves.append(
                Save(entry.key, entry.num_tokens, blocks, side_blocks, entry.gated_from)
            )
            self.saving.add(entry.key)
        self.residency.evict(entry)

    def check_integrity(self, running: list[Sequence]) -> None:
        """Prove that free + used = total and that every reference is held by a living table."""
        tables = [sequence.block_table for sequence in running]
        tables += [entry.blocks for entry in self.residency]
        side = [sequence.side_blocks for sequence in running]
        side += [entry.side_blocks for entry in self.residency]
        self.pool.check_integrity([*tables, *side])
        for block in chain(*side):
            assert self.pool.references(block) == 1, f"side block {block} is shared"
        for sequence in running:
            num_side = self.num_side_blocks(sequence)
            assert len(sequence.side_blocks) == num_side, f"{sequence} lacks side blocks"
        self.residency.check_integrity()
        for entry in self.residency:
            users = [s for s in running if s.prefix and s.prefix.key == entry.key]
            assert entry.num_users == len(users), f"{entry} counts users that do not run"

    def __repr__(self) -> str:
        return f"Memory({self.pool}, {self.residency}, {self.host})"
