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

from .backends.libraries import library
from .dispatch import choose, register
from .flash_attention import MAX_HEAD_DIM, attention_backward_triton, attention_triton


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
    """Causal mask, ALiBi and window as an additive bias on the scores: [1 or heads, length, length] of like's dtype."""
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
    """torch's fused attention, document by document, where no compiled kernel fits."""
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
    included). On a GPU, in bf16 and fp16 without ALiBi, a library serves (backends/libraries.py), best with int32
    cu_seqlens. Returns [total, heads, d]. ValueError where the shapes do not fit each other, or for a window below 1.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit each other")
    check_heads(q, k.shape[1], k.shape[2], alibi_slopes, window)
    rows = [token_rows(t) for t in (q, k, v)]
    served = library("attention", *rows, cu_seqlens, max_seqlen, scale, alibi_slopes, window)
    if served is not None:
        return served()
    too_wide = q.is_cuda and q.shape[2] > MAX_HEAD_DIM.get(q.dtype, 0)
    if too_wide or choose("attention", q) == "reference":
        return sdpa_attention(q, k, v, cu_seqlens, scale, alibi_slopes, window)
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.contiguous()
    bounds = cu_seqlens.long().contiguous()
    return torch.ops.trialign.attention(*rows, bounds, max_seqlen, scale, alibi_slopes, window)[0]


def check_heads(q: torch.Tensor, kv_heads: int, d: int, alibi_slopes: torch.Tensor | None, window: int | None) -> None:
    """ValueError where queries [n, heads, d] do not fit their keys and slopes, or would see no key."""
    heads = q.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide into groups over {kv_heads} key/value heads")
    if q.shape[2] != d:
        raise ValueError(f"queries have a head dim of {q.shape[2]}, keys one of {d}")
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        raise ValueError(f"ALiBi slopes {list(alibi_slopes.shape)} for {heads} heads: allowed are [{heads}]")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys: must be at least 1, the query's own")


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """x [total, heads, d] with each token's heads side by side in memory, as slices of a fused projection have them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale, alibi_slopes, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, alibi_slopes)


def _backward(ctx, grad, _):
    q, k, v, out, stats, cu_seqlens, alibi_slopes = ctx.saved_tensors
    grads = torch.ops.trialign.attention_backward(
        grad.contiguous(), q, k, v, out, stats, cu_seqlens, ctx.max_seqlen, ctx.scale, alibi_slopes, ctx.window
    )
    return *grads, None, None, None, None, None


# stats [total, heads, 2] fp32: each query's largest score and the reciprocal of its sum of exponentials, for backward.
register(
    "attention",
    lambda q, *_: (q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)),
    _save,
    _backward,
    triton=attention_triton,
)
register(
    "attention_backward",
    lambda grad, *qkv: tuple(t.new_empty(t.shape) for t in qkv[:3]),
    triton=attention_backward_triton,
)
