"""Block pool and paged cache."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trialign.engine.generation.kv_cache import BlockPool, PagedCache, blocks_for


def test_pool_allocates_all_or_nothing():
    assert [blocks_for(tokens, 16) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
    pool = BlockPool(5)
    first = pool.allocate(3)
    assert first is not None and first == [0, 1, 2]
    assert pool.allocate(3) is None and pool.free_blocks == 2
    pool.free(first)
    assert pool.allocate(3) == first, "the last freed blocks are allocated first, in their order"
    pool.grow(4)
    assert pool.num_blocks == 5, "a pool does not shrink"
    pool.grow(7)
    assert pool.allocate(4) == [3, 4, 5, 6], "new blocks are allocated last"
    pool.free(first)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([*first, *first])


@given(st.integers(0, 30), st.lists(st.one_of(st.integers(0, 12), st.just(-1)), max_size=60))
def test_pool_never_allocates_a_block_twice(size, requests):
    """Requests of random sizes; -1 frees the oldest one's blocks."""
    pool, held = BlockPool(size), []
    for request in requests:
        if request < 0:
            if held:
                pool.free(held.pop(0))
            continue
        free = pool.free_blocks
        blocks = pool.allocate(request)
        assert (blocks is None) == (request > free)
        if blocks is not None:
            held.append(blocks)
        flat = [block for blocks in held for block in blocks]
        assert len(set(flat)) == len(flat) and set(flat) <= set(range(size))
        assert pool.free_blocks == size - len(flat)


def test_cache_grows_and_keeps_its_numbers():
    kv_shape, dtype = (3, 2, 8), torch.bfloat16
    cache = PagedCache(kv_shape, 5, 4, dtype=dtype, device=torch.device("cpu"))
    tensors = [*cache.keys, *cache.values]
    assert len(tensors) == 6 and all(t.shape == (5, 4, 2, 8) and t.dtype == dtype for t in tensors)
    assert sum(t.nbytes for t in tensors) == 5 * PagedCache.bytes_per_block(kv_shape, 4, dtype)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    cache.grow(8)
    for number, tensor in enumerate([*cache.keys, *cache.values]):
        assert tensor.shape[0] == 8 and bool((tensor[:5] == number).all())
