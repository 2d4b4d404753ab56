"""Ops that only a GPU has, computed on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.to(dtype) @ b.to(dtype)


def _addmm_out(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    return out.copy_(total + a.to(dtype) @ b.to(dtype))


def _window(window: list[int] | None) -> int | None:
    """Keys that a query sees, from flash-attn's numbers of keys to its left and right."""
    left, right = window or (-1, -1)
    assert right == 0, "not causal"
    return None if left < 0 else left + 1


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, _: Tensor, longest: int, *rest: Any) -> tuple[Tensor, ...]:
    _, _, scale, window = rest[:4]
    given = (bounds.long(), longest, q.shape[-1] ** -0.5 if scale is None else scale, None, _window(window))
    out, stats = torch.ops.trialign.attention(q, k, v, *given)
    largest, inverse = stats.unbind(-1)
    return out, (largest - inverse.log()).T.contiguous(), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, _: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    longest, _, _, _, scale, window = rest
    stats = torch.stack((lse.T, torch.ones_like(lse.T)), -1).contiguous()
    given = (bounds.long(), longest, q.shape[-1] ** -0.5 if scale is None else scale, None, _window(window))
    return torch.ops.trialign.attention_backward(grad.contiguous(), q, k, v, out, stats, *given)


ON_CPU: dict[str, Callable] = {
    "aten.mm.dtype": _mm,
    "aten.addmm.dtype_out": _addmm_out,
    "torch_attn._varlen_attn.default": _varlen,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
}
"""Name of an op -> its computation."""
