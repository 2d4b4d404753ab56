"""SwiGLU feed-forward network (https://arxiv.org/abs/2002.05202), sharded over tp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.mesh import Mesh
from ..engine.parallel.shard import split
from ..engine.parallel.tensor import ColumnParallelLinear, RowParallelLinear
from ..kernels.swiglu import swiglu


class MLP(nn.Module):
    """[tokens, hidden] -> [tokens, hidden], with ffn/tp columns on each rank.

    Args:
        prefix: of the LoRA targets gate, up and down ("shared." in a shared expert).
        options: `bias` and `lora` of the linears.
    """

    def __init__(self, hidden: int, ffn: int, mesh: Mesh, dtype: torch.dtype, prefix: str = "", **options: Any):
        super().__init__()
        columns = split(ffn, mesh.tp)
        outputs = {"gate": columns, "up": columns}
        self.gate_up = ColumnParallelLinear(hidden, outputs, mesh, dtype, target=prefix, **options)
        self.down = RowParallelLinear(columns, hidden, mesh, dtype, target=f"{prefix}down", **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))
