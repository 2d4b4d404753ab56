"""Low-rank adapters inside the parallel linears (LoRA, https://arxiv.org/abs/2106.09685).

    y = x Wᵀ + s · (x Aᵀ) Bᵀ,   A [r, in], B [out, r],   s = α / r, or α / √r (rsLoRA, https://arxiv.org/abs/2312.03732)

W is frozen. A linear with fused weights has an A and a B for each part, stacked as the parts are. Over tp, where W's
outputs are sharded, A is replicated and B sharded, and the backward all-reduces the r numbers a token between them.
Where W's inputs are sharded, A is sharded and B replicated, and the forward all-reduces the r numbers. Adapters of
experts: expert.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
        targets: the model's names of the weights that get an adapter; ("all",) for all of them.
        rslora: divide α by √r instead of r.
        quantize: keep the frozen weights of all linears in NF4 (QLoRA).

    Raises:
        ValueError: a value out of range.
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
        """s in the formula."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, target: str) -> bool:
        """Whether a weight of this name gets an adapter."""
        return target in self.targets or self.targets == ("all",)


class Adapter:
    """Shapes and forward of one linear's adapter; the linear holds its parameters as lora_a and lora_b.

    Args:
        outputs: part -> outputs on this rank, of all parts in the order they are stacked.
        parts: those that have an adapter, in that order.
        cut: features of the weight that are sharded over tp: "out" (column parallel), "in" (row parallel) or None.
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
        """One part's outputs [n, out/tp or out] plus the adapter's, from its hidden [n, r]."""
        return torch.addmm(old, hidden, b[rows].t().to(hidden.dtype), alpha=self.lora.scale)

    def products(self, a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows of the weight, B [rows, r], A [r, in or in/tp]) of each adapted part: adapted, it is W + s B A."""
        start = 0
        for part, size in self.outputs.items():
            if part in self.rows:
                first = self.parts.index(part) * self.lora.rank
                yield slice(start, start + size), b[slice(*self.rows[part])], a[first : first + self.lora.rank]
            start += size

    def block_diagonal(self, a: Tensor, b: Tensor) -> Tensor | None:
        """B [out/tp or out, parts * r] of all parts at once, zero elsewhere: one product in place of one for each part
        and a concatenation. None where B already is."""
        if len(self.outputs) == 1:
            return None
        wide, rank = b.new_zeros(sum(self.outputs.values()), len(self.parts) * self.lora.rank), self.lora.rank
        for number, (rows, own, _) in enumerate(self.products(a, b)):
            wide[rows, number * rank : (number + 1) * rank] = own
        return wide

    def __call__(self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, *more: Any) -> Tensor:
        """y [n, out/tp or out] plus the adapter's output for x [n, in or in/tp], the linear's input."""
        by_part = dict(zip(self.parts, self.narrow(x, a, *more).split(self.lora.rank, 1), strict=True))
        parts = []
        for part, old in zip(self.outputs, y.split(list(self.outputs.values()), 1), strict=True):
            parts.append(self.widen(old, by_part[part], b, slice(*self.rows[part]), *more) if part in by_part else old)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class AdaptedLinear(nn.Module):
    """Base of linears with an optional adapter.

    Attributes:
        adapted: False while the adapter is switched off.
        merged: while the generator holds the weights constant: the weight with its adapter, or NF4 unpacked, in floats
            of its own. The weight and the adapter are untouched.
        wide: where there is no room for `merged`: `Adapter.block_diagonal`.
    """

    adapter: Adapter | None = None
    adapted = True
    merged: Tensor | None = None
    wide: Tensor | None = None
    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    @property
    def active(self) -> Adapter | None:
        """The adapter; None where there is none or it is switched off."""
        return self.adapter if self.adapted else None

    def add_adapter(self, adapter: Adapter, a: Shard, b: Shard, mesh: Mesh, dtype: torch.dtype) -> None:
        """Adds the adapter and its two parameters, uninitialized."""
        self.adapter = adapter
        self.lora_a, self.lora_b = (sharded_parameter(shard, dtype=dtype, device=mesh.device) for shard in (a, b))

    def with_adapter(self, y: Tensor, x: Tensor, *more: Any) -> Tensor:
        """y plus the active adapter's output for x; `more` are the adapter's other arguments."""
        if self.active is None or self.merged is not None:
            return y
        if self.wide is None:
            return self.active(y, x, self.lora_a, self.lora_b, *more)
        assert not torch.is_grad_enabled(), "a cached B has no gradient"
        hidden = self.active.narrow(x, self.lora_a, *more)
        return self.active.widen(y, hidden, self.wide, slice(None), *more)


def adapted_linears(model: nn.Module) -> list[AdaptedLinear]:
    """Linears of a model that have an adapter."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear) and module.adapter is not None]
