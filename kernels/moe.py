"""Mixture of experts, without the experts' matmuls: router, sorting tokens by expert, and the weighted sum back.

    p = softmax(x W^T) in fp32,   the k largest are chosen (ties by index),   w_j = p_j  (normalized: p_j / sum_j p_j)
    dlogit_e = p_e ([e chosen] dw_e - s)  (normalized: w_e (dw_e - s) on the chosen, else 0),   s = sum_j dw_j w_j
    slot s = token * k + choice;   order: slots sorted by expert, stable;   offsets[e]: where expert e's rows start
    rows[r] = x[order[r] // k];   y[t] = sum_j w[t, j] out[position(t, j)],   position the inverse of order
    dout[r] = w[s] dy[t],   dw[s] = out[r] . dy[t]   with s = order[r], t = s // k
No float atomics: counts, ranks and sums have one order, so results repeat bit for bit. The matmuls: grouped_matmul.py.
"""

# The kernels' types are those of Triton's language.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .backends.triton_runtime import Spec, cdiv, jit, tl
from .dispatch import choose, register
from .grouped_matmul import grouped_matmul

__all__ = ["grouped_matmul", "permute", "route", "router_logits", "sort_by_expert", "unpermute"]


def route_ref(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain torch. Shapes as in `route`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    experts = logits.detach().argsort(dim=1, descending=True, stable=True)[:, :k]
    if normalize:  # the softmax over the chosen alone is the same and needs no division
        return logits.gather(1, experts).softmax(1), experts
    return logits.softmax(1).gather(1, experts), experts


def sort_by_expert_ref(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in `sort_by_expert`."""
    flat = experts.flatten()
    counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def permute_ref(x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """The formula in plain torch. Shapes as in `permute`."""
    return x[order // k]


def unpermute_ref(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The formula in plain torch. Shapes as in `unpermute`."""
    position = order.argsort()  # the row of each slot
    return torch.einsum("nkh,nk->nh", rows[position.view(weights.shape)], weights.to(rows.dtype))


@jit
def _route_kernel(
    logits_ptr, weights_ptr, chosen_ptr, n, experts, normalize,
    K: tl.constexpr, PLACES: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens; the k largest, one at a time. NaN counts as the largest."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert, place = tl.arange(0, EXPERTS)[None, :], tl.arange(0, PLACES)[None, :]
    there = (expert < experts) & (row < n)[:, None]
    z = tl.load(logits_ptr + row[:, None] * experts + expert, mask=there, other=0.0).to(tl.float32)
    key = tl.where(expert < experts, tl.where(z == z, z, float("inf")), float("-inf"))
    free = (expert < experts) & (row >= 0)[:, None]
    best = tl.zeros([BLOCK, PLACES], tl.float32)
    which = tl.zeros([BLOCK, PLACES], tl.int32)
    for j in tl.static_range(K):
        top = tl.max(tl.where(free, key, float("-inf")), 1)
        index = tl.min(tl.where(free & (key == top[:, None]), expert, EXPERTS), 1)
        hit = expert == index[:, None]
        best = tl.where(place == j, tl.sum(tl.where(hit, z, 0.0), 1)[:, None], best)
        which = tl.where(place == j, index[:, None], which)
        free = free & (expert != index[:, None])
    peak = tl.sum(tl.where(place == 0, best, 0.0), 1)[:, None]
    mass = tl.where(place < K, tl.exp(best - peak), 0.0)
    total = tl.sum(mass, 1)
    if not normalize:
        total = tl.sum(tl.where(expert < experts, tl.exp(z - peak), 0.0), 1)
    mask = (place < K) & (row < n)[:, None]
    tl.store(weights_ptr + row[:, None] * K + place, mass / total[:, None], mask=mask)
    tl.store(chosen_ptr + row[:, None] * K + place, which.to(tl.int64), mask=mask)


@jit
def _route_backward_kernel(
    grad_ptr, logits_ptr, weights_ptr, chosen_ptr, out_ptr, n, experts, normalize,
    K: tl.constexpr, PLACES: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens; the softmax is recomputed from a chosen logit and its weight."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert, place = tl.arange(0, EXPERTS)[None, :], tl.arange(0, PLACES)[None, :]
    there, mask = (expert < experts) & (row < n)[:, None], (place < K) & (row < n)[:, None]
    slot = row[:, None] * K + place
    grad, weight = tl.load(grad_ptr + slot, mask=mask, other=0.0), tl.load(weights_ptr + slot, mask=mask, other=0.0)
    chosen = tl.load(chosen_ptr + slot, mask=mask, other=0)
    s = tl.sum(grad * weight, 1)[:, None]
    d = tl.zeros([BLOCK, EXPERTS], tl.float32)
    if not normalize:
        z = tl.load(logits_ptr + row[:, None] * experts + expert, mask=there, other=0.0).to(tl.float32)
        first = tl.sum(tl.where(place == 0, chosen, 0), 1)[:, None]
        peak = tl.sum(tl.where(expert == first, z, 0.0), 1)[:, None]
        d -= s * tl.sum(tl.where(place == 0, weight, 0.0), 1)[:, None] * tl.exp(z - peak)
    for j in tl.static_range(K):
        index = tl.sum(tl.where(place == j, chosen, 0), 1)[:, None]
        own = tl.sum(tl.where(place == j, weight * (grad - s), 0.0), 1)[:, None]
        d = tl.where(expert == index, own, d)
    tl.store(out_ptr + row[:, None] * experts + expert, d.to(out_ptr.dtype.element_ty), mask=there)


@jit
def _count_kernel(experts_ptr, counts_ptr, slots, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Number of a block's slots for each expert, counts [blocks, EXPERTS]."""
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(experts_ptr + slot, mask=slot < slots, other=-1)
    hits = (own[:, None] == expert[None, :]).to(tl.int32)
    tl.store(counts_ptr + block * EXPERTS + expert, tl.sum(hits, 0))


@jit
def _rank_kernel(experts_ptr, starts_ptr, order_ptr, slots, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Each slot to its row: where its block's part of the expert starts, plus its rank inside the block."""
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(experts_ptr + slot, mask=slot < slots, other=-1)
    hits = (own[:, None] == expert[None, :]).to(tl.int32)
    starts = tl.load(starts_ptr + block * EXPERTS + expert)
    row = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + starts[None, :]), 1)
    tl.store(order_ptr + row, slot.to(tl.int64), mask=slot < slots)


@jit
def _permute_kernel(x_ptr, order_ptr, rows_ptr, h, K: tl.constexpr, BLOCK: tl.constexpr):
    """Part of one row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(order_ptr + row) // K
    tl.store(rows_ptr + row * h + column, tl.load(x_ptr + token * h + column, mask=column < h), mask=column < h)


@jit
def _unpermute_kernel(
    rows_ptr, position_ptr, weights_ptr, out_ptr, h, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Part of one token: the sum of its K rows."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in range(K):
        row = tl.load(position_ptr + token * K + j)
        value = tl.load(rows_ptr + row * h + column, mask=column < h, other=0.0).to(tl.float32)
        acc += value * tl.load(weights_ptr + token * K + j) if WEIGHTED else value
    tl.store(out_ptr + token * h + column, acc.to(out_ptr.dtype.element_ty), mask=column < h)


@jit
def _unpermute_backward_kernel(
    grad_ptr, rows_ptr, order_ptr, weights_ptr, grad_rows_ptr, grad_weights_ptr, h, K: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: its gradient and that of its weight."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order_ptr + row)
    token, weight = slot // K, tl.load(weights_ptr + slot)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, h, BLOCK):
        column = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + token * h + column, mask=column < h, other=0.0).to(tl.float32)
        acc += grad * tl.load(rows_ptr + row * h + column, mask=column < h, other=0.0).to(tl.float32)
        grad = (grad * weight).to(grad_rows_ptr.dtype.element_ty)
        tl.store(grad_rows_ptr + row * h + column, grad, mask=column < h)
    tl.store(grad_weights_ptr + slot, tl.sum(acc, 0))


MAX_EXPERTS, MAX_CHOICES = 512, 16
_COLUMNS = (16, 64, 256, MAX_EXPERTS)


def _columns(experts: int) -> int:
    columns = next((columns for columns in _COLUMNS if columns >= experts), 0)
    if not columns:
        raise ValueError(f"{experts} experts: the Triton kernels take up to {MAX_EXPERTS}")
    return columns


def _ranking(experts: int) -> dict:
    groups = _columns(experts)
    return {"EXPERTS": groups, "BLOCK": min(128, 16384 // groups), "num_warps": 4, "num_stages": 1}


def sort_by_expert_triton(experts, num_experts):
    """`sort_by_expert` on a GPU: block counts, their running sum, ranks."""
    slots, constants = experts.numel(), _ranking(num_experts)
    groups, blocks = constants["EXPERTS"], cdiv(slots, constants["BLOCK"])
    counts = experts.new_zeros(blocks, groups, dtype=torch.int32)
    order = experts.new_empty(slots, dtype=torch.int64)
    if slots:
        _count_kernel[(blocks,)](experts, counts, slots, **constants)
    by_expert = counts.t().reshape(-1)  # [groups * blocks]: the order the rows are laid out in
    starts = (by_expert.cumsum(0) - by_expert).view(groups, blocks).t().contiguous().int()
    if slots:
        _rank_kernel[(blocks,)](experts, starts, order, slots, **constants)
    offsets = torch.nn.functional.pad(counts.sum(0)[:num_experts].cumsum(0), (1, 0))
    return order, offsets


def _routing(experts: int, k: int) -> dict:
    if k > MAX_CHOICES:
        raise ValueError(f"{k} of {experts} experts: the Triton kernels choose up to {MAX_CHOICES}")
    columns = _columns(experts)
    return {
        "K": k, "PLACES": MAX_CHOICES, "EXPERTS": columns,
        "BLOCK": max(1, min(16, 512 // columns)),  # limited by registers
        "num_warps": 4, "num_stages": 1,
    }  # fmt: skip


def route_triton(logits, k, normalize):
    """torch.ops.trialign.route on a GPU."""
    (n, experts), constants = logits.shape, _routing(logits.shape[1], k)
    weights = logits.new_empty(n, k, dtype=torch.float32)
    chosen = logits.new_empty(n, k, dtype=torch.int64)
    if n:
        _route_kernel[(cdiv(n, constants["BLOCK"]),)](logits, weights, chosen, n, experts, normalize, **constants)
    return weights, chosen


def route_backward_triton(grad, logits, weights, experts, normalize):
    """torch.ops.trialign.route_backward on a GPU."""
    n, constants = len(logits), _routing(logits.shape[1], weights.shape[1])
    out = torch.empty_like(logits)
    if n:
        grid = (cdiv(n, constants["BLOCK"]),)
        sizes = n, logits.shape[1], normalize
        _route_backward_kernel[grid](grad, logits, weights, experts, out, *sizes, **constants)
    return out


_ROW = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}


def permute_triton(x, order, k):
    """torch.ops.trialign.permute on a GPU."""
    h = x.shape[1]
    rows = x.new_empty(len(order), h)
    if rows.numel():
        _permute_kernel[(len(order), cdiv(h, _ROW["BLOCK"]))](x, order, rows, h, K=k, **_ROW)
    return rows


def unpermute_triton(rows, order, weights, k):
    """torch.ops.trialign.unpermute on a GPU."""
    n, h = len(order) // k, rows.shape[1]
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    out = rows.new_empty(n, h)
    if out.numel():
        _unpermute_kernel[(n, cdiv(h, _ROW["BLOCK"]))](
            rows, position, weights, out, h, K=k, WEIGHTED=weights is not None, **_ROW
        )
    return out


def unpermute_backward_triton(grad, rows, order, weights):
    """torch.ops.trialign.unpermute_backward on a GPU."""
    h = rows.shape[1]
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    if len(order):
        _unpermute_backward_kernel[(len(order),)](
            grad, rows, order, weights, grad_rows, grad_weights, h, K=weights.shape[1], **_ROW
        )
    return grad_rows, grad_weights


_RANKS = tuple(map(_ranking, _COLUMNS))
_ROUTES = tuple(_routing(experts, 4) for experts in _COLUMNS)
_ROUTED = {"weights_ptr": "*fp32", "chosen_ptr": "*i64", "n": "i32", "experts": "i32", "normalize": "u1"}
SPECS = {
    "route": Spec(
        _route_kernel, {"logits_ptr": "*bf16"} | _ROUTED, _ROUTES, free=("K",), unaligned=("n", "experts"),
    ),
    "route_backward": Spec(
        _route_backward_kernel, {"grad_ptr": "*fp32", "logits_ptr": "*bf16", "out_ptr": "*bf16"} | _ROUTED, _ROUTES,
        free=("K",), unaligned=("n", "experts"),
    ),
    "count": Spec(
        _count_kernel, {"experts_ptr": "*i64", "counts_ptr": "*i32", "slots": "i32"}, _RANKS, unaligned=("slots",),
    ),
    "rank": Spec(
        _rank_kernel, {"experts_ptr": "*i64", "starts_ptr": "*i32", "order_ptr": "*i64", "slots": "i32"}, _RANKS,
        unaligned=("slots",),
    ),
    "permute": Spec(
        _permute_kernel, {"x_ptr": "*bf16", "order_ptr": "*i64", "rows_ptr": "*bf16", "h": "i32"},
        (_ROW | {"K": 8},), free=("K",),
    ),
    "unpermute": Spec(
        _unpermute_kernel,
        {"rows_ptr": "*bf16", "position_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*bf16", "h": "i32"},
        tuple(_ROW | {"K": 8, "WEIGHTED": weighted} for weighted in (True, False)), free=("K",),
    ),
    "unpermute_backward": Spec(
        _unpermute_backward_kernel,
        dict.fromkeys(("grad_ptr", "rows_ptr", "grad_rows_ptr"), "*bf16")
        | {"order_ptr": "*i64", "weights_ptr": "*fp32", "grad_weights_ptr": "*fp32", "h": "i32"},
        (_ROW | {"K": 8},), free=("K",),
    ),
}  # fmt: skip


def _save_route(ctx, inputs, output) -> None:
    logits, _, ctx.normalize = inputs
    ctx.save_for_backward(logits, *output)


def _route_backward(ctx, grad, _):
    return torch.ops.trialign.route_backward(grad.contiguous(), *ctx.saved_tensors, ctx.normalize), None, None


def _save_permute(ctx, inputs, output) -> None:
    _, order, ctx.k = inputs
    ctx.save_for_backward(order)


def _permute_backward(ctx, grad):
    (order,) = ctx.saved_tensors
    return torch.ops.trialign.unpermute(grad.contiguous(), order, None, ctx.k), None, None


def _save_unpermute(ctx, inputs, output) -> None:
    rows, order, weights, ctx.k = inputs
    ctx.save_for_backward(rows, order, weights)


def _unpermute_backward(ctx, grad):
    rows, order, weights = ctx.saved_tensors
    grad = grad.contiguous()
    if weights is None:
        return torch.ops.trialign.permute(grad, order, ctx.k), None, None, None
    grad_rows, grad_weights = torch.ops.trialign.unpermute_backward(grad, rows, order, weights)
    return grad_rows, None, grad_weights, None


register(
    "route",
    lambda logits, k, normalize: (
        logits.new_empty(logits.shape[0], k, dtype=torch.float32),
        logits.new_empty(logits.shape[0], k, dtype=torch.int64),
    ),
    _save_route,
    _route_backward,
    route_triton,
)
register(
    "route_backward",
    lambda grad, logits, weights, experts, normalize: torch.empty_like(logits),
    triton=route_backward_triton,
)
register(
    "sort_by_expert",
    lambda experts, num_experts: (experts.new_empty(experts.numel()), experts.new_empty(num_experts + 1)),
    triton=sort_by_expert_triton,
)
register(
    "permute",
    lambda x, order, k: x.new_empty(order.shape[0], x.shape[1]),
    _save_permute,
    _permute_backward,
    permute_triton,
)
register(
    "unpermute",
    lambda rows, order, weights, k: rows.new_empty(order.shape[0] // k, rows.shape[1]),
    _save_unpermute,
    _unpermute_backward,
    unpermute_triton,
)
register(
    "unpermute_backward",
    lambda grad, rows, order, weights: (torch.empty_like(rows), torch.empty_like(weights)),
    triton=unpermute_backward_triton,
)


class _RouterProduct(torch.autograd.Function):
    """x W^T with an fp32 result; x is kept in its own dtype."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == weight.dtype != torch.float32:  # products of halves are exact in fp32
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return torch.mm(x.float(), weight.float().t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = (grad @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, (grad.t() @ x.float()).to(weight.dtype) if ctx.needs_input_grad[1] else None


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits [n, experts] fp32 of tokens x [n, h] by the router's weight [experts, h]. Differentiable in both."""
    return _RouterProduct.apply(x, weight)


def route(logits: torch.Tensor, k: int, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, k] fp32 (differentiable in the logits) and experts [n, k] int64 of router logits [n, experts].

    The largest comes first; normalize: a token's weights sum to 1. ValueError where k is not in 1 to experts.
    """
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-{k} of {logits.shape[1]} experts: k must be from 1 to {logits.shape[1]}")
    if choose("route", logits) == "reference":
        return route_ref(logits, k, normalize)
    return torch.ops.trialign.route(logits.contiguous(), k, normalize)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order [n * k] int64 of the slots sorted by expert (stable), and offsets [num_experts + 1] int64 of their rows.

    experts [n, k] int64 in [0, num_experts).
    """
    if choose("sort_by_expert", experts) == "reference":
        return sort_by_expert_ref(experts, num_experts)
    return torch.ops.trialign.sort_by_expert(experts.long().contiguous(), num_experts)


def permute(x: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """Rows [n * k, h] in expert order of tokens x [n, h]: one copy for each of a token's k experts. Differentiable.

    ValueError where the order [n * k] does not fit them.
    """
    if k < 1 or order.shape != (len(x) * k,):
        raise ValueError(f"order {list(order.shape)} does not fit {len(x)} tokens of {k} slots each")
    if choose("permute", x) == "reference":
        return permute_ref(x, order, k)
    return torch.ops.trialign.permute(x.contiguous(), order.contiguous(), k)


def unpermute(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Tokens [n, h] out of rows [n * k, h] in expert order: the sum of a token's k rows, weighted by weights [n, k].

    Summed in fp32 whatever the rows are; differentiable in rows and weights. ValueError where sizes do not fit.
    """
    if not len(rows) == len(order) == weights.numel():
        raise ValueError(f"rows {list(rows.shape)}, order {list(order.shape)} and weights {list(weights.shape)} differ")
    if choose("unpermute", rows) == "reference":
        return unpermute_ref(rows, order, weights)
    packed = rows.contiguous(), order.contiguous(), weights.float().contiguous()
    return torch.ops.trialign.unpermute(*packed, weights.shape[1])
