"""SwiGLU (Shazeer 2020): the gate and up projections side by side in one tensor.

y = silu(a) b,   silu(a) = a s(a),   s(a) = 1 / (1 + e^-a)
da = g b s(a) (1 + a (1 - s(a))),   db = g silu(a)
"""

from __future__ import annotations

import torch

from .dispatch import choose, register


def swiglu_ref(gate_up):
    """The formula in plain torch. Shapes as in `swiglu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)  # [n, f] each
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    return torch.ops.trialign.swiglu_backward(grad.contiguous(), gate_up)


register("swiglu", lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2), _save, _backward)
register("swiglu_backward", lambda grad, gate_up: torch.empty_like(gate_up))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of gate_up [n, 2f]. Returns [n, f]."""
    if choose("swiglu", gate_up) == "reference":
        return swiglu_ref(gate_up)
    return torch.ops.trialign.swiglu(gate_up.contiguous())
