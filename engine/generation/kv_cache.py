"""The paged KV cache: keys and values of running sequences in blocks of fixed size, handed out from one pool.

Paging (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention") lets
sequences of different lengths share one allocation: token `p` of a sequence lies in block `table[p // block]`, row
`p % block`. The pool is plain Python, so every rank that sees the same requests hands out the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """The free blocks, by number. Last freed is first handed out: it is the likeliest to be in a processor's cache."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def grow(self, num_blocks: int) -> None:
        """Adds blocks up to this number, if it is more than there are; they are handed out last."""
        if num_blocks > self.num_blocks:
            self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
            self.num_blocks = num_blocks

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks, or None (and nothing taken) where fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, blocks: Iterable[int]) -> None:
        self._free.extend(reversed(list(blocks)))
        assert len(self._free) <= self.num_blocks, "a block was freed twice"


class PagedCache:
    """Key and value tensors of one pipeline stage, one pair a local layer: `[blocks, block, kv_heads/tp, head_dim]`.

    Nothing is cleared: rows past a sequence's length hold anything, and paged_attention does not look at them.

    Args:
        kv_shape: (local layers, kv_heads/tp, head_dim), as `decoder.kv_shape` gives it.
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
        """Adds blocks behind those that are here, which are copied, a layer at a time."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty((num_blocks, *old.shape[1:]))
                tensors[layer][: len(old)] = old
        self.num_blocks = num_blocks

    @staticmethod
    def bytes_per_block(kv_shape: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all local layers, keys and values."""
        layers, kv_heads, head_dim = kv_shape
        return 2 * layers * block_size * kv_heads * head_dim * dtype.itemsize
