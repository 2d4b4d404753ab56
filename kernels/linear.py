"""y = x Wᵀ by a packed copy of W, for the few rows of a decode step on a CPU.

torch multiplies bf16 by oneDNN, which brings a plain [out, in] weight into its blocked order anew in every call. With
32 rows that takes as long as the product. A copy packed once is worth it wherever a weight is used some ten times
before it changes: in a rollout, or in a frozen model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dispatch import MODE

ROWS = 32
"""The number of rows the packed order is chosen for; others work too."""


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """An opaque copy of weight [out, in] for `linear`.

    None where there is nothing to gain: off the CPU, in another dtype than bf16, or where oneDNN has no bf16.
    """
    if MODE == "reference" or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def linear(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times weight [out, in] transposed; by `packed`, if given, which must be `pack(weight)` and has no
    gradient. Returns [..., out]."""
    if packed is None:
        return F.linear(x, weight)
    assert not torch.is_grad_enabled(), "a packed weight has no gradient"
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
