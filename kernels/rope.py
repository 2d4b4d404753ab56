"""Rotary position embedding (Su et al. 2021).

Each pair (a, b) of a head's entries turns by its angle: (a cos - b sin, b cos + a sin). The half layout pairs entry i
with entry i + d/2 (LLaMA in Hugging Face's format), the interleaved one 2i with 2i + 1. The gradient turns back: -sin.
"""

from __future__ import annotations

import torch

from ._rt import Spec, cdiv, jit, power_of_2, tl
from .dispatch import choose, register


def rope_ref(x, cos, sin, interleaved=False):
    """The formula in plain torch. Shapes as in `rope`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)  # [n, 1, d/2]
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)  # [n, heads, d/2] each
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


@jit
def _turn(
    x, cos, sin, y, heads, half, row_stride, head_stride, sign,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token a program; x may be strided, y is packed."""
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
    source = x + row * row_stride + head * head_stride
    target = y + row * heads * half * 2 + head * half * 2
    a = tl.load(source + first, inside, 0.0).to(tl.float32)
    b = tl.load(source + second, inside, 0.0).to(tl.float32)
    tl.store(target + first, a * c - b * s, inside)
    tl.store(target + second, b * c + a * s, inside)


def rope_triton(x, cos, sin, interleaved, inverse):
    """The turned x by Triton; arguments as those of torch.ops.trialign.rope."""
    n, heads, d = x.shape
    y = x.new_empty(x.shape)
    if x.numel():
        _turn[(n, cdiv(heads, HEADS))](
            x, cos, sin, y, heads, d // 2, x.stride(0), x.stride(1), -1.0 if inverse else 1.0,
            interleaved, HEADS, power_of_2(d // 2), num_warps=2,
        )  # fmt: skip
    return y


HEADS = 8
SPECS = {
    "turn": Spec(
        _turn,
        {
            **dict.fromkeys(("x", "y"), "*bf16"),
            **dict.fromkeys(("cos", "sin"), "*fp32"),
            **dict.fromkeys(("heads", "half", "row_stride", "head_stride"), "i32"),
            "sign": "fp32",
        },
        tuple(
            {"INTERLEAVED": interleaved, "HEADS": HEADS, "HALF": half, "num_warps": 2, "num_stages": 3}
            for half in (32, 64, 128)
            for interleaved in (False, True)
        ),
        traffic="read 2, write 2 bytes an element (bf16), cos and sin 4 more for each 8 heads; least 2 and 2",
        unaligned=("heads",),
    ),
}


def _save(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    return (
        torch.ops.trialign.rope(grad.contiguous(), cos, sin, ctx.interleaved, not ctx.inverse),
        None,
        None,
        None,
        None,
    )


register("rope", lambda x, cos, sin, interleaved, inverse: x.new_empty(x.shape), _save, _backward, rope_triton)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Turns x [n, heads, d] by the angles whose cos and sin [n, d/2] fp32 are given. Returns a fresh [n, heads, d].

    x may be a slice of a fused projection (any strides, d innermost). Differentiable in x only.
    """
    if choose("rope", x) == "reference":
        return rope_ref(x, cos, sin, interleaved)
    x = x if x.stride(2) == 1 else x.contiguous()
    return torch.ops.trialign.rope(x, cos.contiguous(), sin.contiguous(), interleaved, False)
