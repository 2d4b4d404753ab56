"""Rows in expert order times their expert's weight: one launch for all experts.

    out[r] = x[r] W_e for rows r of expert e;   dx[r] = dout[r] W_e^T;   dW_e = x_e^T dout_e
No atomics: sums have one order, so results repeat bit for bit. On Hopper and Blackwell torch's grouped_mm (CUTLASS)
serves in bf16, where sizes are multiples of 8; the kernels here serve the rest.
"""

from __future__ import annotations

import torch

from .backends.libraries import library
from .backends.triton_runtime import Spec, cdiv, jit, power_of_2, precision, tl, uses_triton


def grouped_matmul_ref(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """One matmul an expert. Shapes as in `grouped_matmul`."""
    bounds = offsets.tolist()
    out = x.new_empty(x.shape[0], weight.shape[2])
    for a, b, w in zip(bounds, bounds[1:], weight, strict=False):
        torch.mm(x[a:b], w, out=out[a:b])
    return out


def grouped_outer_ref(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """dW [experts, h, f] = x_e^T grad_e of x [m, h] and grad [m, f]."""
    bounds = offsets.tolist()
    out = x.new_empty(len(offsets) - 1, x.shape[1], grad.shape[1])
    for a, b, dw in zip(bounds, bounds[1:], out, strict=False):
        torch.mm(x[a:b].t(), grad[a:b], out=dw)
    return out


@jit
def _matmul_kernel(
    x_ptr, weight_ptr, offsets_ptr, out_ptr, experts, h, f, x_stride, e_stride, h_stride, f_stride,
    GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile of out = x W_e. Each tile finds its expert on the device: the host never waits for the counts."""
    tile, expert = tl.program_id(0), tl.arange(0, GROUPS)
    begin = tl.load(offsets_ptr + expert, mask=expert < experts, other=0).to(tl.int64)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < experts, other=0).to(tl.int64)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    upto = tl.cumsum(tiles, 0)
    own = tl.sum((upto <= tile).to(tl.int32), 0)
    if own >= experts:
        return
    here = expert == own
    first = tl.sum(tl.where(here, begin + (tile - (upto - tiles)) * BLOCK_M, 0), 0)
    rows = first + tl.arange(0, BLOCK_M)
    real = rows < tl.sum(tl.where(here, end, 0), 0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_ptr += own.to(tl.int64) * e_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, h, BLOCK_K):
        inner = k0 + tl.arange(0, BLOCK_K)
        x_mask, w_mask = real[:, None] & (inner < h)[None, :], (inner < h)[:, None] & (columns < f)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + inner[None, :], mask=x_mask, other=0.0)
        w = tl.load(weight_ptr + inner[:, None] * h_stride + columns[None, :] * f_stride, mask=w_mask, other=0.0)
        acc += tl.dot(x, w, input_precision=DOT)
    mask = real[:, None] & (columns < f)[None, :]
    tl.store(out_ptr + rows[:, None] * f + columns[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _outer_kernel(
    x_ptr, grad_ptr, offsets_ptr, out_ptr, h, f,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_M of h, BLOCK_N of f] of dW_e: a sum over the rows of the expert."""
    expert = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_ptr + expert).to(tl.int64)
    end = tl.load(offsets_ptr + expert + 1).to(tl.int64)
    left = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    right = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(begin, end, BLOCK_K):
        rows = r + tl.arange(0, BLOCK_K)
        real = (rows < end)[:, None]
        x = tl.load(x_ptr + rows[:, None] * h + left[None, :], mask=real & (left < h)[None, :], other=0.0)
        grad = tl.load(grad_ptr + rows[:, None] * f + right[None, :], mask=real & (right < f)[None, :], other=0.0)
        acc += tl.dot(tl.trans(x), grad, input_precision=DOT)
    mask = (left < h)[:, None] & (right < f)[None, :]
    place = expert * h * f + left[:, None].to(tl.int64) * f + right[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _constants(dtype: torch.dtype) -> dict:
    if dtype == torch.float32:  # no matrix units: the products live in registers
        blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}
    else:
        blocks = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    return blocks | {"DOT": precision(dtype)}


def grouped_matmul_triton(x, weight, offsets):
    """`grouped_matmul` on a GPU; the weight may be a slice or a transposed view."""
    (m, h), (experts, _, f), constants = x.shape, weight.shape, _constants(x.dtype)
    out = x.new_empty(m, f)
    if m:
        grid = (cdiv(m, constants["BLOCK_M"]) + experts, cdiv(f, constants["BLOCK_N"]))
        _matmul_kernel[grid](
            x, weight, offsets, out, experts, h, f, x.stride(0), *weight.stride(),
            GROUPS=power_of_2(experts, _GROUPS), **constants,
        )  # fmt: skip
    return out


def grouped_outer_triton(x, grad, offsets):
    """`grouped_outer_ref` on a GPU."""
    h, f, experts, constants = x.shape[1], grad.shape[1], len(offsets) - 1, _constants(x.dtype)
    out = x.new_empty(experts, h, f)
    grid = (cdiv(h, constants["BLOCK_M"]), cdiv(f, constants["BLOCK_N"]), experts)
    _outer_kernel[grid](x, grad, offsets, out, h, f, **constants)
    return out


_GROUPS = 512  # one compiled kernel for up to 512 experts: reading all offsets costs little beside a tile's product
_BF16, _FP32, _SIZES = _constants(torch.bfloat16), _constants(torch.float32), {"h": "i32", "f": "i32"}
_STRIDES = dict.fromkeys(("x_stride", "e_stride", "h_stride", "f_stride"), "i64")
SPECS = {
    "matmul": Spec(
        _matmul_kernel,
        {"x_ptr": "*bf16", "weight_ptr": "*bf16", "offsets_ptr": "*i32", "out_ptr": "*bf16", "experts": "i32"}
        | _SIZES | _STRIDES,
        (_BF16 | {"GROUPS": _GROUPS},), fp32_configs=(_FP32 | {"GROUPS": _GROUPS},), dot=True,
        unaligned=("experts", "f_stride"),
    ),
    "outer": Spec(
        _outer_kernel, {"x_ptr": "*bf16", "grad_ptr": "*bf16", "offsets_ptr": "*i32", "out_ptr": "*bf16"} | _SIZES,
        (_BF16,), fp32_configs=(_FP32,), dot=True,
    ),
}  # fmt: skip


@torch.library.custom_op("trialign::grouped_matmul", mutates_args=())
def _matmul(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    served = library("grouped_matmul", x, weight, offsets)
    if served is not None:
        return served()
    return (grouped_matmul_triton if uses_triton(x) else grouped_matmul_ref)(x, weight, offsets)


@torch.library.custom_op("trialign::grouped_outer", mutates_args=())
def _outer(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    served = library("grouped_outer", x, grad, offsets)
    if served is not None:
        return served()
    return (grouped_outer_triton if uses_triton(x) else grouped_outer_ref)(x, grad, offsets)


def _matmul_backward(ctx, grad):
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    for_x, for_weight, _ = ctx.needs_input_grad  # a frozen weight's gradient would double the work
    dx = _matmul(grad, weight.transpose(1, 2), offsets) if for_x else None
    return dx, _outer(x, grad, offsets) if for_weight else None, None


_matmul.register_fake(lambda x, weight, offsets: x.new_empty(x.shape[0], weight.shape[2]))
_outer.register_fake(lambda x, grad, offsets: x.new_empty(offsets.shape[0] - 1, x.shape[1], grad.shape[1]))
_matmul.register_autograd(_matmul_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows offsets[e] to offsets[e + 1] of x [m, h] times weight[e] of [experts, h, f]: [m, f]. Differentiable.

    The weight may have any strides; offsets are best int32, else they are cast. ValueError where the shapes do not fit
    each other.
    """
    if x.shape[1] != weight.shape[1] or len(offsets) != len(weight) + 1:
        raise ValueError(f"x {list(x.shape)} and {len(offsets)} offsets do not fit weights {list(weight.shape)}")
    return _matmul(x.contiguous(), weight, offsets.int().contiguous())
