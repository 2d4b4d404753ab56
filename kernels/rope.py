"""Rotary position embedding (Su et al. 2021).

Each pair (a, b) of a head's entries is rotated by its angle: (a cos - b sin, b cos + a sin). The half layout pairs
entry i with entry i + d/2 (LLaMA in Hugging Face's format), the interleaved one 2i with 2i + 1. The gradient is the
inverse rotation: -sin.
"""

from __future__ import annotations

from typing import cast

import torch

from .backends.triton_runtime import Spec, cdiv, jit, power_of_2, tl
from .dispatch import choose, register


def rope_ref(x, cos, sin, interleaved=False):
    """The formula in plain torch. Shapes as in `rope_`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)  # [n, 1, d/2]
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)  # [n, heads, d/2] each
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


@jit
def _turn(
    x, cos, sin, heads, half, row_stride, head_stride, sign,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token a program, in place; x may be strided."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    j = tl.arange(0, HALF)
    c = tl.load(cos + row * half + j, j < half, 0.0)[None, :]
    s = tl.load(sin + row * half + j, j < half, 0.0)[None, :] * sign
    j = j[None, :]
    inside = (head < heads) & (j < half)
    if INTERLEAVED:
        first, second = 2 * j, 2 * j + 1
    else:
        first, second = j, j + half
    base = x + row * row_stride + head.to(tl.int64) * head_stride
    a = tl.load(base + first, inside, 0.0).to(tl.float32)
    b = tl.load(base + second, inside, 0.0).to(tl.float32)
    tl.store(base + first, a * c - b * s, inside)
    tl.store(base + second, b * c + a * s, inside)


def _constants(d: int, interleaved: bool) -> dict:
    half = power_of_2(d // 2, 32)
    return {"INTERLEAVED": interleaved, "HEADS": HEADS, "HALF": half, "num_warps": 2, "num_stages": 1}


def rope_triton(x, cos, sin, interleaved, inverse):
    """Rotates x by Triton; arguments as those of torch.ops.trialign.rope_."""
    n, heads, d = x.shape
    if x.numel():
        _turn[(n, cdiv(heads, HEADS))](
            x, cos, sin, heads, d // 2, x.stride(0), x.stride(1), -1.0 if inverse else 1.0,
            **_constants(d, interleaved),
        )  # fmt: skip


HEADS = 8
SPECS = {
    "turn": Spec(
        _turn,
        {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "sign": "fp32"}
        | dict.fromkeys(("heads", "half", "row_stride", "head_stride"), "i32"),
        tuple(_constants(d, interleaved) for d in (64, 128, 256) for interleaved in (False, True)),
        unaligned=("heads",),
    )
}


register("rope_", lambda *args: None, triton=rope_triton)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        torch.ops.trialign.rope_(x, cos, sin, interleaved, False)
        return x

    @staticmethod
    def backward(ctx, *grads):
        # A copy: autograd's buffer may be another input's gradient too.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        torch.ops.trialign.rope_(grad, *ctx.saved_tensors, ctx.interleaved, True)
        return grad, None, None, None


def rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotates x [n, heads, d] in place by angles given as cos and sin [n, d/2] fp32, and returns x.

    x may be a slice of a fused projection (any strides between heads and rows). Differentiable in x only.

    Raises:
        ValueError: for an odd head size, or cos and sin that do not fit x.
        RuntimeError: by torch, where x is a leaf that requires a gradient, which cannot be changed in place.
    """
    n, _, d = x.shape
    if d % 2 or not cos.shape == sin.shape == (n, d // 2):
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit x {list(x.shape)}: must be [n, d/2]"
        )
    if choose("rope_", x) == "reference" or x.stride(2) != 1:
        return x.copy_(rope_ref(x, cos, sin, interleaved))
    return cast(torch.Tensor, _Rope.apply(x, cos.contiguous(), sin.contiguous(), interleaved))
