"""Position encodings: rotary frequencies (https://arxiv.org/abs/2104.09864) with their scalings, and ALiBi's slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True)
class Rope:
    """Scaling of rotary embeddings to contexts longer than the trained length.

    `dynamic` NTK uses plain angles up to the trained length; a longer document has its own base, by which all of its
    tokens are rotated (`by_length`).
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
    """yarn: rotations over the trained length between which interpolation blends into extrapolation"""
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """yarn: factor of cos and sin; default: 0.1 ln(factor) + 1"""
    truncate: bool = True
    """yarn: round the bounds of the transition to integer dims"""
    doubling: bool = False
    """dynamic: the base grows when the length doubles (Qwen 1), not with every token"""

    def frequencies(self, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """Angles per position [head_dim/2] fp32, and the factor of cos and sin.

        In fp32, as the published models were trained: at large positions float64 gives other angles.
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
        """Angles per position under dynamic NTK, [tokens, head_dim/2] fp32: the base is multiplied by s^(d/(d-2)).

        With L the document's length and T the trained one, s = factor L/T - (factor - 1) as in transformers, or
        2^(ceil(log2(L/T)) + 1) - 1 as in Qwen 1's code (`doubling`); at least 1.

        Args:
            lengths: [tokens], of each token's document.
        """
        assert self.kind == "dynamic" and self.original_positions is not None
        ratio = lengths.double() / self.original_positions
        stretch = 2 ** (ratio.log2().ceil() + 1) - 1 if self.doubling else self.factor * ratio - (self.factor - 1)
        bases = theta * stretch.clamp_min(1) ** (head_dim / (head_dim - 2))
        return 1.0 / bases.float()[:, None] ** _exponents(head_dim).to(lengths.device)

    def stretched_positions(self, max_positions: int) -> int:
        """Positions after scaling, given config.json's `max_positions` (before scaling, or, for yarn, maybe after)."""
        if self.kind == "linear":
            return int(max_positions * self.factor)
        if self.kind == "yarn" and self.original_positions is not None:
            return max(max_positions, int(self.original_positions * self.factor))
        return max_positions

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Llama 3.1 (arXiv:2407.21783): long wavelengths are scaled, short ones kept, those between blended."""
        assert self.original_positions is not None
        rotations = self.original_positions * inverse / (2 * math.pi)  # over the trained length
        blend = ((rotations - self.low_factor) / (self.high_factor - self.low_factor)).clamp(0, 1)
        return (1 - blend) * inverse / self.factor + blend * inverse

    def _yarn(self, inverse: Tensor, theta: float, head_dim: int) -> tuple[Tensor, float]:
        """YaRN (arXiv:2309.00071): NTK by parts, with a temperature on attention."""
        assert self.original_positions is not None
        # Dims that make beta_fast and beta_slow rotations over the trained length.
        low, high = (
            head_dim * math.log(self.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (self.beta_fast, self.beta_slow)
        )
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
    """Slopes of ALiBi's linear distance penalty (https://arxiv.org/abs/2108.12409), [heads] fp32.

    2^(-8/n), 2^(-16/n), ... for n heads, a power of two. Other numbers of heads take the slopes of the next lower power
    of two, then every other slope of the next higher one (the paper's code).
    """
    lower = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / lower) for i in range(lower)]
    more = [2.0 ** (-8 * (i + 1) / (2 * lower)) for i in range(0, 2 * lower, 2)]
    return torch.tensor(slopes + more[: heads - lower])
