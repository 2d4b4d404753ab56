"""Low-rank adapters inside the parallel linears (LoRA, https://arxiv.org/abs/2106.09685).

    y = x Wᵀ + s · (x Aᵀ) Bᵀ,   A [r, in], B [out, r],   s = α / r, or α / √r (rsLoRA, https://arxiv.org/abs/2312.03732)

W is frozen. A linear that fuses several weights (q, k, v) has an A and a B for each, stacked as its parts are.
Over tp, A is whole and B cut where W's outputs are cut; the backward sums the r numbers a token between them.
Where W's inputs are cut, A is cut and B whole, and the forward sums the r numbers. So an adapter adds no
collective wider than its rank, and no rank holds more of it than it must. Adapters of experts: experts.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mesh import Axis, Mesh
from .collectives import copy_to_region, reduce_from_region
from .shard import Shard, sharded_parameter


@dataclass(frozen=True)
class LoRA:
    """Settings of a model's adapters.

    Attributes:
        rank: r, of every adapter.
        alpha: α of the scale.
        targets: the weights that get one, by the model's names for them; ("all",) for all that it has.
        rslora: divide α by √r instead of r.
        quantize: keep the frozen weights of the linears in NF4 (QLoRA), with targets or without.

    Raises:
        ValueError: a value that makes no sense, naming it.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rslora: bool = False
    quantize: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha}: must be above 0")
        once = len(set(self.targets)) == len(self.targets)
        if self.targets != ("all",) and ("all" in self.targets or not self.targets or not once):
            raise ValueError(f"targets={self.targets}: must be one or more names, each once, or all alone")

    @property
    def scale(self) -> float:
        """s, the factor of the product of the two matrices."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def wants(self, target: str) -> bool:
        """Whether a weight of this name gets an adapter."""
        return target in self.targets or self.targets == ("all",)


class Adapter:
    """The adapter of one linear: its shapes, and how the linear uses the two parameters it holds as lora_a, lora_b.

    Args:
        outputs: part -> its outputs on this rank, of all parts in the order they are stacked.
        parts: those that have an adapter, in that order.
        cut: features of the weight that are sharded over tp: "out" (column parallel), "in" (row parallel) or none.
    """

    def __init__(self, lora: LoRA, outputs: Mapping[str, int], parts: Sequence[str], cut: str | None, axis: Axis):
        self.lora, self.outputs, self.parts, self.cut, self.axis = lora, outputs, parts, cut, axis
        ends = torch.tensor([outputs[part] for part in parts]).cumsum(0).tolist()
        self.rows = dict(zip(parts, pairwise((0, *ends)), strict=True))  # part -> its rows of B

    def narrow(self, x: Tensor, a: Tensor, *more: Any) -> Tensor:
        """[n, in or in/tp] -> [n, parts * r]."""
        hidden = F.linear(x, a.to(x.dtype))
        if self.cut is None:
            return hidden
        return (copy_to_region if self.cut == "out" else reduce_from_region)(hidden, self.axis)

    def widen(self, old: Tensor, hidden: Tensor, b: Tensor, rows: slice, *more: Any) -> Tensor:
        """One part's outputs [n, out/tp or out] with the product of its [n, r] added."""
        return torch.addmm(old, hidden, b[rows].t().to(hidden.dtype), alpha=self.lora.scale)

    def __call__(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, *more: Any) -> Tensor:
        """y [n, out/tp or out] with the adapter's part added, for the linear's own input x [n, in or in/tp]."""
        by_part = dict(zip(self.parts, self.narrow(x, a, *more).split(self.lora.rank, 1), strict=True))
        parts = []
        for part, old in zip(self.outputs, y.split(list(self.outputs.values()), 1), strict=True):
            parts.append(self.widen(old, by_part[part], b, slice(*self.rows[part]), *more) if part in by_part else old)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class AdaptedLinear(nn.Module):
    """Base of linears that may have an adapter: its two parameters, and a switch."""

    adapter: Adapter | None = None
    adapted = True
    """False while only the frozen weight counts"""
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    @property
    def active(self) -> Adapter | None:
        """The adapter, while it is on; None without one."""
        return self.adapter if self.adapted else None

    def add_adapter(self, adapter: Adapter, a: Shard, b: Shard, mesh: Mesh, dtype: torch.dtype) -> None:
        """Adds the adapter and its two parameters, uninitialized, with the pieces of the shards."""
        self.adapter = adapter
        self.lora_a, self.lora_b = (sharded_parameter(shard, dtype=dtype, device=mesh.device) for shard in (a, b))

    def with_adapter(self, y: Tensor, x: Tensor, *more: Any) -> Tensor:
        """y plus the active adapter's output for x; `more` are the adapter's further arguments."""
        return y if self.active is None else self.active(y, x, self.lora_a, self.lora_b, *more)


def adapted_linears(model: nn.Module) -> list[AdaptedLinear]:
    """The linears of a model that have an adapter."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear) and module.adapter is not None]
