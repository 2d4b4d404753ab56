"""Causal attention over packed documents: softmax(scale * q k^T + alibi) v inside each document.

Forward, for the document that starts at s = cu_seqlens[i], query i, key j <= i (and i - j < window):
    S_ij = scale * q_i . k_j + slope * (j - i),   P = softmax_j(S),   o_i = sum_j P_ij v_j
Backward, with D_i = sum_d do_i o_i:
    dv_j = sum_i P_ij do_i,   dS_ij = P_ij (do_i . v_j - D_i)
    dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i
Query heads share key/value heads in groups of heads // kv_heads (GQA).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .dispatch import choose, register


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


def sdpa_attention(q, k, v, cu_seqlens, scale, alibi_slopes=None, window=None):
    """torch's fused attention, document by document: what serves without a compiled kernel."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        query, key, value = (t[start:end].transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, length, d]
        bias = None
        if alibi_slopes is not None or window is not None:
            bias = position_bias(end - start, alibi_slopes, window, q)[None]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(q)


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
    if choose("attention", q) == "cpp":
        q, k, v = (token_rows(t) for t in (q, k, v))
        return torch.ops.trialign.attention(q, k, v, cu_seqlens.long(), scale, alibi_slopes, window)[0]
    return sdpa_attention(q, k, v, cu_seqlens, scale, alibi_slopes, window)


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """x [total, heads, d] with each token's heads side by side in memory, as slices of a fused projection have them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.scale, alibi_slopes, ctx.window = inputs
    ctx.save_for_backward(q, k, v, output[1], cu_seqlens, alibi_slopes)


def _backward(ctx, grad, _):
    q, k, v, stats, cu_seqlens, alibi_slopes = ctx.saved_tensors
    grads = torch.ops.trialign.attention_backward(
        grad.contiguous(), q, k, v, stats, cu_seqlens, ctx.scale, alibi_slopes, ctx.window
    )
    return *grads, None, None, None, None


# stats [total, heads, 2] fp32: each query's largest score and the reciprocal of its sum of exponentials.
register(
    "attention",
    lambda q, k, v, cu_seqlens, scale, alibi_slopes, window: (
        q.new_empty(q.shape),
        q.new_empty(*q.shape[:2], 2, dtype=torch.float32),
    ),
    _save,
    _backward,
)
register(
    "attention_backward",
    lambda grad, q, k, v, stats, cu_seqlens, scale, alibi_slopes, window: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
    ),
)
