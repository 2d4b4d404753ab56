"""RMSNorm (Zhang & Sennrich 2019), alone and with the residual added first.

r_i = (mean_j x_ij^2 + eps)^-1/2,   y_ij = x_ij r_i w_j
dx_ij = r_i (g_ij w_j - x_ij r_i^2 / h * sum_k g_ik w_k x_ik),   dw_j = sum_i g_ij x_ij r_i
Everything in fp32, rounded once at the end.
"""

from __future__ import annotations

import torch

from .dispatch import choose, register


def rms_norm_ref(x, weight, eps):
    """The formula in plain torch. Shapes as in `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = wide.square().mean(-1, keepdim=True).add(eps).rsqrt()  # [n, 1]
    return (wide * rstd * weight.to(wide.dtype)).to(x.dtype)


def add_rms_norm_ref(x, residual, weight, eps):
    """The formula in plain torch. Shapes as in `add_rms_norm`."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx, grad, _grad_rstd):
    x, weight, rstd = ctx.saved_tensors
    return *torch.ops.trialign.rms_norm_backward(grad.contiguous(), x, weight, rstd, None), None


def _save_total(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward_total(ctx, grad, grad_total, _grad_rstd):
    total, weight, rstd = ctx.saved_tensors
    through = None if grad_total is None else grad_total.contiguous()
    grad_x, grad_weight = torch.ops.trialign.rms_norm_backward(grad.contiguous(), total, weight, rstd, through)
    return grad_x, grad_x, grad_weight, None


def _rstd(x):
    return x.new_empty(x.shape[0], dtype=torch.float32)


register("rms_norm", lambda x, weight, eps: (torch.empty_like(x), _rstd(x)), _save, _backward)
register(
    "add_rms_norm",
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x), _rstd(x)),
    _save_total,
    _backward_total,
)
register(
    "rms_norm_backward",
    lambda grad, x, weight, rstd, grad_total: (torch.empty_like(x), torch.empty_like(weight)),
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [n, h] times its inverse root mean square over h, times weight [h]. Returns [n, h] in x's dtype."""
    if x.dtype != weight.dtype or choose("rms_norm", x) == "reference":
        return rms_norm_ref(x, weight, eps)
    return torch.ops.trialign.rms_norm(x.contiguous(), weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass. x, residual [n, h], weight [h]."""
    if not x.dtype == residual.dtype == weight.dtype or choose("add_rms_norm", x) == "reference":
        return add_rms_norm_ref(x, residual, weight, eps)
    normed, total, _ = torch.ops.trialign.add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
    return normed, total
