"""Tensor-parallel layers, built sharded: Megatron-LM's column, row and vocabulary parallelism.

Weights are [out, in] as in torch; a parameter's `shard` describes its rectangle of the whole. Shards need not be equal
(`split`), so no size has to divide and nothing is padded: "/tp" in a shape means this rank's part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import layer_linear
from ...kernels.linear_logprob import linear_logprob
from ...kernels.nf4 import nf4_unpack
from ..mesh import Mesh
from .collectives import all_reduce, copy_to_region, reduce_from_region
from .lora import AdaptedLinear, Adapter, LoRA
from .nf4 import NF4Weight
from .shard import Shard, Split, full_piece, replicated, set_store, shard_along, sharded_parameter


def linear_weight(
    shard: Shard, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None
) -> tuple[nn.Parameter, NF4Weight | None]:
    """A linear's weight and, where `lora` keeps it in NF4, its storage."""
    if lora is None or not lora.quantize:
        return sharded_parameter(shard, dtype=dtype, device=mesh.device), None
    nf4 = NF4Weight(shard, mesh.tp, mesh.device)
    weight = sharded_parameter(shard, dtype=dtype, device=torch.device("meta"))
    set_store(weight, nf4)
    return weight, nf4


class MergeableLinear(AdaptedLinear):
    """Base of linears whose weight, a parameter or NF4, the generator may copy with the adapter merged."""

    merged_dtype: torch.dtype | None = None  # of `merged`; None for the weight's
    nf4: NF4Weight | None  # set by the class: a default here would hide the submodule

    @property
    def merged_bytes(self) -> int:
        """Size of `merged`; 0 where there is nothing to merge or unpack."""
        if self.active is None and self.nf4 is None:
            return 0
        return self.weight.numel() * (self.merged_dtype or self.weight.dtype).itemsize

    def freeze_adapter(self, spare: int) -> int:
        """Merges adapter and NF4 into a copy of at most `spare` bytes, or makes the adapter one product; until `thaw`,
        while nothing changes. Collective over tp where NF4's scales are new. Returns the bytes of the copy."""
        self.merged = self.wide = None
        if 0 < self.merged_bytes <= spare:
            self.merged = self._merged()
            return self.merged_bytes
        if self.active is not None:
            self.wide = self.active.block_diagonal(self.lora_a, self.lora_b)
        return 0

    def thaw(self) -> None:
        self.merged = self.wide = None

    @torch.no_grad()
    def _merged(self) -> Tensor:
        """W + s B A, summed in fp32 a part at a time and rounded once."""
        dtype, packed = self.merged_dtype or self.weight.dtype, None if self.nf4 is None else self.nf4.packed()
        wide = torch.promote_types(dtype, torch.float32)
        merged = self.weight.to(dtype, copy=True) if packed is None else nf4_unpack(packed, dtype)
        if self.active is not None:
            for rows, b, a in self.active.products(self.lora_a, self.lora_b):
                base = self.weight[rows].to(wide) if packed is None else nf4_unpack(packed.rows(rows), wide)
                merged[rows] = torch.addmm(base, b.to(wide), a.to(wide), alpha=self.active.lora.scale)
        return merged

    @property
    def served(self) -> Tensor | None:
        """The merged copy, where it stands for the weight: not while the adapter is switched off."""
        assert self.merged is None or not torch.is_grad_enabled(), "a merged copy has no gradient"
        return self.merged if self.adapted else None


class ParallelLinear(MergeableLinear):
    """Base of the parallel linears: a weight (a parameter, or NF4), an optional bias and an optional adapter."""

    frozen = False  # while the generator runs, which needs no gradients (kernels/linear.py)
    bias: nn.Parameter | None

    def __init__(self, shard: Shard, bias: Shard | None, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None):
        super().__init__()
        self.axis = mesh.tp
        self.weight, self.nf4 = linear_weight(shard, mesh, dtype, lora)
        self.bias = None if bias is None else sharded_parameter(bias, dtype=dtype, device=mesh.device)

    def freeze(self) -> None:
        """Chooses the kernel without gradients, until `thaw`."""
        self.frozen = True

    def thaw(self) -> None:
        super().thaw()
        self.frozen = False

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ by this rank's rectangle of W."""
        merged = self.served
        if merged is None and self.nf4 is not None:
            return self.nf4(x)
        return layer_linear(x, self.weight if merged is None else merged, self.frozen)


class ColumnParallelLinear(ParallelLinear):
    """y = x Wᵀ with the output features sharded over tp. Fused parts are sharded one by one, then stacked.

    [tokens, in] -> [tokens, sum(out)/tp]; the input is replicated. A part gets an adapter where `lora` targets
    `target` + its name.
    """

    def __init__(
        self,
        in_size: int,
        outputs: Mapping[str, Split],
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        lora: LoRA | None = None,
        target: str = "",
    ):
        def shard(*more: int) -> Shard:
            return Shard(tuple(shard_along(out, 0, (out.total, *more), part) for part, out in outputs.items()), "tp")

        super().__init__(shard(in_size), shard() if bias else None, mesh, dtype, lora)
        parts = [part for part in outputs if lora is not None and lora.adapts(target + part)]
        if lora is not None and parts:
            a = Shard(tuple(full_piece((lora.rank, in_size), part) for part in parts), adapter=True)
            b = tuple(shard_along(outputs[part], 0, (outputs[part].total, lora.rank), part) for part in parts)
            adapter = Adapter(lora, {part: out.size for part, out in outputs.items()}, parts, "out", mesh.tp)
            self.add_adapter(adapter, a, Shard(b, "tp", adapter=True), mesh, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.with_adapter(self.product(copy_to_region(x, self.axis)), x)
        return y if self.bias is None else y + self.bias


class RowParallelLinear(ParallelLinear):
    """y = x Wᵀ with the input features sharded over tp: [tokens, in/tp] -> [tokens, out], summed over tp.

    `target`: name that `lora` targets it by.
    """

    def __init__(
        self,
        inputs: Split,
        out_size: int,
        mesh: Mesh,
        dtype: torch.dtype,
        *,
        bias: bool = False,
        lora: LoRA | None = None,
        target: str = "",
    ):
        shard = Shard((shard_along(inputs, 1, (out_size, inputs.total)),), "tp")
        super().__init__(shard, replicated(out_size) if bias else None, mesh, dtype, lora)
        if lora is not None and lora.adapts(target):
            a = Shard((shard_along(inputs, 1, (lora.rank, inputs.total)),), "tp", adapter=True)
            b = Shard((full_piece((out_size, lora.rank)),), adapter=True)
            self.add_adapter(Adapter(lora, {"": out_size}, [""], "in", mesh.tp), a, b, mesh, dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.with_adapter(reduce_from_region(self.product(x), self.axis), x)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """Embedding with the vocabulary's rows sharded over tp: token ids [tokens] -> [tokens, hidden]."""

    def __init__(self, vocab: Split, hidden_size: int, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.vocab = vocab
        shard = Shard((shard_along(vocab, 0, (vocab.total, hidden_size)),), "tp")
        self.weight = sharded_parameter(shard, dtype=dtype, device=mesh.device)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.vocab.axis.size == 1:
            return F.embedding(tokens, self.weight)
        if not self.vocab.size:  # zeros, through which the backward runs as on the other ranks
            return reduce_from_region(self.weight.new_zeros(len(tokens), 0) @ self.weight, self.vocab.axis)
        local = tokens - self.vocab.start
        elsewhere = (local < 0) | (local >= self.vocab.size)
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_region(embedded.masked_fill(elsewhere[:, None], 0), self.vocab.axis)


def parallel_logprob(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab: Split, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy, from a head whose vocabulary is sharded over tp.

    Args:
        hidden: [tokens, hidden], replicated over tp.
        weight: [vocab/tp, hidden], this rank's rows.
        labels: [tokens] global token ids.
        vocab: the vocabulary's split.
        scale: 1/temperature; multiplies the logits.

    Returns:
        logprob and entropy, both [tokens] fp32, equal on every rank of tp.
    """

    def merge(stats: Tensor) -> Tensor:  # [4, tokens]: max, Σ exp, Σ exp·logit, label logit, of one shard
        largest = all_reduce(stats[0].clone(), vocab.axis, "max")
        factor = torch.exp(stats[0] - largest)
        sums = torch.stack((stats[1] * factor, stats[2] * factor, stats[3]))
        return torch.cat((largest[None], all_reduce(sums, vocab.axis)))

    return linear_logprob(
        copy_to_region(hidden, vocab.axis),
        weight,
        labels,
        scale,
        merge=merge if vocab.axis.size > 1 else None,
        vocab_start=vocab.start,
    )
