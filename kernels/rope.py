"""Rotary position embedding (Su et al. 2021).

Each pair (a, b) of a head's entries turns by its angle: (a cos - b sin, b cos + a sin). The half layout pairs entry i
with entry i + d/2 (LLaMA in Hugging Face's format), the interleaved one 2i with 2i + 1. The gradient turns back: -sin.
"""

from __future__ import annotations

import torch

from .dispatch import choose, register


def rope_ref(x, cos, sin, interleaved=False):
    """The formula in plain torch. Shapes as in `rope`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)  # [n, 1, d/2]
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)  # [n, heads, d/2] each
    turned = (a * cos - b * sin, b * cos + a * sin)
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


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


register("rope", lambda x, cos, sin, interleaved, inverse: x.new_empty(x.shape), _save, _backward)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Turns x [n, heads, d] by the angles whose cos and sin [n, d/2] fp32 are given. Returns a fresh [n, heads, d].

    x may be a slice of a fused projection (any strides, d innermost). Differentiable in x only.
    """
    if choose("rope", x) == "reference":
        return rope_ref(x, cos, sin, interleaved)
    x = x if x.stride(2) == 1 else x.contiguous()
    return torch.ops.trialign.rope(x, cos.contiguous(), sin.contiguous(), interleaved, False)
