"""AdamW (Loshchilov & Hutter 2019, decoupled weight decay) over flat fp32 buffers, in place.

g <- grad_scale * grad,   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr * weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

import math

import torch


def adamw_ref_(
    master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0
) -> None:
    """The formula in plain torch. Shapes as in `adamw_`."""
    grad = grad.to(master.dtype) * grad_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    if param_out is not None:
        param_out.copy_(master)


def adamw_(
    master: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    grad: torch.Tensor,
    param_out: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """One AdamW step in place.

    master, exp_avg, exp_avg_sq, grad: fp32 [m]; param_out: [m] of the compute dtype, receives the cast of the new
    master (None when master is the parameter itself). step counts from 1. grad_scale multiplies the gradient
    (clipping, loss scale); grad itself is left alone.
    """
    adamw_ref_(master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
