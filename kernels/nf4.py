"""NF4 weights (QLoRA, Dettmers et al. 2023): 4-bit codes with an fp32 scale a block, multiplied without unpacking.

    W[n, k] = absmax[n, k // block] * TABLE[code[n, k]],   y = x W^T,   dx = dy W       (W itself is frozen)
A byte holds two codes, the even column in the high half. TABLE holds 16 quantiles of a normal distribution, scaled to
[-1, 1], with an exact zero (appendix E of the paper).

Double quantization (section 3 of the paper) stores the scales in 8 bits, by groups of 256 along the flattened
weight:   absmax[i] = group[i // 256] * DYNAMIC[scale_code[i]] + offset,   offset the mean of all scales of the weight.
DYNAMIC is the 8-bit type with a sign, a decimal exponent in unary and a linear fraction in the bits that are left
(https://arxiv.org/abs/1511.04561). Together 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .backends.triton_runtime import Spec, cdiv, jit, precision, tl, uses_triton

TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights of one scale
GROUP = 256  # scales of one group scale
CHUNK = 1 << 22  # weights quantized at a time


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return torch.tensor(TABLE, device=device)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """[256, 2] fp32: the two values of each byte of codes: one look-up a byte instead of two."""
    return torch.cartesian_prod(torch.tensor(TABLE), torch.tensor(TABLE)).to(device)


@functools.cache
def _dynamic(device: torch.device) -> torch.Tensor:
    """DYNAMIC, [256] fp32, ascending: 0, 1 and ±10^(e-6) times the middles of 2^e equal parts of [0.1, 1], e = 0..6."""
    values = [0.0, 1.0]
    for exponent in range(7):
        for part in range(1 << exponent):
            middle = (0.1 + 0.9 * (part + 0.5) / (1 << exponent)) * 10.0 ** (exponent - 6)
            values += [middle, -middle]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [n, k / 2] uint8 and scales [n, k / 64] fp32 of a weight [n, k], each value to its nearest entry of TABLE.

    Raises ValueError when k is not a multiple of 64 or a weight is not finite.
    """
    n, k = weight.shape
    if k % BLOCK:
        raise ValueError(f"NF4 needs rows of a multiple of {BLOCK} weights, got [{n}, {k}]")
    absmax = weight.new_empty(n, k // BLOCK, dtype=torch.float32)
    packed = weight.new_empty(n, k // 2, dtype=torch.uint8)
    table = _table(weight.device)
    middles, tiny = (table[1:] + table[:-1]) / 2, torch.finfo(torch.float32).tiny
    step = max(CHUNK // k, 1)
    for rows in (slice(start, min(start + step, n)) for start in range(0, n, step)):  # else all floats exist at once
        blocks = weight[rows].float().view(-1, k // BLOCK, BLOCK)
        absmax[rows] = blocks.abs().amax(2)
        codes = torch.bucketize(blocks / absmax[rows].clamp_min(tiny)[:, :, None], middles, out_int32=True)
        codes = codes.to(torch.uint8).view(-1, k)
        packed[rows] = codes[:, ::2] << 4 | codes[:, 1::2]
    if not absmax.isfinite().all():
        raise ValueError("NF4 cannot hold weights that are not finite")
    return packed, absmax


def dequantize_nf4(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] in `dtype` of `quantize_nf4`'s codes and scales."""
    n, half = codes.shape
    values = _pairs(codes.device).index_select(0, codes.flatten().int()).view(n, half * 2 // BLOCK, BLOCK)
    return (values * absmax[:, :, None]).view(n, 2 * half).to(dtype)


def quantize_scales(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization of a whole weight's scales [n, k / 64] fp32.

    Returns:
        codes [n, k / 64] uint8, each scale to its nearest entry of DYNAMIC; groups [ceil(n k / 64 / 256)] fp32; offset,
        a single fp32.
    """
    offset = absmax.mean()
    flat = torch.nn.functional.pad((absmax - offset).flatten(), (0, -absmax.numel() % GROUP)).view(-1, GROUP)
    groups = flat.abs().amax(1)
    scaled = flat / groups.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    table = _dynamic(absmax.device)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: absmax.numel()].view_as(absmax), groups, offset


def dequantize_scales(
    codes: torch.Tensor, groups: torch.Tensor, offset: torch.Tensor, start: tuple[int, int] = (0, 0), width: int = 0
) -> torch.Tensor:
    """The scales, fp32, from `quantize_scales`'s results, of a rectangle of the whole weight.

    Args:
        codes: [rows, cols] uint8, the rectangle of the scales that begins at `start`.
        groups: of the whole weight.
        width: columns of the whole weight's scales (0: those of `codes`).
    """
    rows, cols = codes.shape
    first = (torch.arange(rows, device=codes.device) + start[0]) * (width or cols) + start[1]  # [rows]
    group = (first[:, None] + torch.arange(cols, device=codes.device)) // GROUP  # [rows, cols]
    return torch.addcmul(offset, groups[group], _dynamic(codes.device)[codes.int()])


def nf4_linear_ref(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Unpacks the whole weight, then multiplies. Shapes as in `nf4_linear`."""
    return x @ dequantize_nf4(codes, absmax, x.dtype).t()


@jit
def _weights(codes_ptr, absmax_ptr, table_ptr, rows, k0, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights [BLOCK_N, BLOCK_K] fp32 of one block of columns; BLOCK_K is the length of a scale's block."""
    half = tl.arange(0, BLOCK_K // 2)
    real = (rows < n)[:, None]
    packed = tl.load(codes_ptr + rows[:, None] * (k // 2) + k0 // 2 + half[None, :], mask=real, other=0).to(tl.int32)
    # [BLOCK_N, BLOCK_K / 2, 2]
    values = tl.join(tl.load(table_ptr + (packed >> 4)), tl.load(table_ptr + (packed & 15)))
    scale = tl.load(absmax_ptr + rows * (k // BLOCK_K) + k0 // BLOCK_K, mask=rows < n, other=0.0)
    return tl.reshape(values, [BLOCK_N, BLOCK_K]) * scale[:, None]


@jit
def _forward_kernel(
    x_ptr, codes_ptr, absmax_ptr, table_ptr, y_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """y = x W^T, a tile of [BLOCK_M, BLOCK_N]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, k, BLOCK_K):
        columns = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * k + columns[None, :], mask=(rows < m)[:, None], other=0.0)
        w = _weights(codes_ptr, absmax_ptr, table_ptr, outputs, k0, n, k, BLOCK_N, BLOCK_K)
        acc += tl.dot(x, tl.trans(w.to(x.dtype)), input_precision=DOT)
    mask = (rows < m)[:, None] & (outputs < n)[None, :]
    tl.store(y_ptr + rows[:, None] * n + outputs[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    grad_ptr, codes_ptr, absmax_ptr, table_ptr, dx_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dx = dy W, a tile of [BLOCK_M, BLOCK_K]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for n0 in range(0, n, BLOCK_N):
        outputs = n0 + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (rows < m)[:, None] & (outputs < n)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * n + outputs[None, :], mask=mask, other=0.0)
        w = _weights(codes_ptr, absmax_ptr, table_ptr, outputs, k0, n, k, BLOCK_N, BLOCK_K)
        acc += tl.dot(grad, w.to(grad.dtype), input_precision=DOT)
    columns = k0 + tl.arange(0, BLOCK_K)
    tl.store(dx_ptr + rows[:, None] * k + columns[None, :], acc.to(dx_ptr.dtype.element_ty), mask=(rows < m)[:, None])


def _constants(dtype: torch.dtype) -> dict:
    small = dtype == torch.float32  # no matrix units: the products live in registers
    return {
        "BLOCK_M": 32 if small else 64, "BLOCK_N": 32 if small else 64, "BLOCK_K": BLOCK, "DOT": precision(dtype),
        "num_warps": 8 if small else 4, "num_stages": 2,
    }  # fmt: skip


def nf4_linear_triton(x, codes, absmax):
    """`nf4_linear`'s product on a GPU, x [m, k] contiguous."""
    (m, k), n, constants = x.shape, codes.shape[0], _constants(x.dtype)
    y = x.new_empty(m, n)
    if m:
        grid = (cdiv(m, constants["BLOCK_M"]), cdiv(n, constants["BLOCK_N"]))
        _forward_kernel[grid](x, codes, absmax, _table(x.device), y, m, n, k, **constants)
    return y


def nf4_linear_backward_triton(grad, codes, absmax):
    """dx [m, k] of dy [m, n] contiguous, on a GPU."""
    (m, n), k, constants = grad.shape, 2 * codes.shape[1], _constants(grad.dtype)
    dx = grad.new_empty(m, k)
    if m:
        grid = (cdiv(m, constants["BLOCK_M"]), k // BLOCK)
        _backward_kernel[grid](grad, codes, absmax, _table(grad.device), dx, m, n, k, **constants)
    return dx


_SIZES = {"m": "i32", "n": "i32", "k": "i32"}
_OPERANDS = {"codes_ptr": "*u8", "absmax_ptr": "*fp32", "table_ptr": "*fp32"}
SPECS = {
    "forward": Spec(
        _forward_kernel, {"x_ptr": "*bf16"} | _OPERANDS | {"y_ptr": "*bf16"} | _SIZES, (_constants(torch.bfloat16),),
        fp32_configs=(_constants(torch.float32),), dot=True,
        unaligned=("m",),
    ),
    "backward": Spec(
        _backward_kernel, {"grad_ptr": "*bf16"} | _OPERANDS | {"dx_ptr": "*bf16"} | _SIZES,
        (_constants(torch.bfloat16),), fp32_configs=(_constants(torch.float32),),
        dot=True, unaligned=("m",),
    ),
}  # fmt: skip


@torch.library.custom_op("trialign::nf4_linear", mutates_args=())
def _op(x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    return (nf4_linear_triton if uses_triton(x) else nf4_linear_ref)(x, codes, absmax)


@torch.library.custom_op("trialign::nf4_linear_backward", mutates_args=())
def _op_backward(grad: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    if uses_triton(grad):
        return nf4_linear_backward_triton(grad.contiguous(), codes, absmax)
    return grad @ dequantize_nf4(codes, absmax, grad.dtype)


_op.register_fake(lambda x, codes, absmax: x.new_empty(x.shape[0], codes.shape[0]))
_op_backward.register_fake(lambda grad, codes, absmax: grad.new_empty(grad.shape[0], 2 * codes.shape[1]))


class _Product(torch.autograd.Function):
    """The product with scales computed in the forward and again in the backward, not kept in between."""

    @staticmethod
    def forward(ctx, x, codes, absmax):
        ctx.save_for_backward(codes)
        ctx.absmax = absmax
        return _op(x, codes, absmax().contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _op_backward(grad, ctx.saved_tensors[0], ctx.absmax().contiguous()), None, None


def nf4_linear(x: torch.Tensor, codes: torch.Tensor, absmax: Callable[[], torch.Tensor]) -> torch.Tensor:
    """x [..., k] times the transposed NF4 weight [n, k]: [..., n] in x's dtype, differentiable in x.

    codes [n, k / 2] uint8 and the result of absmax [n, k / 64] fp32 as `quantize_nf4` gives them; absmax is called in
    the forward and in the backward, so that the fp32 scales are not kept in between. Raises ValueError when codes do
    not fit x.
    """
    if x.shape[-1] != 2 * codes.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit codes {list(codes.shape)}")
    y = _Product.apply(x.reshape(-1, x.shape[-1]).contiguous(), codes.contiguous(), absmax)
    return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])
