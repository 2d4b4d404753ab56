"""ALiBi (https://arxiv.org/abs/2108.12409): scores fall with the distance, each head at a slope of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> Tensor:
    """[heads] fp32: 2^(-8/n), 2^(-16/n), ... for n heads, a power of two.

    For other numbers the slopes of the next lower power of two come first, and between them every other one of the
    next higher power, as the paper's published code has it.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return torch.tensor(slopes + between[: heads - lower])
