"""Adapters of the golden vectors of routers and their losses."""

from __future__ import annotations

import torch
from golden import Case, Outputs, adapter, tensor
from tiny_moe import moe_config
from trialign.engine.mesh import build_mesh
from trialign.kernels.moe import route
from trialign.models.config import MoEConfig
from trialign.models.moe import Router, Routing, router_metrics


@adapter("transformers", "load_balancing_loss_func")
def balance(case: Case) -> Outputs:
    """transformers pools the layers before the product, as the metric does; the loss of one layer is the same."""
    args, inputs = case["args"], case["inputs"]
    moe = MoEConfig(args["num_experts"], args["top_k"], ffn_size=1, aux_coef=1.0)
    logits = [tensor(case, name).requires_grad_() for name in inputs if name.startswith("gate_logits")]
    kept = torch.ones(len(logits[0])).bool()
    if "attention_mask" in inputs:  # a packed batch has no padding
        kept = tensor(case, "attention_mask").flatten().bool()
    tokens = int(kept.sum())
    routing, losses = Routing(torch.tensor([0, tokens], dtype=torch.int32), 1 / tokens), []
    for layer, each in enumerate(logits):
        _, chosen = route(each[kept].float(), moe.top_k, moe.normalize)
        losses.append(routing.losses(layer, each[kept], chosen, torch.tensor(0), moe))
    metrics = router_metrics([routing], moe_config(moe, num_layers=len(logits)), build_mesh())
    outputs: Outputs = {"loss": metrics["router_aux_loss"]}
    if len(logits) == 1:
        outputs["grad_gate_logits_0"] = torch.autograd.grad(losses[0], logits[0])[0]
    return outputs


@adapter("transformers", "MixtralTopKRouter")
def router(case: Case) -> Outputs:
    hidden, weight = tensor(case, "hidden_states"), tensor(case, "weight")
    module = Router(hidden.shape[1], len(weight), build_mesh(), torch.float32)
    module.weight.data.copy_(weight)
    logits = module(hidden)
    scores, chosen = route(logits, case["args"]["top_k"])
    return {"router_logits": logits, "router_scores": scores, "router_indices": chosen}
