"""y = x Wᵀ: in FP8 on a GPU where asked for, by a C++ kernel for the few rows of a decode step on a CPU.

TRIALIGN_KERNELS=fp8 (kernels/dispatch.py): Transformer Engine multiplies in FP8 in the decoder layers, forward and
backward, with scales of the current tensors; the weights stay in their dtype. Not in the head: training goes through
linear_logprob.py, which has no FP8, and the sampler's logprobs must come from the same product.

torch multiplies bf16 by oneDNN, which reorders a plain [out, in] weight into blocks in every call. With few rows that
takes longer than the product, whose least time is that of reading W once. csrc/cpu/linear.cpp reads W as it lies: no
copy, nothing to renew when it changes. It sums in fp32 and rounds once; an output is the same number for any number of
rows and threads. It has no gradient, and other last bits than oneDNN: only the generator asks for it, as the scoring
pass must repeat the numbers of training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backends.libraries import library
from .dispatch import MODE, choose, register

ROWS = 256
"""Rows up to which the C++ kernel takes no longer than oneDNN, which must reorder the weight."""

register("linear_rows", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


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


def linear(x: torch.Tensor, weight: torch.Tensor, frozen: bool = False) -> torch.Tensor:
    """x [..., in] times weight [out, in] transposed. Returns [..., out].

    frozen: no gradient is needed; few rows in bf16 on a CPU go through the C++ kernel.
    """
    if not frozen or weight.dtype != torch.bfloat16 or choose("linear_rows", x) != "cpp":
        return F.linear(x, weight)
    assert not torch.is_grad_enabled(), "a frozen weight has no gradient"
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])  # [n, in]
    if len(rows) > ROWS:
        return F.linear(x, weight)
    return torch.ops.trialign.linear_rows(rows, weight).view(*x.shape[:-1], len(weight))


def layer_linear(x: torch.Tensor, weight: torch.Tensor, frozen: bool = False) -> torch.Tensor:
    """`linear` of a decoder layer, in FP8 with TRIALIGN_KERNELS=fp8 where the library takes the shape."""
    out = _fp8_linear(x, weight) if MODE == "fp8" else None
    return linear(x, weight, frozen) if out is None else out
