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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [n, h] times its inverse root mean square over h, times weight [h]. Returns [n, h] in x's dtype."""
    return rms_norm_ref(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass. x, residual [n, h], weight [h]."""
    return add_rms_norm_ref(x, residual, weight, eps)
