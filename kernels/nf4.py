"""NF4 weights (QLoRA, Dettmers et al. 2023): 4-bit codes with a scale a block of 64, themselves in 8 bits.

    W[n, k] = absmax[n, k // 64] * TABLE[code[n, k]],   y = x W^T,   dx = dy W       (W itself is frozen)
A byte holds two codes, the even column in the high half. TABLE holds 16 quantiles of a normal distribution, scaled to
[-1, 1], with an exact zero (appendix E of the paper).

Double quantization (section 3 of the paper) stores the scales in 8 bits, by groups of 256 along the flattened
weight:   absmax[i] = group[i // 256] * DYNAMIC[scale_code[i]] + offset,   offset the mean of all scales of the weight.
DYNAMIC is the 8-bit type with a sign, a decimal exponent in unary and a linear fraction in the bits that are left
(https://arxiv.org/abs/1511.04561). Together 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight, and 8 bytes a row.

A product of many rows unpacks the weight once, in one launch, and is the vendor's matmul; so is its gradient. One of a
few rows, as in decoding, unpacks in registers and reads the packed weight once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .backends.triton_runtime import Spec, cdiv, jit, precision, tl, uses_triton
from .dispatch import HALF

TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # weights of one scale
GROUP = 256  # scales of one group scale
CHUNK = 1 << 22  # weights quantized at a time


class NF4(NamedTuple):
    """A rectangle of a weight, or rectangles of several weights of one width stacked."""

    codes: torch.Tensor  # [n, k / 2] uint8
    scales: torch.Tensor  # [n, k / 64] uint8
    first: torch.Tensor  # [n] int32: number of a row's first scale among those that `groups` counts, 256 a group
    groups: torch.Tensor  # [groups] fp32, of the whole weights
    offsets: torch.Tensor  # [n] fp32: the offset of a row's weight

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k) of the weight."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def rows(self, rows: slice) -> NF4:
        """Some rows of the weight."""
        return NF4(self.codes[rows], self.scales[rows], self.first[rows], self.groups, self.offsets[rows])


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
    codes: torch.Tensor, groups: torch.Tensor, offset: torch.Tensor, first: torch.Tensor | None = None
) -> torch.Tensor:
    """The scales [n, k / 64] fp32 from `quantize_scales`'s results, or `NF4`'s fields (offset [n] or one for all).

    first: None for a whole weight, row after row.
    """
    rows, cols = codes.shape
    if first is None:
        first = torch.arange(rows, device=codes.device) * cols
    group = (first[:, None] + torch.arange(cols, device=codes.device)) // GROUP  # [n, k / 64]
    return torch.addcmul(offset.view(-1, 1), groups[group], _dynamic(codes.device)[codes.int()])


def pack_nf4(weight: torch.Tensor) -> NF4:
    """A whole weight [n, k], quantized. Raises ValueError as `quantize_nf4`."""
    codes, absmax = quantize_nf4(weight)
    scales, groups, offset = quantize_scales(absmax)
    first = torch.arange(len(codes), device=codes.device, dtype=torch.int32) * scales.shape[1]
    return NF4(codes, scales, first, groups, offset.repeat(len(codes)))


def nf4_unpack_ref(weight: NF4, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] in `dtype`."""
    absmax = dequantize_scales(weight.scales, weight.groups, weight.offsets, weight.first)
    return dequantize_nf4(weight.codes, absmax, dtype)


def nf4_linear_ref(x: torch.Tensor, weight: NF4) -> torch.Tensor:
    """Unpacks the whole weight, then multiplies. Shapes as in `nf4_linear`."""
    return x @ nf4_unpack_ref(weight, x.dtype).t()


@jit
def _weights(
    codes_ptr, scales_ptr, first_ptr, groups_ptr, offsets_ptr, table_ptr, dynamic_ptr, rows, blocks, per_row, real
):
    """Weights fp32 of the `blocks` of 64 columns of `rows`, one of each where `real`: [*blocks, 32, 2]."""
    number = rows * per_row + blocks  # int64, as the rows are
    code = tl.load(scales_ptr + number, mask=real, other=0).to(tl.int32)
    group = (tl.load(first_ptr + rows, mask=real, other=0) + blocks) // 256
    scale = tl.load(groups_ptr + group, mask=real, other=0.0) * tl.load(dynamic_ptr + code)
    scale = tl.where(real, scale + tl.load(offsets_ptr + rows, mask=real, other=0.0), 0.0)
    half = tl.arange(0, 32)
    place, real = tl.expand_dims(number * 32, -1) + half, tl.expand_dims(real, -1)
    packed = tl.load(codes_ptr + place, mask=real, other=0).to(tl.int32)
    high, low = tl.load(table_ptr + (packed >> 4)), tl.load(table_ptr + (packed & 15))
    scale = tl.expand_dims(scale, -1)
    return tl.join(high * scale, low * scale)


@jit
def _unpack_kernel(
    codes_ptr, scales_ptr, first_ptr, groups_ptr, offsets_ptr, table_ptr, dynamic_ptr, out_ptr, blocks, per_row,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of 64 weights, which lie one after the other in codes, scales and out."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    real = block < blocks
    row = block // per_row
    values = _weights(
        codes_ptr, scales_ptr, first_ptr, groups_ptr, offsets_ptr, table_ptr, dynamic_ptr, row, block - row * per_row,
        per_row, real,
    )  # fmt: skip
    values = tl.reshape(values, [BLOCKS, 64]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (block * 64)[:, None] + tl.arange(0, 64)[None, :], values, mask=real[:, None])


@jit
def _gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, first_ptr, groups_ptr, offsets_ptr, table_ptr, dynamic_ptr, y_ptr, m, n, k,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """OUTPUTS columns of y = x W^T for up to ROWS rows. BLOCKS blocks of 64 at a time, each by other warps."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row, per_row = tl.arange(0, ROWS), k // 64
    acc = tl.zeros([BLOCKS, OUTPUTS, ROWS], tl.float32)
    for start in range(0, per_row, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        within = block < per_row
        real = within[:, None] & (output < n)[None, :]
        values = _weights(
            codes_ptr, scales_ptr, first_ptr, groups_ptr, offsets_ptr, table_ptr, dynamic_ptr,
            output[None, :] + tl.zeros([BLOCKS, 1], tl.int64), block[:, None] + tl.zeros([1, OUTPUTS], tl.int32),
            per_row, real,
        )  # fmt: skip
        column = block[:, None] * 64 + tl.arange(0, 64)[None, :]  # [BLOCKS, 64]
        mask = within[:, None, None] & (row < m)[None, None, :]
        x = tl.load(x_ptr + row.to(tl.int64)[None, None, :] * k + column[:, :, None], mask=mask, other=0.0)
        acc += tl.dot(tl.reshape(values, [BLOCKS, OUTPUTS, 64]).to(x.dtype), x, input_precision=DOT)
    y = tl.sum(acc, 0)
    place = y_ptr + row.to(tl.int64)[None, :] * n + output[:, None]
    tl.store(place, y.to(y_ptr.dtype.element_ty), mask=(row < m)[None, :] & (output < n)[:, None])


GEMV_ROWS = 16
"""Rows from which on the weight is unpacked for a matmul: those of the smallest tile of a matrix instruction."""
_UNPACK = {"BLOCKS": 32, "num_warps": 4, "num_stages": 1}


def _gemv_constants(dtype: torch.dtype) -> dict:
    blocks = {"ROWS": GEMV_ROWS, "OUTPUTS": 32, "BLOCKS": 4, "DOT": precision(dtype)}
    return blocks | {"num_warps": 8, "num_stages": 3}


def _operands(weight: NF4) -> tuple[torch.Tensor, ...]:
    device = weight.codes.device
    return (*weight, _table(device), _dynamic(device))


def nf4_unpack_triton(weight: NF4, dtype: torch.dtype) -> torch.Tensor:
    """`nf4_unpack_ref` on a GPU, in one launch."""
    (n, k), blocks = weight.shape, weight.scales.numel()
    out = torch.empty(n, k, dtype=dtype, device=weight.codes.device)
    if blocks:
        _unpack_kernel[(cdiv(blocks, _UNPACK["BLOCKS"]),)](*_operands(weight), out, blocks, k // BLOCK, **_UNPACK)
    return out


def nf4_gemv_triton(x: torch.Tensor, weight: NF4) -> torch.Tensor:
    """`nf4_linear_ref` on a GPU, x [m, k] contiguous with 1 to GEMV_ROWS rows."""
    (n, k), constants = weight.shape, _gemv_constants(x.dtype)
    y = x.new_empty(len(x), n)
    _gemv_kernel[(cdiv(n, constants["OUTPUTS"]),)](x, *_operands(weight), y, len(x), n, k, **constants)
    return y


_WEIGHT = {
    "codes_ptr": "*u8", "scales_ptr": "*u8", "first_ptr": "*i32", "groups_ptr": "*fp32", "offsets_ptr": "*fp32",
    "table_ptr": "*fp32", "dynamic_ptr": "*fp32",
}  # fmt: skip
SPECS = {
    "unpack": Spec(
        _unpack_kernel, _WEIGHT | {"out_ptr": "*bf16", "blocks": "i64", "per_row": "i32"}, (_UNPACK,),
        unaligned=("blocks", "per_row"),
    ),
    "gemv": Spec(
        _gemv_kernel, {"x_ptr": "*bf16"} | _WEIGHT | {"y_ptr": "*bf16", "m": "i32", "n": "i32", "k": "i32"},
        (_gemv_constants(torch.bfloat16),), fp32_configs=(_gemv_constants(torch.float32),), dot=True,
        unaligned=("m", "n"),
    ),
}  # fmt: skip

Tensors = list[torch.Tensor]


@torch.library.custom_op("trialign::nf4_unpack", mutates_args=())
def _unpack(weight: Tensors, dtype: torch.dtype) -> torch.Tensor:
    return (nf4_unpack_triton if uses_triton(weight[0]) else nf4_unpack_ref)(NF4(*weight), dtype)


@torch.library.custom_op("trialign::nf4_gemv", mutates_args=())
def _gemv(x: torch.Tensor, weight: Tensors) -> torch.Tensor:
    return (nf4_gemv_triton if uses_triton(x) else nf4_linear_ref)(x, NF4(*weight))


_unpack.register_fake(lambda weight, dtype: weight[0].new_empty(NF4(*weight).shape, dtype=dtype))
_gemv.register_fake(lambda x, weight: x.new_empty(x.shape[0], weight[0].shape[0]))


class _Product(torch.autograd.Function):
    """The product; the weight is unpacked in the forward and again in the backward, not kept in between."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(*weight)
        return x @ nf4_unpack(weight, x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad @ nf4_unpack(NF4(*ctx.saved_tensors), grad.dtype), None


def nf4_unpack(weight: NF4, dtype: torch.dtype) -> torch.Tensor:
    """The weight [n, k] in `dtype`, by the fastest implementation; `weight`'s tensors are packed."""
    return _unpack([*weight], dtype)


def nf4_linear(x: torch.Tensor, weight: NF4) -> torch.Tensor:
    """x [..., k] times the transposed weight [n, k]: [..., n] in x's dtype, differentiable in x.

    Raises ValueError when the weight does not fit x.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x {list(x.shape)} does not fit a weight of {[n, k]}")
    rows = x.reshape(-1, k).contiguous()
    few = 0 < len(rows) <= GEMV_ROWS and x.dtype in HALF and uses_triton(x)
    if few and not (torch.is_grad_enabled() and x.requires_grad):
        y = _gemv(rows, [*weight])
    else:
        y = _Product.apply(rows, weight)
    return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])
