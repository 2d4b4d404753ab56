"""Position in attention: rotary frequencies with their scalings to long contexts, and the slopes of ALiBi."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class Rope:
    """Scaling of a rotary embedding's angles beyond the length a model was first trained on.

    `dynamic` NTK turns by plain angles up to the trained length; every longer document has a base of its own, by which
    it is turned from its first token on (`by_length`).
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int | None = None
    """trained length (dynamic, yarn, llama3)"""
    low_factor: float = 1.0
    high_factor: float = 4.0
    """llama3: wavelengths above original/low are divided by factor, below original/high left alone"""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """yarn: turns over the trained length between which interpolation passes into extrapolation"""
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """yarn: factor of cos and sin; by default 0.1 ln(factor) + 1"""
    truncate: bool = True
    """yarn: round the bounds of the transition to whole dims"""
    doubling: bool = False
    """dynamic: the base grows whenever the length has doubled (Qwen 1), not with every token"""

    def frequencies(self, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """Angle a position [head_dim/2] fp32, and the number that cos and sin are multiplied by.

        Computed in fp32 as the published models were trained: at large positions float64 would turn by other angles.
        """
        inverse = 1.0 / theta ** _exponents(head_dim)
        if self.kind == "linear":
            return inverse / self.factor, 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(inverse, theta, head_dim)
        return inverse, 1.0

    def by_length(self, theta: float, head_dim: int, lengths: Tensor) -> Tensor:
        """Angle a position under dynamic NTK, [tokens, head_dim/2] fp32: the base is multiplied by s^(d/(d-2)).

        With L the document's length and T the trained one, s = factor L/T - (factor - 1) as transformers has it, or
        2^(ceil(log2(L/T)) + 1) - 1 as Qwen 1's own code has it (`doubling`); at least 1.

        Args:
            lengths: [tokens] of the document that each token is of.
        """
        assert self.kind == "dynamic" and self.original_positions is not None
        ratio = lengths.double() / self.original_positions
        stretch = 2 ** (ratio.log2().ceil() + 1) - 1 if self.doubling else self.factor * ratio - (self.factor - 1)
        bases = theta * stretch.clamp_min(1) ** (head_dim / (head_dim - 2))
        return 1.0 / bases.float()[:, None] ** _exponents(head_dim).to(lengths.device)

    def stretched_positions(self, max_positions: int) -> int:
        """Positions of a config with `max_positions`, which may or may not count the interpolated ones."""
        if self.kind == "linear":
            return int(max_positions * self.factor)
        if self.kind == "yarn" and self.original_positions is not None:
            return max(max_positions, int(self.original_positions * self.factor))
        return max_positions

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long waves are stretched, short ones kept, those between blended (Llama 3.1, arXiv:2407.21783)."""
        assert self.original_positions is not None
        turns = self.original_positions * inverse / (2 * math.pi)  # over the trained length
        blend = ((turns - self.low_factor) / (self.high_factor - self.low_factor)).clamp(0, 1)
        return (1 - blend) * inverse / self.factor + blend * inverse

    def _yarn(self, inverse: Tensor, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """NTK by parts with a temperature on attention (arXiv:2309.00071)."""
        assert self.original_positions is not None

        def dim_of(turns: float) -> float:
            """The dim pair that makes `turns` turns over the trained length."""
            assert self.original_positions is not None
            return head_dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dim_of(self.beta_fast), dim_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        stretched = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        blended = inverse / self.factor * stretched + inverse * (1 - stretched)
        return blended, self._attention_scale()

    def _attention_scale(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def growth(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return growth(self.mscale) / growth(self.mscale_all_dim)
        return growth(1.0)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2).float() / head_dim


def alibi_slopes(heads: int) -> Tensor:
    """Slope of each head's penalty by distance in ALiBi (https://arxiv.org/abs/2108.12409), [heads] fp32.

    2^(-8/n), 2^(-16/n), ... for n heads, a power of two.

    For other numbers the slopes of the next lower power of two come first, and between them every other one of the
    next higher power, as the paper's published code has it.
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / lower) for i in range(lower)]
    between = [2.0 ** (-8 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return torch.tensor(slopes + between[: heads - lower])
