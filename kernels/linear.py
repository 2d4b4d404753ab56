"""y = x Wᵀ: in FP8 on a GPU where asked for, by a packed copy of W for the few rows of a decode step on a CPU.

TRIALIGN_KERNELS=fp8 (kernels/dispatch.py): Transformer Engine multiplies in FP8 in the decoder layers, forward and
backward, with scales of the current tensors; the weights stay in their dtype. Not in the head: training goes through
linear_logprob.py, which has no FP8, and the sampler's logprobs must come from the same product.

torch multiplies bf16 by oneDNN, which reorders a plain [out, in] weight into blocks in every call. With 32 rows that
takes as long as the product. A copy packed once is worth it wherever a weight is used some ten times
before it changes: in a rollout, or in a frozen model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backends.libraries import library
from .dispatch import MODE

ROWS = 32
"""The number of rows the packed order is chosen for; others work too."""


def pack(weight: torch.Tensor) -> torch.Tensor | None:
    """An opaque copy of weight [out, in] for `linear`.

    None where packing does not help: off the CPU, in another dtype than bf16, or where oneDNN has no bf16.
    """
    if MODE == "reference" or weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not len(weight):
        return None
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """The product in FP8; None where it is not requested or not possible."""
    build, recipe = library("fp8_linear", x, weight), library("fp8_recipe")
    region = None if recipe is None else library("fp8_region", recipe())
    if build is None or region is None:
        return None
    key = (*weight.shape, weight.dtype)
    layer = _fp8_layers.get(key) or _fp8_layers.setdefault(key, build())
    rows = x.reshape(-1, x.shape[-1])  # [n, in]
    padded = F.pad(rows, (0, 0, 0, -len(rows) % FP8_ROWS))  # rows of zeros add nothing to the weight's gradient
    with region():
        out = torch.func.functional_call(layer, {"weight": weight}, (padded,))
    return out.narrow(0, 0, len(rows)).view(*x.shape[:-1], -1)


_fp8_layers: dict[tuple, torch.nn.Module] = {}  # without weights or history: one layer for every weight of its shape
FP8_ROWS = 32
"""FP8 products sum over rows in the weight's gradient, by blocks of at most this many."""


def linear(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times weight [out, in] transposed; by `packed`, if given, which must be `pack(weight)` and has no
    gradient. Returns [..., out]."""
    if packed is None:
        return F.linear(x, weight)
    assert not torch.is_grad_enabled(), "a packed weight has no gradient"
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def layer_linear(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` of a decoder layer, in FP8 with TRIALIGN_KERNELS=fp8 where the library takes the shape."""
    out = _fp8_linear(x, weight) if MODE == "fp8" and packed is None else None
    return linear(x, weight, packed) if out is None else out
