"""Causal attention over packed documents: softmax(scale * q k^T + alibi) v inside each document.

Forward, for the document that starts at s = cu_seqlens[i], query i, key j <= i (and i - j < window):
    S_ij = scale * q_i . k_j + slope * (j - i),   P = softmax_j(S),   o_i = sum_j P_ij v_j
Backward, with D_i = sum_d do_i o_i:
    dv_j = sum_i P_ij do_i,   dS_ij = P_ij (do_i . v_j - D_i)
    dq_i = scale * sum_j dS_ij k_j,   dk_j = scale * sum_i dS_ij q_i
Query heads share key/value heads in groups of heads // kv_heads (GQA).
"""

# The kernels' types are those of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .backends.libraries import library
from .backends.triton_runtime import Spec, cdiv, jit, power_of_2, precision, tl, vendor
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


@jit
def _lift(slope, positions, anchor):
    """slope * (position - anchor). Row i's scores plus its lift are scale * q_i . k_j plus the lift of key j.

    So ALiBi is one addition of a row vector to the scores. The anchor is the block's first row, so that a lift's
    rounding error is below 2^-24 * slope * BLOCK_M for all rows, however long the document.
    """
    return slope * (positions - anchor).to(tl.float32)


@jit
def _scores(q, k, rows, keys, length, lift, scale, window, DOT: tl.constexpr):
    """Lifted scores [rows, keys] with -inf where a key is masked."""
    scores = tl.dot(q, tl.trans(k), input_precision=DOT) * scale + lift[None, :]
    distance = (rows[:, None] - keys[None, :]).to(tl.uint32, bitcast=True)
    visible = distance < window  # 0 <= rows - keys < window; a negative difference is a huge unsigned one
    return tl.where(visible & (keys[None, :] < length), scores, float("-inf"))


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, bounds_ptr, slopes_ptr, alibi, scale, window, q_stride, k_stride, v_stride,
    heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one document; online softmax over the blocks of keys."""
    block, head, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(bounds_ptr + document)
    length = (tl.load(bounds_ptr + document + 1) - start).to(tl.int32)
    if block * BLOCK_M >= length:
        return
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real = (rows[:, None] < length) & (columns[None, :] < D)
    q = tl.load(q_ptr + (start + rows)[:, None] * q_stride + head * D + columns[None, :], mask=real, other=0.0)
    slope = tl.load(slopes_ptr + head, alibi, 0.0)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = tl.maximum(block * BLOCK_M - window + 1, 0) // BLOCK_N * BLOCK_N
    for n in range(first, tl.minimum(length, (block + 1) * BLOCK_M), BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        there = (keys[:, None] < length) & (columns[None, :] < D)
        offset = (start + keys)[:, None]
        k = tl.load(k_ptr + offset * k_stride + (head // GROUP) * D + columns[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + offset * v_stride + (head // GROUP) * D + columns[None, :], mask=there, other=0.0)
        scores = _scores(q, k, rows, keys, length, _lift(slope, keys, block * BLOCK_M), scale, window, DOT)
        risen = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(risen == float("-inf"), 0.0, risen)  # a window can mask a whole block for a row
        weights = tl.exp(scores - level[:, None])
        shrink = tl.exp(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=DOT)
        peak = risen
    inverse = 1.0 / tl.where(rows < length, total, 1.0)  # rows past the document may have no visible key
    token = (start + rows) * heads + head
    tl.store(
        out_ptr + token[:, None] * D + columns[None, :],
        (acc * inverse[:, None]).to(out_ptr.dtype.element_ty),
        mask=real,
    )
    tl.store(stats_ptr + token * 2, peak - _lift(slope, rows, block * BLOCK_M), mask=rows < length)
    tl.store(stats_ptr + token * 2 + 1, inverse, mask=rows < length)


@jit
def _weights(scores, peak, inverse):
    """The forward's softmax weights again, from its stored maximum, lifted, and 1 / sum."""
    return tl.exp(scores - peak[:, None]) * inverse[:, None]


@jit
def _dq_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr, dq_ptr, delta_ptr, bounds_ptr, slopes_ptr, alibi, scale,
    window, q_stride, k_stride, v_stride, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries, and delta = rowsum(do * o) for the kernel below."""
    block, head, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(bounds_ptr + document)
    length = (tl.load(bounds_ptr + document + 1) - start).to(tl.int32)
    if block * BLOCK_M >= length:
        return
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    real = (rows[:, None] < length) & (columns[None, :] < D)
    token = (start + rows) * heads + head
    q = tl.load(q_ptr + (start + rows)[:, None] * q_stride + head * D + columns[None, :], mask=real, other=0.0)
    grad = tl.load(grad_ptr + token[:, None] * D + columns[None, :], mask=real, other=0.0)
    out = tl.load(out_ptr + token[:, None] * D + columns[None, :], mask=real, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + token, delta, mask=rows < length)
    peak = tl.load(stats_ptr + token * 2, mask=rows < length, other=float("inf"))
    inverse = tl.load(stats_ptr + token * 2 + 1, mask=rows < length, other=0.0)
    slope = tl.load(slopes_ptr + head, alibi, 0.0)
    peak += _lift(slope, rows, block * BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = tl.maximum(block * BLOCK_M - window + 1, 0) // BLOCK_N * BLOCK_N
    for n in range(first, tl.minimum(length, (block + 1) * BLOCK_M), BLOCK_N):
        keys = n + tl.arange(0, BLOCK_N)
        there = (keys[:, None] < length) & (columns[None, :] < D)
        offset = (start + keys)[:, None]
        k = tl.load(k_ptr + offset * k_stride + (head // GROUP) * D + columns[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + offset * v_stride + (head // GROUP) * D + columns[None, :], mask=there, other=0.0)
        scores = _scores(q, k, rows, keys, length, _lift(slope, keys, block * BLOCK_M), scale, window, DOT)
        weights = _weights(scores, peak, inverse)
        ds = weights * (tl.dot(grad, tl.trans(v), input_precision=DOT) - delta[:, None])
        acc += tl.dot(ds.to(k.dtype), k, input_precision=DOT)
    tl.store(dq_ptr + token[:, None] * D + columns[None, :], (acc * scale).to(dq_ptr.dtype.element_ty), mask=real)


@jit
def _dkv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr, bounds_ptr, slopes_ptr, alibi, scale,
    window, q_stride, k_stride, v_stride, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys of one key/value head: sums over its query heads and their queries."""
    block, kv_head, document = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(bounds_ptr + document)
    length = (tl.load(bounds_ptr + document + 1) - start).to(tl.int32)
    if block * BLOCK_N >= length:
        return
    keys, columns = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    there = (keys[:, None] < length) & (columns[None, :] < D)
    k = tl.load(k_ptr + (start + keys)[:, None] * k_stride + kv_head * D + columns[None, :], mask=there, other=0.0)
    v = tl.load(v_ptr + (start + keys)[:, None] * v_stride + kv_head * D + columns[None, :], mask=there, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    last = tl.minimum(length, (block + 1) * BLOCK_N + window - 1)
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        slope = tl.load(slopes_ptr + head, alibi, 0.0)
        for m in range(block * BLOCK_N // BLOCK_M * BLOCK_M, last, BLOCK_M):
            rows = m + tl.arange(0, BLOCK_M)
            real = (rows[:, None] < length) & (columns[None, :] < D)
            token = (start + rows) * heads + head
            q = tl.load(q_ptr + (start + rows)[:, None] * q_stride + head * D + columns[None, :], mask=real, other=0.0)
            grad = tl.load(grad_ptr + token[:, None] * D + columns[None, :], mask=real, other=0.0)
            delta = tl.load(delta_ptr + token, mask=rows < length, other=0.0)
            peak = tl.load(stats_ptr + token * 2, mask=rows < length, other=float("inf"))  # padded rows get weight 0
            inverse = tl.load(stats_ptr + token * 2 + 1, mask=rows < length, other=0.0)
            peak += _lift(slope, rows, m)
            scores = _scores(q, k, rows, keys, length, _lift(slope, keys, m), scale, window, DOT)
            weights = _weights(scores, peak, inverse)
            dv += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision=DOT)
            ds = weights * (tl.dot(grad, tl.trans(v), input_precision=DOT) - delta[:, None])
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=DOT)
    token = (start + keys) * (heads // GROUP) + kv_head
    tl.store(dk_ptr + token[:, None] * D + columns[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=there)
    tl.store(dv_ptr + token[:, None] * D + columns[None, :], dv.to(dv_ptr.dtype.element_ty), mask=there)


DOCUMENTS = 65_520  # of one launch: a grid's last axis ends at 65,535; multiples of 16 keep the bounds aligned


def _launches(cu_seqlens: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """(bounds, number of documents) of each launch: as many documents as a grid can hold."""
    total = len(cu_seqlens) - 1
    return [(cu_seqlens[first:], min(DOCUMENTS, total - first)) for first in range(0, total, DOCUMENTS)]


def _reach(window: int | None, max_seqlen: int) -> int:
    """The window as the kernels take it (added to positions, in 32 bits): at most max_seqlen, also without one."""
    return max_seqlen if window is None else min(window, max_seqlen)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) up to head dims 64, 128, 256: the largest blocks that the ahead-of-time
# compiler fits into registers and shared memory on every architecture of the vendor. fp32 has no matrix units: its
# products live in registers, and no block of dq is small enough for head dims beyond 128.
_BLOCKS = {
    "cuda": {
        "forward": ((128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 1)),
        "dq": ((64, 32, 4, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
        "dkv": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
    },
    "hip": {
        "forward": ((64, 32, 4, 2), (64, 32, 4, 1), (64, 16, 8, 1)),
        "dq": ((64, 32, 4, 2), (64, 32, 4, 2), (32, 16, 8, 1)),
        "dkv": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1)),
    },
}
_FP32_BLOCKS = {
    "forward": ((32, 16, 8, 1), (16, 32, 8, 1)),
    "dq": ((32, 32, 8, 1), (16, 16, 8, 1)),
    "dkv": ((32, 16, 8, 1), (16, 16, 8, 2)),
}
MAX_HEAD_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}


def _constants(kernel: str, d: int, group: int, dtype: torch.dtype, gpu: str) -> dict:
    block_d = power_of_2(d, 64)
    assert block_d <= MAX_HEAD_DIM[dtype], f"head_dim {d}"
    blocks = _FP32_BLOCKS if dtype == torch.float32 else _BLOCKS[gpu]
    m, n, warps, stages = blocks[kernel][(block_d > 64) + (block_d > 128)]
    return {
        "GROUP": group, "D": d, "BLOCK_D": block_d, "BLOCK_M": m, "BLOCK_N": n,
        "DOT": precision(dtype), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def _constants_for(kernel: str, q, k) -> dict:
    return _constants(kernel, q.shape[2], q.shape[1] // k.shape[1], q.dtype, vendor())


def _slopes(alibi_slopes, like) -> tuple:
    """(slopes, True), or without ALiBi (any tensor, False): the kernels then read no slopes."""
    return (like, False) if alibi_slopes is None else (alibi_slopes, True)


def attention_triton(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    """(out, stats) as torch.ops.trialign.attention gives them."""
    constants = _constants_for("forward", q, k)
    out = q.new_empty(q.shape)
    stats = q.new_empty(*q.shape[:2], 2, dtype=torch.float32)
    blocks = cdiv(max_seqlen, constants["BLOCK_M"])
    for bounds, documents in _launches(cu_seqlens) if blocks else ():
        _forward_kernel[(blocks, q.shape[1], documents)](
            q, k, v, out, stats, bounds, *_slopes(alibi_slopes, stats), scale, _reach(window, max_seqlen), q.stride(0),
            k.stride(0), v.stride(0), q.shape[1], **constants,
        )  # fmt: skip
    return out, stats


def attention_backward_triton(grad, q, k, v, out, stats, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    """(dq, dk, dv) as torch.ops.trialign.attention_backward gives them."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = stats.new_empty(q.shape[:2])
    strides = (t.stride(0) for t in (q, k, v))
    numbers = (*_slopes(alibi_slopes, stats), scale, _reach(window, max_seqlen), *strides, q.shape[1])
    for bounds, documents in _launches(cu_seqlens) if max_seqlen else ():
        constants = _constants_for("dq", q, k)
        grid = (cdiv(max_seqlen, constants["BLOCK_M"]), q.shape[1], documents)
        _dq_kernel[grid](grad, q, k, v, out, stats, dq, delta, bounds, *numbers, **constants)
        constants = _constants_for("dkv", q, k)
        grid = (cdiv(max_seqlen, constants["BLOCK_N"]), k.shape[1], documents)
        _dkv_kernel[grid](grad, q, k, v, stats, delta, dk, dv, bounds, *numbers, **constants)
    return dq, dk, dv


def _spec(name: str, kernel, tensors: str) -> Spec:
    types = {"stats_ptr": "*fp32", "delta_ptr": "*fp32", "bounds_ptr": "*i64", "slopes_ptr": "*fp32"}
    numbers = {"alibi": "u1", "scale": "fp32", "window": "i32", "heads": "i32"}
    numbers |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i64")
    cuda, hip = (tuple(_constants(name, d, 3, torch.bfloat16, gpu) for d in (64, 128, 256)) for gpu in ("cuda", "hip"))
    signature = {tensor: types.get(tensor, "*bf16") for tensor in tensors.split()} | numbers
    wide = tuple(_constants(name, d, 3, torch.float32, "cuda") for d in (64, 128))
    free, unaligned = ("GROUP", "D"), ("window", "heads")
    return Spec(kernel, signature, cuda, hip, wide, free, dot=True, unaligned=unaligned)


_TENSORS = {
    "forward": (_forward_kernel, "q_ptr k_ptr v_ptr out_ptr stats_ptr bounds_ptr slopes_ptr"),
    "dq": (_dq_kernel, "grad_ptr q_ptr k_ptr v_ptr out_ptr stats_ptr dq_ptr delta_ptr bounds_ptr slopes_ptr"),
    "dkv": (_dkv_kernel, "grad_ptr q_ptr k_ptr v_ptr stats_ptr delta_ptr dk_ptr dv_ptr bounds_ptr slopes_ptr"),
}
SPECS = {name: _spec(name, kernel, tensors) for name, (kernel, tensors) in _TENSORS.items()}


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


# stats [total, heads, 2] fp32: each query's largest score and the reciprocal of its sum of exponentials.
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
