"""AdamW (Loshchilov & Hutter 2019, decoupled weight decay) over flat fp32 buffers, in place.

g <- grad_scale * grad,   m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
p <- (1 - lr * weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
"""

from __future__ import annotations

import math

import torch

from .backends.libraries import library
from .backends.triton_runtime import Spec, cdiv, jit, tl
from .dispatch import choose, register


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


@jit
def _adamw_kernel(
    master_ptr, exp_avg_ptr, exp_avg_sq_ptr, grad_ptr, out_ptr, n,
    beta1, beta2, decay, rate, correction, eps, grad_scale, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = i < n
    grad = tl.load(grad_ptr + i, mask=real, other=0.0) * grad_scale
    exp_avg = tl.load(exp_avg_ptr + i, mask=real, other=0.0)
    exp_avg += (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + i, mask=real, other=0.0) * beta2 + grad * grad * (1 - beta2)
    master = tl.load(master_ptr + i, mask=real, other=0.0) * decay
    master -= rate * exp_avg / (tl.sqrt(exp_avg_sq) * correction + eps)
    tl.store(master_ptr + i, master, mask=real)
    tl.store(exp_avg_ptr + i, exp_avg, mask=real)
    tl.store(exp_avg_sq_ptr + i, exp_avg_sq, mask=real)
    if COPY:
        tl.store(out_ptr + i, master.to(out_ptr.dtype.element_ty), mask=real)


def _constants(copy: bool) -> dict:
    return {"COPY": copy, "BLOCK": 1024, "num_warps": 4, "num_stages": 1}


def adamw_triton(
    master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, grad_scale
) -> None:
    """torch.ops.trialign.adamw on a GPU."""
    n, constants = master.numel(), _constants(param_out is not None)
    if n:
        _adamw_kernel[(cdiv(n, constants["BLOCK"]),)](
            master, exp_avg, exp_avg_sq, grad, param_out, n, beta1, beta2, 1 - lr * weight_decay,
            lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), eps, grad_scale,
            **constants,
        )  # fmt: skip


SPECS = {
    "adamw": Spec(
        _adamw_kernel,
        dict.fromkeys(("master_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "grad_ptr"), "*fp32")
        | {"out_ptr": "*bf16", "n": "i64"}
        | dict.fromkeys(("beta1", "beta2", "decay", "rate", "correction", "eps", "grad_scale"), "fp32"),
        tuple(map(_constants, (False, True))),
        unaligned=("n",),
    )
}


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
    (clipping, loss scale); grad itself is not changed. ValueError where the sizes differ.
    """
    buffers = (master, exp_avg, exp_avg_sq, grad, param_out)
    if any(b is not None and b.shape != master.shape for b in buffers):
        shapes = ", ".join(str(list(b.shape)) for b in buffers if b is not None)
        raise ValueError(f"master, moments, gradient and parameter differ in size: {shapes}")
    arguments = (*buffers, lr, beta1, beta2, eps, weight_decay, step, grad_scale)
    update = adamw_ref_
    # torch's fused step was measured slower: it needs separate passes to scale the gradient and to copy out.
    if choose("adamw", master if param_out is None else param_out) != "reference" and _is_flat(buffers):
        served = library("adamw", *arguments)
        if served is not None:
            served()
            return
        update = torch.ops.trialign.adamw
    update(*arguments)


def _is_flat(buffers) -> bool:
    """True for contiguous fp32 buffers, the last (the copy-out) of any dtype."""
    return all(b.dtype == torch.float32 for b in buffers[:4]) and all(b is None or b.is_contiguous() for b in buffers)


register("adamw", lambda *args: None, triton=adamw_triton)
