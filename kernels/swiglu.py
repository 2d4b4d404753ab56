"""SwiGLU (Shazeer 2020): the gate and up projections side by side in one tensor.

y = silu(a) b,   silu(a) = a s(a),   s(a) = 1 / (1 + e^-a)
da = g b s(a) (1 + a (1 - s(a))),   db = g silu(a)
"""

from __future__ import annotations

import torch

from .backends.triton_runtime import Spec, cdiv, jit, tl
from .dispatch import choose, register


def swiglu_ref(gate_up):
    """The formula in plain torch. Shapes as in `swiglu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)  # [n, f] each
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


@jit
def _forward(gate_up, y, f, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate_up + row * 2 * f + j, j < f, 0.0).to(tl.float32)
    b = tl.load(gate_up + row * 2 * f + f + j, j < f, 0.0).to(tl.float32)
    tl.store(y + row * f + j, a * tl.sigmoid(a) * b, j < f)


@jit
def _gradient(grad, gate_up, out, f, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + row * f + j, j < f, 0.0).to(tl.float32)
    a = tl.load(gate_up + row * 2 * f + j, j < f, 0.0).to(tl.float32)
    b = tl.load(gate_up + row * 2 * f + f + j, j < f, 0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(out + row * 2 * f + j, g * b * s * (1.0 + a * (1.0 - s)), j < f)
    tl.store(out + row * 2 * f + f + j, g * a * s, j < f)


def swiglu_triton(gate_up):
    """y by Triton; arguments as those of torch.ops.trialign.swiglu."""
    n, f = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(n, f)
    if y.numel():
        _forward[(n, cdiv(f, _CONFIG["BLOCK"]))](gate_up, y, f, **_CONFIG)
    return y


def swiglu_backward_triton(grad, gate_up):
    """d gate_up by Triton; arguments as those of torch.ops.trialign.swiglu_backward."""
    (n, f), out = grad.shape, torch.empty_like(gate_up)
    if out.numel():
        _gradient[(n, cdiv(f, _CONFIG["BLOCK"]))](grad, gate_up, out, f, **_CONFIG)
    return out


_CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
SPECS = {
    "forward": Spec(_forward, {"gate_up": "*bf16", "y": "*bf16", "f": "i32"}, (_CONFIG,)),
    "gradient": Spec(_gradient, {"grad": "*bf16", "gate_up": "*bf16", "out": "*bf16", "f": "i32"}, (_CONFIG,)),
}


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    (gate_up,) = ctx.saved_tensors
    return torch.ops.trialign.swiglu_backward(grad.contiguous(), gate_up)


register(
    "swiglu",
    lambda gate_up: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    _save,
    _backward,
    swiglu_triton,
)
register("swiglu_backward", lambda grad, gate_up: torch.empty_like(gate_up), triton=swiglu_backward_triton)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of gate_up [n, 2f]. Returns [n, f]. ValueError for an odd width."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up {list(gate_up.shape)}: its width must be even, gate and up side by side")
    if choose("swiglu", gate_up) == "reference":
        return swiglu_ref(gate_up)
    return torch.ops.trialign.swiglu(gate_up.contiguous())
