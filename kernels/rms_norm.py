"""RMSNorm (Zhang & Sennrich 2019), alone and with the residual added first.

r_i = (mean_j x_ij^2 + eps)^-1/2,   y_ij = x_ij r_i w_j
dx_ij = r_i (g_ij w_j - x_ij r_i^2 / h * sum_k g_ik w_k x_ik),   dw_j = sum_i g_ij x_ij r_i
Everything in fp32, rounded once at the end.
"""

from __future__ import annotations

import torch

from .backends.libraries import library
from .backends.triton_runtime import Spec, cdiv, jit, tl, vendor
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


def rms_norm_backward_ref(grad, x, weight, rstd, grad_total):
    """(d x, d weight) by the formula in plain torch; arguments as those of torch.ops.trialign.rms_norm_backward."""
    r = rstd[:, None]  # [n, 1]
    g, v, w = grad.to(r.dtype), x.to(r.dtype), weight.to(r.dtype)
    d = r * (g * w - v * (r * r * (g * w * v).mean(1, keepdim=True)))
    if grad_total is not None:
        d += grad_total
    return d.to(x.dtype), (g * v * r).sum(0).to(weight.dtype)


@jit
def _forward(x, residual, weight, y, total, rstd, n, h, eps, add, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows a program, several where they are short (heads of a q or k norm). Without a residual, masks leave its
    memory and the total's untouched."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n)[:, None] & (column < h)[None, :]
    place = row[:, None] * h + column[None, :]
    v = tl.load(x + place, inside, 0.0).to(tl.float32)
    v += tl.load(residual + place, inside & add, 0.0).to(tl.float32)
    v = v.to(total.dtype.element_ty)  # normalize the rounded sum, which the next layer gets
    tl.store(total + place, v, inside & add)
    v = v.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(v * v, 1) / h + eps)
    tl.store(rstd + row, r, row < n)
    w = tl.load(weight + column, column < h, 0.0).to(tl.float32)
    tl.store(y + place, v * r[:, None] * w[None, :], inside)


@jit
def _gradient(
    grad, x, weight, rstd, through, grad_x, partial, n, h, add, STEPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS times ROWS rows a program, which writes its part of d weight to partial[program]: no atomics, so sums
    repeat."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, column < h, 0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(STEPS):
        row = (program * STEPS + i) * ROWS + tl.arange(0, ROWS)
        mask = (row < n)[:, None] & (column < h)[None, :]
        place = row[:, None] * h + column[None, :]
        g = tl.load(grad + place, mask, 0.0).to(tl.float32)
        v = tl.load(x + place, mask, 0.0).to(tl.float32)
        r = tl.load(rstd + row, row < n, 0.0)[:, None]
        grad_weight += g * v * r
        d = r * (g * w - v * (r * r / h * tl.sum(g * w * v, 1, keep_dims=True)))
        d += tl.load(through + place, mask & add, 0.0).to(tl.float32)
        tl.store(grad_x + place, d, mask)
    tl.store(partial + program * h + column, tl.sum(grad_weight, 0), column < h)


STEPS = 16
_BLOCKS = (128, 256, 1024, 2048, 4096, 8192, 16384)
MAX_GRADIENT = 8192
"""The longest rows of the gradient's kernel; one of 16384 would spill on every NVIDIA architecture."""


def _constants(h: int) -> dict:
    block = next((b for b in _BLOCKS if b >= h), 0)
    if not block:
        raise ValueError(f"rows of {h}: the Triton RMSNorm takes up to {_BLOCKS[-1]}")
    return {
        "ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": min(16, max(2, block // 512)), "num_stages": 3
    }  # fmt: skip


def _gradient_constants(h: int, gpu: str) -> dict:
    """Twice the warps for long rows, whose fp32 sums would spill; AMD's blocks have no more than 16."""
    constants = _constants(h)
    warps = 32 if constants["BLOCK"] > 4096 and gpu == "cuda" else constants["num_warps"]
    return constants | {"STEPS": STEPS, "num_warps": warps}


def rms_norm_triton(x, weight, eps):
    """(y, rstd) by Triton; arguments as those of torch.ops.trialign.rms_norm."""
    y, rstd = torch.empty_like(x), _rstd(x)
    _launch_forward(x, x, weight, y, y, rstd, eps, False)
    return y, rstd


def add_rms_norm_triton(x, residual, weight, eps):
    """(y, total, rstd) by Triton; arguments as those of torch.ops.trialign.add_rms_norm."""
    y, total, rstd = torch.empty_like(x), torch.empty_like(x), _rstd(x)
    _launch_forward(x, residual, weight, y, total, rstd, eps, True)
    return y, total, rstd


def _launch_forward(x, residual, weight, y, total, rstd, eps, add):
    (n, h), constants = x.shape, _constants(x.shape[1])
    if n:
        grid = (cdiv(n, constants["ROWS"]),)
        _forward[grid](x, residual, weight, y, total, rstd, n, h, eps, add, **constants)


def rms_norm_backward_triton(grad, x, weight, rstd, grad_total):
    """(d x, d weight) by Triton; arguments as those of torch.ops.trialign.rms_norm_backward."""
    n, h = x.shape
    if h > MAX_GRADIENT:
        return rms_norm_backward_ref(grad, x, weight, rstd, grad_total)
    constants = _gradient_constants(h, vendor())
    programs = cdiv(n, STEPS * constants["ROWS"])
    grad_x, partial = torch.empty_like(x), x.new_empty(programs, h, dtype=torch.float32)
    through = grad if grad_total is None else grad_total
    if n:
        _gradient[(programs,)](
            grad, x, weight, rstd, through, grad_x, partial, n, h, grad_total is not None, **constants
        )
    return grad_x, partial.sum(0).to(weight.dtype)


_GRADIENTS = tuple(block for block in _BLOCKS if block <= MAX_GRADIENT)
SPECS = {
    "forward": Spec(
        _forward,
        dict.fromkeys(("x", "residual", "weight", "y", "total"), "*bf16")
        | {"rstd": "*fp32", "n": "i32", "h": "i32", "eps": "fp32", "add": "u1"},
        tuple(map(_constants, _BLOCKS)),
        unaligned=("n",),
    ),
    "gradient": Spec(
        _gradient,
        dict.fromkeys(("grad", "x", "weight", "through", "grad_x"), "*bf16")
        | {"rstd": "*fp32", "partial": "*fp32", "n": "i32", "h": "i32", "add": "u1"},
        tuple(_gradient_constants(block, "cuda") for block in _GRADIENTS),
        tuple(_gradient_constants(block, "hip") for block in _GRADIENTS),
        unaligned=("n",),
    ),
}


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


register("rms_norm", lambda x, weight, eps: (torch.empty_like(x), _rstd(x)), _save, _backward, rms_norm_triton)
register(
    "add_rms_norm",
    lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x), _rstd(x)),
    _save_total,
    _backward_total,
    add_rms_norm_triton,
)
register(
    "rms_norm_backward",
    lambda grad, x, weight, rstd, grad_total: (torch.empty_like(x), torch.empty_like(weight)),
    triton=rms_norm_backward_triton,
)


def _check_shapes(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or residual.shape != x.shape or weight.shape != x.shape[1:]:
        shapes = [list(t.shape) for t in (x, residual, weight)]
        raise ValueError(f"x {shapes[0]}, residual {shapes[1]} and weight {shapes[2]}: must be [n, h], [n, h] and [h]")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [n, h] times its inverse root mean square over h, times weight [h]. Returns [n, h] in x's dtype.

    ValueError where the shapes do not fit each other.
    """
    _check_shapes(x, x, weight)
    if x.dtype != weight.dtype or choose("rms_norm", x) == "reference":
        return rms_norm_ref(x, weight, eps)
    served = library("rms_norm", x, weight, eps)
    if served is not None:
        return served()
    return torch.ops.trialign.rms_norm(x.contiguous(), weight.contiguous(), eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass. x, residual [n, h], weight [h].

    ValueError where the shapes do not fit each other.
    """
    _check_shapes(x, residual, weight)
    if not x.dtype == residual.dtype == weight.dtype or choose("add_rms_norm", x) == "reference":
        return add_rms_norm_ref(x, residual, weight, eps)
    packed = x.contiguous(), residual.contiguous(), weight.contiguous()
    normed, total, _ = torch.ops.trialign.add_rms_norm(*packed, eps)
    return normed, total
