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


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of gate_up [n, 2f]. Returns [n, f]."""
    return swiglu_ref(gate_up)
