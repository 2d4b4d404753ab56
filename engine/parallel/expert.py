"""Expert parallelism: tokens are sent to the ranks that hold their experts and back (GShard,
https://arxiv.org/abs/2006.16668).

Rank r of the ep axis holds experts r·E/ep to (r + 1)·E/ep. Rows sorted by expert are therefore sorted by rank, and one
all-to-all with uneven splits brings each to its expert. There is no capacity limit, so no token is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.moe import grouped_matmul, sort_by_expert
from ..heartbeat import HEARTBEAT
from ..mesh import Axis, Mesh
from .collectives import copy_to_region
from .lora import Adapter, LoRA
from .nf4 import NF4Weight
from .shard import Piece, Shard, full_piece, shard_along, split
from .tensor import MergeableLinear, linear_weight


def all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Tensor:
    """Sends `sent[r]` rows to each rank r of the axis and receives `received[r]` from it.

    Args:
        rows: [sum(sent), ...], ordered by target rank.

    Returns:
        [sum(received), ...], ordered by source rank.
    """
    if axis.size == 1:
        return rows
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    with HEARTBEAT.waiting(f"all_to_all over {axis.name}"):
        dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=axis.group)
    return out


class Dispatch:
    """Routing of one batch of rows to the ranks of their experts. Over one rank nothing moves and no one waits.

    Args:
        offsets: [experts + 1] int64: rows offsets[e] to offsets[e + 1] are for expert e.

    Attributes:
        offsets: [local experts + 1] int64: the same for the rows that arrive on this rank.
        sent, received: rows for each rank and from each; empty over one rank, where the counts stay on the device.
    """

    sent: Sequence[int] = ()
    received: Sequence[int] = ()

    def __init__(self, offsets: Tensor, axis: Axis):
        self.axis, self.offsets = axis, offsets
        if axis.size == 1:
            return
        counts = offsets.diff().view(axis.size, -1)  # [ep, local experts]: rows for each expert of each rank
        ones = [1] * axis.size
        arriving = all_to_all(counts, ones, ones, axis)  # [ep, local experts]: each rank's rows for each expert here
        # The splits are needed on the host: the one place where it waits for the device.
        self.sent, self.received = torch.stack((counts.sum(1), arriving.sum(1))).tolist()
        local = torch.arange(counts.shape[1], device=offsets.device).repeat(axis.size)
        experts = local.repeat_interleave(arriving.flatten(), output_size=sum(self.received))  # [arriving rows]
        # Rows arrive ordered by rank, then by expert; the grouped products need them by expert.
        self.order, self.offsets = sort_by_expert(experts[:, None], counts.shape[1])
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(len(self.order), device=offsets.device)

    def send(self, rows: Tensor) -> Tensor:
        """[rows, h] by expert -> [arriving rows, h] by local expert. Not differentiable; `to_experts` is."""
        return all_to_all(rows, self.sent, self.received, self.axis)[self.order]

    def send_back(self, rows: Tensor) -> Tensor:
        """The inverse of `send`."""
        return all_to_all(rows[self.inverse], self.received, self.sent, self.axis)


class _Send(torch.autograd.Function):
    """Rows to their experts, or back; their gradients take the opposite way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dispatch: Dispatch, back: bool) -> Tensor:
        ctx.dispatch, ctx.back = dispatch, back
        return dispatch.send_back(rows) if back else dispatch.send(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.dispatch.send(grads[0]) if ctx.back else ctx.dispatch.send_back(grads[0])), None, None


def to_experts(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows [rows, h] sorted by expert to the ranks of their experts: [arriving rows, h]. Collective over the axis."""
    return rows if dispatch.axis.size == 1 else _Send.apply(rows, dispatch, False)


def from_experts(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """The experts' outputs [arriving rows, h] back to the ranks their rows came from: [rows, h]."""
    return rows if dispatch.axis.size == 1 else _Send.apply(rows, dispatch, True)


class _QuantizedProduct(torch.autograd.Function):
    """Rows times NF4 weights of experts, which are unpacked in the forward and again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight, experts: int, offsets: Tensor) -> Tensor:
        ctx.weight, ctx.experts = weight, experts
        ctx.save_for_backward(offsets)
        return grouped_matmul(x, weight.unpacked(x.dtype).view(experts, -1, x.shape[1]).transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,), (grad,) = ctx.saved_tensors, grads
        weight = ctx.weight.unpacked(grad.dtype).view(ctx.experts, grad.shape[1], -1)  # [local experts, out, in]
        return grouped_matmul(grad, weight, offsets), None, None, None


class ExpertAdapter(Adapter):
    """An adapter for every expert; both products are grouped by expert, as those of the weights are.

    Outputs and incoming gradients of experts are partial sums over tp, so activations are not reduced here; only the
    gradient of the matrix that is replicated over tp is.
    """

    def products(self, a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        rows = sum(self.outputs.values())
        experts = len(a) // (len(self.parts) * self.lora.rank)
        for expert, (own_a, own_b) in enumerate(zip(a.chunk(experts), b.chunk(experts), strict=True)):
            for part, part_b, part_a in super().products(own_a, own_b):
                yield slice(expert * rows + part.start, expert * rows + part.stop), part_b, part_a

    def block_diagonal(self, a: Tensor, b: Tensor) -> Tensor | None:
        if len(self.outputs) == 1:
            return None
        experts = len(a) // (len(self.parts) * self.lora.rank)
        pairs = zip(a.chunk(experts), b.chunk(experts), strict=True)
        each = [Adapter.block_diagonal(self, own_a, own_b) for own_a, own_b in pairs]
        return torch.cat([wide for wide in each if wide is not None])

    def narrow(self, x: Tensor, a: Tensor, *more: Any) -> Tensor:
        return self._product(x, copy_to_region(a, self.axis) if self.cut == "out" else a, slice(None), *more)

    def widen(self, old: Tensor, hidden: Tensor, b: Tensor, rows: slice, *more: Any) -> Tensor:
        b = copy_to_region(b, self.axis) if self.cut == "in" else b
        return torch.add(old, self._product(hidden, b, rows, *more), alpha=self.lora.scale)

    @staticmethod
    def _product(x: Tensor, weight: Tensor, rows: slice, offsets: Tensor) -> Tensor:
        by_expert = weight.view(len(offsets) - 1, -1, x.shape[1])[:, rows]  # [local experts, out, in]
        return grouped_matmul(x, by_expert.transpose(1, 2), offsets)


class ExpertLinear(MergeableLinear):
    """One matrix for each expert of this rank: [rows, in] sorted by expert -> [rows, out].

    The weight stacks [out, in] of the parts, expert by expert. It is sharded over tp along its output (`dim` 0:
    [rows, in] -> [rows, sum(out)/tp]) or its input (`dim` 1: [rows, in/tp] -> partial sums over tp).

    Args:
        out_sizes: part -> rows in every expert; expert e's part is named "e.part", or "e" where the part is "".
        target: `lora` targets a part by this plus the part's name.
    """

    def __init__(
        self,
        experts: int,
        in_size: int,
        out_sizes: Mapping[str, int],
        dim: int,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        lora: LoRA | None = None,
        target: str = "",
    ):
        super().__init__()
        self.experts = experts // mesh.ep.size
        first = mesh.ep.rank * self.experts

        def pieces(parts: Mapping[str, tuple[int, int]], dim: int | None) -> tuple[Piece, ...]:
            names = [
                (f"{e}.{part}" if part else f"{e}", shape)
                for e in range(first, first + self.experts)
                for part, shape in parts.items()
            ]
            return tuple(
                full_piece(s, name) if dim is None else shard_along(split(s[dim], mesh.tp), dim, s, name)
                for name, s in names
            )

        weight = Shard(pieces({part: (out, in_size) for part, out in out_sizes.items()}, dim), "tp", experts=True)
        self.weight, self.nf4 = linear_weight(weight, mesh, dtype, lora)
        parts = [part for part in out_sizes if lora is not None and lora.adapts(target + part)]
        if lora is not None and parts:
            on_a, on_b = (None, 0) if dim == 0 else (1, None)  # the dim that is sharded over tp
            outputs = {part: split(out, mesh.tp).size if dim == 0 else out for part, out in out_sizes.items()}
            a, b = (
                Shard(pieces(shapes, on), None if on is None else "tp", adapter=True, experts=True)
                for shapes, on in (
                    ({part: (lora.rank, in_size) for part in parts}, on_a),
                    ({part: (out_sizes[part], lora.rank) for part in parts}, on_b),
                )
            )
            adapter = ExpertAdapter(lora, outputs, parts, "in" if dim else "out", mesh.tp)
            self.add_adapter(adapter, a, b, mesh, dtype)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        merged = self.served
        if self.nf4 is None or merged is not None:
            weight = self.weight if merged is None else merged
            y = grouped_matmul(x, weight.view(self.experts, -1, x.shape[1]).transpose(1, 2), offsets)
        else:
            y = _QuantizedProduct.apply(x, self.nf4, self.experts, offsets)
        return self.with_adapter(y, x, offsets)
