"""Mixture-of-experts layer: Mixtral (https://arxiv.org/abs/2401.04088), Qwen2-MoE, Qwen3-MoE.

    l = W_router x,   p = softmax(l),   y = Σ_j w_j · E_j(x) over the k likeliest experts,   w_j = p_j (or p_j / Σ p_j)
    Qwen2-MoE adds σ(w_shared · x) · E_shared(x), a shared expert.

Two router losses, with T the tokens of the whole batch, both averaged over the MoE layers:

    z-loss (ST-MoE, https://arxiv.org/abs/2202.08906, equation 5):   1/T Σ_t (log Σ_e exp l_te)²
    load balancing (Switch, https://arxiv.org/abs/2101.03961, equations 4 to 6), in each sample s of T_s tokens:
        1/T Σ_s T_s · experts · Σ_e f_se · P_se,   f_se: choices of e a token in s,   P_se: mean of p_te in s

The latter is computed per sample, so that it does not depend on micro-batches and layout. Coefficients:
optimizer.router_z_coef and optimizer.router_aux_coef.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.mesh import Mesh
from ..engine.parallel.collectives import all_reduce, copy_to_region, from_mesh, reduce_from_region
from ..engine.parallel.expert import Dispatch, ExpertLinear, from_experts, to_experts
from ..engine.parallel.lora import Adapter, LoRA
from ..engine.parallel.shard import Shard, full_piece, replicated, sharded_parameter
from ..engine.parallel.tensor import MergeableLinear
from ..kernels.moe import permute, route, router_logits, sort_by_expert, unpermute
from ..kernels.swiglu import swiglu
from .config import ModelConfig, MoEConfig
from .mlp import MLP


@dataclass(frozen=True)
class Routing:
    """State of the router losses in one micro-batch of an update: their scale, and sums for the metrics.

    Activation checkpointing runs a forward twice, and writes the same sums twice.
    """

    cu_seqlens: Tensor  # [samples + 1] int32
    scale: float  # of the losses: 1 / (tokens of the whole batch x MoE layers)
    sums: dict[int, Tensor] = field(default_factory=dict)  # layer -> [2 experts + 5] fp64, see `losses`

    def losses(self, layer: int, logits: Tensor, experts: Tensor, lost: Tensor, moe: MoEConfig) -> Tensor:
        """Weighted sum of a layer's router losses, a scalar fp32.

        Args:
            logits: [n, experts].
            experts: [n, k], chosen for each token.
            lost: number of rows that reached no expert (`Experts`).
        """
        logits = logits.float()
        p, z = logits.softmax(1), logits.logsumexp(1).square()  # [n, experts], [n]
        lengths = self.cu_seqlens.diff()
        sample = torch.arange(len(lengths), device=p.device).repeat_interleave(lengths, output_size=len(p))  # [n]
        chosen = torch.zeros_like(p).scatter_(1, experts, 1.0)  # [n, experts]
        pairs = (sample[:, None] * moe.experts + experts).flatten()  # [n * k]: index of (sample, expert)
        counts = pairs.new_zeros(len(lengths) * moe.experts)  # not bincount: it waits for the device to size its result
        counts = counts.scatter_add_(0, pairs, torch.ones_like(pairs)).view(-1, moe.experts)  # integers: any order
        fractions = counts / lengths[:, None]  # f: [samples, experts]
        balance = moe.experts * (p * fractions[sample]).sum(1)  # [n]: its sum is Σ_s T_s · experts · Σ_e f_se · P_se
        entropy = -(p * logits.log_softmax(1)).sum()
        with torch.no_grad():
            rest = torch.stack((balance.sum(), z.sum(), entropy))
            rows = torch.stack((lost.new_full((), len(p)), lost))  # int64: fp32 is not exact past 2^24
            self.sums[layer] = torch.cat((chosen.sum(0), p.sum(0), rest, rows.double()))
        return self.scale * (moe.aux_coef * balance.sum() + moe.z_coef * z.sum())


class _WithLoss(torch.autograd.Function):
    """Identity on x whose backward also starts that of `loss`: the loss needs no path to the last pipeline stage."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), device=grads[0].device)


class Router(MergeableLinear):
    """[n, hidden] -> logits [n, experts] fp32; replicated over tp. `target` is its LoRA target."""

    merged_dtype = torch.float32  # rounded to bf16, the generator would choose other experts than training does

    def __init__(
        self, hidden: int, experts: int, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None, target: str = ""
    ):
        super().__init__()
        self.weight, self.nf4 = sharded_parameter(replicated(experts, hidden), dtype=dtype, device=mesh.device), None
        if lora is not None and lora.adapts(target):
            adapter = Adapter(lora, {"": experts}, [""], None, mesh.tp)
            a, b = (Shard((full_piece(shape),), adapter=True) for shape in ((lora.rank, hidden), (experts, lora.rank)))
            self.add_adapter(adapter, a, b, mesh, dtype)

    def forward(self, x: Tensor) -> Tensor:
        merged = self.served
        if merged is not None:
            return x.float() @ merged.t()
        logits = router_logits(x, self.weight)
        return logits if self.active is None else self.with_adapter(logits, x.float())


class Experts(nn.Module):
    """SwiGLU MLPs, distributed over ep and each sharded over tp.

    Returns:
        [n, hidden], a partial sum over tp; and the number of rows that were not sent from this rank, or were received
        and reached no expert, a scalar int64.
    """

    def __init__(self, hidden: int, moe: MoEConfig, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        self.count, self.axis, ffn = moe.experts, mesh.ep, moe.ffn_size
        self.gate_up = ExpertLinear(
            moe.experts, hidden, {"gate": ffn, "up": ffn}, 0, mesh, dtype, lora=lora, target="experts."
        )
        self.down = ExpertLinear(moe.experts, ffn, {"": hidden}, 1, mesh, dtype, lora=lora, target="experts.down")

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        order, offsets = sort_by_expert(chosen, self.count)
        dispatch = Dispatch(offsets, self.axis)
        rows = to_experts(permute(x, order, chosen.shape[1]), dispatch)  # [rows received, hidden] by expert
        local = dispatch.offsets.int()  # once a layer: as the grouped products take them
        rows = self.down(swiglu(self.gate_up(rows, local)), local)
        lost = chosen.numel() - sum(dispatch.sent) + sum(dispatch.received) - dispatch.offsets[-1]
        return unpermute(from_experts(rows, dispatch), order, weights), lost


class MoE(nn.Module):
    """MoE layer: [n, hidden] -> [n, hidden]. Collective over ep, whose ranks may have different n.

    Args:
        index: of the layer in the whole model.
    """

    def __init__(self, config: ModelConfig, index: int, mesh: Mesh, dtype: torch.dtype, lora: LoRA | None = None):
        super().__init__()
        assert config.moe is not None
        self.moe, self.index, self.tp, hidden = config.moe, index, mesh.tp, config.hidden_size
        self.router = Router(hidden, self.moe.experts, mesh, dtype, lora, "router")
        self.experts = Experts(hidden, self.moe, mesh, dtype, lora)
        self.shared = self.shared_gate = None
        if self.moe.shared_ffn_size:
            self.shared = MLP(hidden, self.moe.shared_ffn_size, mesh, dtype, "shared.", lora=lora)
            self.shared_gate = Router(hidden, 1, mesh, dtype, lora, "shared.router")

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """`routing`: of an update's micro-batch; None outside updates."""
        logits = self.router(x)  # [n, experts]
        weights, chosen = route(logits, self.moe.top_k, self.moe.normalize)  # [n, k] both
        # The experts' outputs are partial sums over tp, and so are the gradients of their inputs and weights.
        y, lost = self.experts(copy_to_region(x, self.tp), copy_to_region(weights, self.tp), chosen)
        y = reduce_from_region(y, self.tp)
        if self.shared is not None and self.shared_gate is not None:
            y = y + torch.sigmoid(self.shared_gate(x)).to(x.dtype) * self.shared(x)
        return y if routing is None else _WithLoss.apply(y, routing.losses(self.index, logits, chosen, lost, self.moe))


def moe_layers(config: ModelConfig) -> list[int]:
    """Indices of the MoE layers."""
    dense = config.moe.dense_layers if config.moe else range(config.num_layers)
    return [i for i in range(config.num_layers) if i not in dense]


def router_metrics(micro_batches: Sequence[Routing | None], config: ModelConfig, mesh: Mesh) -> dict[str, float]:
    """Metrics of an update's routers over all tokens and layers; the same on every rank. Collective over the mesh.

    Returns:
        router_balance_loss, router_z_loss: as in the module's docstring, without coefficients; router_aux_loss: as
        transformers' `load_balancing_loss_func`, with samples pooled and layers averaged before the product;
        router_load: tokens of the busiest expert of any layer over that layer's mean; router_entropy: mean entropy of
        p in nats; router_dropped: choices per token that did not reach their expert, counted where rows are sent and
        where they are received (0: there is no capacity limit).
    """
    assert config.moe is not None
    layers, experts = moe_layers(config), config.moe.experts
    sums = torch.zeros(len(layers), 2 * experts + 5, dtype=torch.float64, device=mesh.device)
    for routing in micro_batches:
        for layer, values in routing.sums.items() if routing else ():
            sums[layers.index(layer)] += values
    from_mesh(all_reduce(all_reduce(sums, mesh.dp_cp), mesh.pp), mesh)
    chosen, p, rest = sums.split([experts, experts, 5], 1)  # [layers, experts] twice, [layers, 5]
    balance, z, entropy, rows, lost = rest.sum(0).tolist()
    return {
        "router_balance_loss": balance / rows,
        "router_aux_loss": experts * (chosen.sum(0) @ p.sum(0)).item() / rows**2,
        "router_z_loss": z / rows,
        "router_load": (chosen.amax(1) / chosen.mean(1)).max().item(),
        "router_entropy": entropy / rows,
        "router_dropped": lost / rows,
    }
