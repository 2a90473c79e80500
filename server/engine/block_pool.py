"""The block pool: which KV blocks are free, and how many block tables point at each used one."""

from collections.abc import Iterable

from server.engine.step import NULL_BLOCK


class BlockPool:
    """Reference-counted blocks of KV, by id. Block 0 is the null block and is never handed out.

    Freed blocks are reused last in, first out: leftovers come back soon, so a forgotten zeroing
    shows in a test instead of in production.
    """

    def __init__(self, *, num_blocks: int) -> None:
        """``num_blocks`` counts the null block too."""
        if num_blocks < 2:
            raise ValueError(f"a block pool needs at least 2 blocks, got {num_blocks}")
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))

    @property
    def num_usable(self) -> int:
        """All blocks but the null block."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks nobody refers to."""
        return len(self._free)

    def references(self, block: int) -> int:
        """How many block tables hold ``block``."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Hand out ``count`` blocks with one reference each; the caller checked ``num_free``."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more block table refers to each of ``blocks``."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is free and cannot be shared"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One block table less refers to each of ``blocks``; those nobody holds become free."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} released more often than held"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Prove that free + used = total and that counts equal the references in ``tables``."""
        expected = [0] * len(self._references)
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the block tables"
        assert sorted(self._free) == [
            block for block, count in enumerate(expected) if count == 0 and block != NULL_BLOCK
        ], "the free list differs from the unreferenced blocks"

    def __repr__(self) -> str:
        return f"BlockPool(free={self.num_free}/{self.num_usable})"
