"""The block pool refuses what would corrupt its counts."""

import pytest

from prefixd.server.engine.block_pool import BlockPool


def test_a_pool_has_at_least_one_usable_block() -> None:
    with pytest.raises(ValueError, match="at least 2 blocks, got 1"):
        BlockPool(num_blocks=1)
    pool = BlockPool(num_blocks=2)
    assert pool.allocate(1) == [1]
    assert pool.num_free == 0


def test_a_block_released_twice_is_an_error() -> None:
    pool = BlockPool(num_blocks=3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release(blocks)
    pool.check_integrity([])


def test_a_free_block_cannot_be_remembered() -> None:
    pool = BlockPool(num_blocks=3)
    [block] = pool.allocate(1)
    pool.release([block])
    with pytest.raises(AssertionError, match="is free and cannot be remembered"):
        pool.remember(block, b"name")
    assert pool.find(b"name") is None
