"""Causal attention over packed documents: softmax(scale * q k^T + alibi) v inside each document.

Forward, for the document that starts at s = cu_seqlens[i], query i, key j <= i (and i - j < window):
    S_ij = scale * q_i . k_j + slope * (j - i),   P = softmax_j(S),   o_i = sum_j P_ij v_j
Backward, with D_i = sum_d do_i o_i:
    dv_j = sum_i P_ij do_i,   dS_ij = P_ij (do_i . v_j - D_i)
    dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i
Query heads share key/value heads in groups of heads // kv_heads (GQA).
"""

import math

import torch
import torch.nn.functional as F


def packed_attention_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The formula, document by document, in the inputs' dtype. Shapes as in `packed_attention`."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        query = q[start:end].transpose(0, 1)  # [heads, length, d]
        key = k[start:end].transpose(0, 1).repeat_interleave(group, 0)
        value = v[start:end].transpose(0, 1).repeat_interleave(group, 0)
        scores = (query @ key.transpose(1, 2)) * scale  # [heads, length, length]
        scores = scores + position_bias(end - start, alibi_slopes, window, scores)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


def position_bias(length: int, alibi_slopes: torch.Tensor | None, window: int | None, like: torch.Tensor):
    """What the causal mask, ALiBi and the window add to the scores: [1 or heads, length, length] of like's dtype."""
    position = torch.arange(length, device=like.device)
    distance = position[:, None] - position[None, :]  # [length, length], query minus key
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    bias = torch.zeros(1, length, length, dtype=like.dtype, device=like.device)
    if alibi_slopes is not None:
        bias = (-alibi_slopes.to(like.device)[:, None, None] * distance).to(like.dtype)
    return bias.masked_fill(hidden, -math.inf)


def buckets(lengths: list[int], waste: float = 1.25) -> list[list[int]]:
    """Groups documents whose padding to the longest of the group costs at most `waste` times their own area.

    Attention costs the square of the length, so areas are compared. Returns lists of document indices; documents
    without tokens are left out.
    """
    groups: list[list[int]] = []
    own = 0
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i]):
        area = lengths[i] ** 2
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] ** 2 <= waste * (own + area):
            groups[-1].append(i)
            own += area
        else:
            groups.append([i])
            own = area
    return groups


def _sdpa(q, k, v, scale, alibi_slopes, window):
    """q [n, length, heads, d], k and v [n, length, kv, d] -> [n, length, heads, d]."""
    bias = None
    if alibi_slopes is not None or window is not None:
        bias = position_bias(q.shape[1], alibi_slopes, window, q)[None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        is_causal=bias is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def padded_attention(q, k, v, cu_seqlens, scale, alibi_slopes=None, window=None):
    """Right-pads documents of like length into batches for torch's fused attention.

    Under the causal mask padding needs no mask of its own: padded keys come after every real query.
    """
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    if lengths and min(lengths) == max(lengths) > 0:
        shape = (len(lengths), lengths[0])
        batched = (t.unflatten(0, shape) for t in (q, k, v))
        return _sdpa(*batched, scale, alibi_slopes, window).flatten(0, 1)
    rows, outputs = [], []
    for group in buckets(lengths):
        longest = lengths[group[0]]
        start = torch.tensor([bounds[i] for i in group], device=q.device)
        length = torch.tensor([lengths[i] for i in group], device=q.device)
        step = torch.arange(longest, device=q.device)
        # Padded positions read the document's last token again: any finite value will do.
        index = start[:, None] + torch.minimum(step[None], length[:, None] - 1)  # [n, longest]
        real = (step[None] < length[:, None]).flatten()
        batched = (t[index] for t in (q, k, v))
        outputs.append(_sdpa(*batched, scale, alibi_slopes, window).flatten(0, 1)[real])
        rows.append(index.flatten()[real])
    if not outputs:
        return torch.empty_like(q)
    order = torch.empty(q.shape[0], dtype=torch.int64, device=q.device)
    order[torch.cat(rows)] = torch.arange(q.shape[0], device=q.device)
    return torch.cat(outputs)[order]


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    alibi_slopes: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each document of a packed batch, differentiable in q, k and v.

    q [total, heads, d], k and v [total, kv_heads, d], cu_seqlens [n + 1] (starts at 0, ends at total), max_seqlen the
    longest document, scale usually d ** -0.5, alibi_slopes [heads] fp32, window the number of keys a query sees (itself
    included). Returns [total, heads, d].
    """
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into groups over {k.shape[1]} key/value heads")
    return padded_attention(q, k, v, cu_seqlens, scale, alibi_slopes, window)
