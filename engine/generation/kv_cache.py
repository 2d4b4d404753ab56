"""Paged KV cache: keys and values of running sequences in blocks of fixed size, allocated from one pool (Kwon et al.
2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention").

Token `p` of a sequence is in row `p % block` of block `table[p // block]`. The pool is plain Python: ranks with the
same requests allocate the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def blocks_for(tokens: int, block_size: int) -> int:
    """Number of blocks for `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Free list of block numbers; the last freed is allocated first, as the likeliest to be in a cache."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def grow(self, num_blocks: int) -> None:
        """Grows the pool to `num_blocks`, if that is more than it has; new blocks are allocated last."""
        if num_blocks > self.num_blocks:
            self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
            self.num_blocks = num_blocks

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` blocks, or none at all (None) if fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: Iterable[int]) -> None:
        self._free.extend(reversed(list(blocks)))
        assert len(self._free) <= self.num_blocks, "a block was freed twice"


class PagedCache:
    """Keys and values of a pipeline stage, a pair of tensors a local layer: `[blocks, block, kv_heads/tp, head_dim]`.

    Rows past a sequence's length are not initialized; paged_attention does not read them.

    Args:
        kv_shape: (local layers, kv_heads/tp, head_dim).
    """

    def __init__(
        self,
        kv_shape: tuple[int, int, int],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layers, kv_heads, head_dim = kv_shape
        self.block_size, self.num_blocks = block_size, num_blocks
        shape = (num_blocks, block_size, kv_heads, head_dim)
        self.keys, self.values = (
            [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in range(2)
        )

    def grow(self, num_blocks: int) -> None:
        """Grows to `num_blocks`, copying the present ones a layer at a time."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty((num_blocks, *old.shape[1:]))
                tensors[layer][: len(old)] = old
        self.num_blocks = num_blocks

    @staticmethod
    def bytes_per_block(kv_shape: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of a block over all local layers, keys and values."""
        layers, kv_heads, head_dim = kv_shape
        return 2 * layers * block_size * kv_heads * head_dim * dtype.itemsize
