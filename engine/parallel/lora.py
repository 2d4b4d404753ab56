"""Low-rank adapters inside the parallel linears (LoRA, https://arxiv.org/abs/2106.09685).

    y = x Wᵀ + s · (x Aᵀ) Bᵀ,   A [r, in], B [out, r],   s = α / r, or α / √r (rsLoRA, https://arxiv.org/abs/2312.03732)

W is frozen. A linear that fuses several weights (q, k, v) has an A and a B for each, stacked as its parts are.
Over tp, A is whole and B cut where W's outputs are cut; the r numbers a token between them are what the backward sums.
Where W's inputs are cut, A is cut and B whole, and the r numbers are what the forward sums. So an adapter adds no
collective wider than its rank, and no rank holds more of it than it must.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mesh import Axis
from .collectives import copy_to_region, reduce_from_region
from .shard import Piece, Shard

Target = Literal["q", "k", "v", "output", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = ("q", "k", "v", "output", "gate", "up", "down")


@dataclass(frozen=True)
class LoRA:
    """What adapters a model gets.

    Attributes:
        rank: r, of every adapter.
        alpha: α of the scale.
        targets: the weights that get one, by their names in TARGETS.
        rslora: divide α by √r instead of r.
        quantize: keep the frozen weights of the linears in NF4 (QLoRA), with targets or without.

    Raises:
        ValueError: a value that makes no sense, naming it.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = TARGETS
    rslora: bool = False
    quantize: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be above 0")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets={self.targets}: must be one or more of {', '.join(TARGETS)}, each once")

    @property
    def scale(self) -> float:
        """s, what the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter:
    """The adapter of one linear: its shapes, and how the linear uses the two parameters it holds as lora_a, lora_b.

    Args:
        outputs: part -> its outputs on this rank, of all parts in the order they are stacked.
        pieces: (A's, B's) of each part that has an adapter.
        cut: what of the linear's weight is cut over tp: "out" (column parallel) or "in" (row parallel).
    """

    def __init__(
        self, lora: LoRA, outputs: Mapping[str, int], pieces: Mapping[str, tuple[Piece, Piece]], cut: str, axis: Axis
    ):
        self.lora, self.outputs, self.cut, self.axis = lora, outputs, cut, axis
        self.parts = tuple(pieces)
        a, b = zip(*pieces.values(), strict=True)
        self.shard_a = Shard(tuple(a), "tp" if cut == "in" else None, adapter=True)
        self.shard_b = Shard(tuple(b), "tp" if cut == "out" else None, adapter=True)
        rows = (0, *torch.tensor([piece.shape[0] for piece in b]).cumsum(0).tolist())
        self.rows = dict(zip(self.parts, pairwise(rows), strict=True))  # part -> its rows of B

    def __call__(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """y [n, out/tp or out] with the adapter's part added, for the linear's own input x [n, in or in/tp]."""
        hidden = F.linear(x, a)  # [n, parts * r]
        hidden = (copy_to_region if self.cut == "out" else reduce_from_region)(hidden, self.axis)
        by_part = dict(zip(self.parts, hidden.split(self.lora.rank, 1), strict=True))
        made = []
        for part, old in zip(self.outputs, y.split(list(self.outputs.values()), 1), strict=True):
            if part in by_part:
                begin, end = self.rows[part]
                old = torch.addmm(old, by_part[part], b[begin:end].t(), alpha=self.lora.scale)
            made.append(old)
        return made[0] if len(made) == 1 else torch.cat(made, 1)


class AdaptedLinear(nn.Module):
    """What a linear with a place for an adapter has: the two parameters, and a switch."""

    adapter: Adapter | None = None
    adapted = True
    """False while only the frozen weight counts"""
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def with_adapter(self, y: Tensor, x: Tensor) -> Tensor:
        """y, plus what the adapter makes of x where there is one and it is on."""
        return self.adapter(y, x, self.lora_a, self.lora_b) if self.adapter is not None and self.adapted else y


def adapted_linears(model: nn.Module) -> list[AdaptedLinear]:
    """The linears of a model that have an adapter."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear) and module.adapter is not None]
