"""The block pool gives each block to one owner; the paged cache has the shapes and bytes it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trialign.engine.generation.kv_cache import BlockPool, PagedCache, blocks_for


@pytest.mark.parametrize("tokens, blocks", [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for_rounds_up(tokens, blocks):
    assert blocks_for(tokens, 16) == blocks


def test_pool_gives_all_or_nothing():
    pool = BlockPool(5)
    first = pool.allocate(3)
    assert first is not None and first == [0, 1, 2]
    assert pool.allocate(3) is None
    assert pool.free_blocks == 2, "a refused request must take nothing"
    pool.free(first)
    assert pool.allocate(3) == first, "the last freed blocks come back first, in their order"
    assert pool.allocate(0) == []
    pool.grow(4)
    assert pool.num_blocks == 5, "a pool does not shrink"
    pool.grow(7)
    assert pool.allocate(4) == [3, 4, 5, 6], "new blocks are handed out last"


def test_pool_notices_a_double_free():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


@given(st.integers(0, 30), st.lists(st.one_of(st.integers(0, 12), st.just(-1)), max_size=60))
def test_pool_never_hands_out_a_block_twice(size, requests):
    """Requests of random sizes (-1 frees the oldest holding): holdings stay disjoint and nothing is lost."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_shapes_and_bytes(dtype):
    kv_shape = (3, 2, 8)
    cache = PagedCache(kv_shape, 5, 4, dtype=dtype, device=torch.device("cpu"))
    tensors = [*cache.keys, *cache.values]
    assert len(cache.keys) == len(cache.values) == 3
    assert all(t.shape == (5, 4, 2, 8) and t.dtype == dtype and t.is_contiguous() for t in tensors)
    assert sum(t.nbytes for t in tensors) == 5 * PagedCache.bytes_per_block(kv_shape, 4, dtype)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    cache.grow(8)
    for number, tensor in enumerate([*cache.keys, *cache.values]):
        assert tensor.shape[0] == 8 and bool((tensor[:5] == number).all())
