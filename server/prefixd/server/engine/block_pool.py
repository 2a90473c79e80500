"""The block pool: which KV blocks are free, and how many block tables refer to each used one."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from prefixd.server.engine.step import NULL_BLOCK


class BlockPool:
    """Reference-counted blocks of KV, by id. Block 0 is the null block and is never allocated.

    ::

        empty --allocate--> held --release--> empty          its content is unknown
                             ^  \\--release--> remembered     free too, but its content is known
                             |                   |   \\
                             +------share--------+    +--allocate--> held (forgotten first)

    Empty blocks are reused last in, first out: leftovers return soon, so that a missing zeroing
    shows in a test instead of in production. Remembered blocks are reused only when no block is
    empty, the least recently used first.
    """

    def __init__(self, *, num_blocks: int) -> None:
        """``num_blocks`` counts the null block too."""
        if num_blocks < 2:
            raise ValueError(f"a block pool needs at least 2 blocks, got {num_blocks}")
        self._references = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._remembered: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._blocks: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks without a reference, remembered ones included."""
        return len(self._empty) + len(self._remembered)

    @property
    def num_remembered(self) -> int:
        """Free blocks whose content may be shared again."""
        return len(self._remembered)

    def references(self, block: int) -> int:
        """How many block tables hold ``block``."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free blocks, with one reference each; the caller checked ``num_free``."""
        assert count <= self.num_free, f"{count} blocks needed, {self.num_free} free"
        blocks = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._remembered.popitem(last=False)
                self._forget_name(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each of ``blocks``, held or remembered."""
        for block in blocks:
            if self._references[block] == 0:
                assert block in self._remembered, f"block {block} is empty and cannot be shared"
                del self._remembered[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of ``blocks``; those without any become free."""
        # Backwards: the end of a remembered run is reused before its start, which is worth more.
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._names:
                    self._remembered[block] = None
                else:
                    self._empty.append(block)

    def remember(self, block: int, name: bytes) -> None:
        """Register a held block under the digest of its content, unless the name is taken."""
        assert self._references[block] > 0, f"block {block} is free and cannot be remembered"
        if name not in self._blocks and block not in self._names:
            self._blocks[name] = block
            self._names[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Remove these blocks from the lookup by content."""
        for block in blocks:
            self._forget_name(block)
            if block in self._remembered:
                del self._remembered[block]
                self._empty.append(block)

    def find(self, name: bytes) -> int | None:
        """The block registered under ``name``, held or free."""
        return self._blocks.get(name)

    def _forget_name(self, block: int) -> None:
        name = self._names.pop(block, None)
        if name is not None:
            del self._blocks[name]

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Prove that free + used = total and that counts equal the references in ``tables``."""
        expected = [0] * len(self._references)
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the block tables"
        assert sorted([*self._empty, *self._remembered]) == [
            block for block, count in enumerate(expected) if count == 0 and block != NULL_BLOCK
        ], "the free lists differ from the unreferenced blocks"
        assert {block: name for name, block in self._blocks.items()} == self._names
        assert set(self._remembered) <= set(self._names), "a remembered block has no name"
        assert not set(self._empty) & set(self._names), "an empty block has a name"

    def __repr__(self) -> str:
        return (
            f"BlockPool(free={self.num_free}/{self.num_usable}, remembered={self.num_remembered})"
        )
