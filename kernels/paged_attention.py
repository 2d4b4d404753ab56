"""Decoding over a paged key/value cache: one query a sequence, keys and values in blocks named by a table.

Position p of sequence i lives in row p % block of block block_tables[i, p // block]; its slot is number * block + row.
    S_j = scale * q . k_j + slope * (j - (length - 1)),   o = sum_j softmax_j(S) v_j,   0 <= j < length
"""

from __future__ import annotations

import torch

from .attention import token_rows
from .dispatch import choose, register


def write_kv_ref(k, v, k_cache, v_cache, slots) -> None:
    """Puts row i of k and v into slot slots[i]. Shapes as in `write_kv`."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def paged_attention_ref(q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes=None):
    """Gathers every sequence's blocks and applies the formula in fp32 (fp64 stays). Shapes as in `paged_attention`."""
    batch, heads, d = q.shape
    block, kv = k_cache.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    span = int(lengths.max()) if batch else 0
    table = block_tables[:, : -(-span // block)].long()
    position = torch.arange(table.shape[1] * block, device=q.device)
    hidden = position[None] >= lengths[:, None]  # [b, span]
    key, value = (cache[table].flatten(1, 2).to(wide) for cache in (k_cache, v_cache))  # [b, span, kv, d]
    # Rows past the length may hold anything, NaN included: 0 * NaN must not reach the sum.
    value = value.masked_fill(hidden[:, :, None, None], 0)
    query = q.to(wide).unflatten(1, (kv, heads // kv))  # [b, kv, group, d]
    scores = torch.einsum("bkgd,bskd->bkgs", query, key) * scale
    if alibi_slopes is not None:
        distance = (position[None] - (lengths[:, None] - 1)).to(wide)
        scores = scores + alibi_slopes.to(wide).view(1, kv, heads // kv, 1) * distance[:, None, None]
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bkgs,bskd->bkgd", weights, value).flatten(1, 2).to(q.dtype)


def write_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor):
    """Writes k and v [n, kv, d] into the caches [blocks, block, kv, d] at slots [n] int64, in place."""
    if choose("write_kv", k) == "cpp":
        torch.ops.trialign.write_kv(token_rows(k), token_rows(v), k_cache, v_cache, slots)
    else:
        write_kv_ref(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence over its cached keys and values.

    q [b, heads, d], caches [blocks, block, kv, d], block_tables [b, max_blocks] int32, lengths [b] int32 (>= 1, the
    token just written included), alibi_slopes [heads] fp32. Entries of block_tables past a sequence's length must
    still be valid block numbers. Returns [b, heads, d].
    """
    if choose("paged_attention", q) == "cpp":
        return torch.ops.trialign.paged_attention(
            token_rows(q), k_cache, v_cache, block_tables, lengths, scale, alibi_slopes
        )
    return paged_attention_ref(q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes)


register("write_kv", lambda k, v, k_cache, v_cache, slots: None)
register(
    "paged_attention",
    lambda q, k_cache, v_cache, block_tables, lengths, scale, alibi_slopes: q.new_empty(q.shape),
)
