"""Paged KV cache: keys and values of running sequences in blocks of fixed size, allocated from one pool (Kwon et al.
2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention").

Token `p` of a sequence is in row `p % block` of block `table[p // block]`. Sequences with the same prompt share its
blocks, which are counted by their users. The pool is plain Python: ranks with the same requests allocate the same
blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..transfer import to_device


def blocks_for(tokens: int, block_size: int) -> int:
    """Number of blocks for `tokens` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """Free list of block numbers, and the users of each block; the last freed is allocated first, as the likeliest to
    be in a cache."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, which must be free."""
        assert count <= len(self._free), "more blocks than are free"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._users[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a user to allocated blocks."""
        for block in blocks:
            self._users[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Removes a user from each block; blocks without users are free again."""
        for block in reversed(blocks):
            self._users[block] -= 1
            assert self._users[block] >= 0, "a block was freed twice"
            if not self._users[block]:
                self._free.append(block)


class PagedCache:
    """Keys and values of a pipeline stage: two tensors a local layer, `[blocks + 1, block, kv_heads/tp, head_dim]`.

    Rows past a sequence's length are not initialized; paged_attention does not read them. The last block belongs to no
    sequence: padding rows of a captured step write to it.

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
        self.num_blocks = num_blocks
        shape = (2, layers, num_blocks + 1, block_size, kv_heads, head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)
        self.keys, self.values = self._data.unbind()[0].unbind(), self._data.unbind()[1].unbind()

    def copy(self, blocks: np.ndarray) -> None:
        """Copies blocks in all layers, [blocks, 2] int64: source and destination; no destination is a source."""
        if len(blocks):
            sources, destinations = to_device(blocks, self._data.device).T
            self._data.index_copy_(2, destinations, self._data.index_select(2, sources))

    @staticmethod
    def bytes_per_block(kv_shape: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> int:
        """Bytes of a block over all local layers, keys and values."""
        layers, kv_heads, head_dim = kv_shape
        return 2 * layers * block_size * kv_heads * head_dim * dtype.itemsize
