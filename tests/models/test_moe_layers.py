"""MoE decoders in every layout; router losses and metrics against transformers and autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import ALONE, Layout, assert_close, assert_layouts_agree
from tiny import VOCAB, assemble
from tiny_moe import MIXTRAL, SHARED, fill, moe_config, moe_decoder
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.micro_batch import update_micro_batches
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import stage_forward, target_logprobs
from trialign.engine.mesh import Mesh, build_mesh, mesh_as
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.expert import Dispatch
from trialign.models.config import MoEConfig, check_layout
from trialign.models.moe import MoE, Routing

LENGTHS = [7, 1, 20, 12]
DOCUMENTS = [5, 19, 3, 14, 15, 2, 9]
LAYOUTS = (Layout(dp=4, ep=4), Layout(dp=4, ep=2), Layout(tp=2, dp=2, ep=2), Layout(tp=2, pp=2, dp=2, ep=2))
both = pytest.mark.parametrize("moe", [MIXTRAL, SHARED], ids=["mixtral", "shared"])


def random_batch(lengths: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(2)
    return pack([torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths])


def learner_of(mesh: Mesh, moe: MoEConfig, samples: int, **options: Any) -> Learner:
    """With `samples` a micro-batch."""
    model = moe_decoder(moe_config(moe), mesh, **options)
    optimizer = ShardedAdamW(model, mesh, eps=1e-5, max_grad_norm=0.5)
    return Learner(model, optimizer, lambda step: 1e-3, sizes=UpdateConfig(micro_batch_size=samples))


def step(learner: Learner, batch: Batch) -> dict[str, float]:
    """Metrics of an optimizer step of language modeling."""

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(learner.model, part, hidden, 1.0)[0].sum() / len(batch.response)

    return learner.step(batch, loss)


def one_step(
    rank: int, world: int, layout: Layout, moe: MoEConfig, samples: int = 1, recompute: bool = False, skew: bool = False
):
    """Metrics, whole states, and logprobs after the step. `skew`: all tokens go to the first top_k experts; without
    logprobs, as nearly equal experts may be chosen after it."""
    learner, batch = learner_of(layout.mesh(), moe, samples, recompute=recompute), random_batch(DOCUMENTS)
    if skew:
        for name, parameter in learner.model.named_parameters():
            parameter.data *= not name.endswith("router.weight")
    metrics, optimizer = step(learner, batch), learner.optimizer
    for bucket in optimizer.buckets:
        bucket.states["grad"] = bucket.grads[bucket.local]
    states = assemble(optimizer.entries("net", lambda name, part: f"{name}:{part}"), learner.mesh.world)
    return (metrics, states) if skew else (metrics, states, learner.logprobs(batch))


@both
def test_layouts_micro_batches_and_recomputation_agree(moe):
    """Each document in its own micro-batch: ranks have unequally many."""
    axes = [mesh_as(rank, tp=1, pp=1, dp=4, ep=2).dp for rank in range(4)]
    sizes, batch = UpdateConfig(micro_batch_size=1), random_batch(DOCUMENTS)
    assert len({len(update_micro_batches(batch, range(len(batch)), sizes, axis)) for axis in axes}) > 1
    alone = one_step(0, 1, ALONE, moe, 8)
    assert_layouts_agree(one_step, LAYOUTS, moe, expected=alone)
    assert_layouts_agree(one_step, [ALONE, Layout(pp=2, dp=2, ep=2)], moe, 1, True, expected=alone)


def test_layouts_agree_with_experts_without_tokens():
    """The router's weights are zero, and after the step relative to it."""
    layouts = [Layout(dp=4, ep=4), Layout(tp=2, dp=2, ep=2)]
    assert_layouts_agree(one_step, layouts, SHARED, 1, False, True, tolerance=1e-4)


def test_ep_that_does_not_divide_experts_is_refused():
    with pytest.raises(ValueError, match=r"moe\.experts=4.* ep=3; allowed ep: 1, 2, 4"):
        check_layout(moe_config(), tp=1, pp=1, ep=3)


def peer_loss(logits: Any, moe: MoEConfig) -> Tensor:
    loss = load_balancing_loss_func(logits, moe.experts, moe.top_k)
    assert isinstance(loss, Tensor)
    return loss


@both
def test_gradients_equal_autograd_of_explicit_losses(moe):
    """Per sample transformers' own loss, weighted by tokens; the square of log-sum-exp."""
    x, upstream = torch.randn(2, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    layer = MoE(moe_config(moe), 0, build_mesh(), torch.float32)
    fill(layer)
    gradients = []
    for injected in (True, False):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        if injected:
            ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
            (layer(leaf, Routing(ends, scale=1 / sum(LENGTHS))) * upstream).sum().backward()
        else:
            logits = leaf @ layer.router.weight.t()
            balance = sum(len(s) * peer_loss((s,), moe) for s in logits.split(LENGTHS)) / sum(LENGTHS)
            z = logits.exp().sum(1).log().square().mean()
            ((layer(leaf) * upstream).sum() + moe.aux_coef * balance + moe.z_coef * z).backward()
        gradients.append({"x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    assert_close(*gradients)
    layer.zero_grad()
    (layer(x) * upstream).sum().backward()
    without = layer.router.weight.grad
    assert without is not None and (without - gradients[1]["router.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(("moe", "recompute"), [(MIXTRAL, True), (SHARED, False)], ids=["mixtral", "shared"])
def test_metrics_equal_those_of_the_whole_batch(moe, recompute):
    """In two micro-batches, each token counted once."""
    learner, batch = learner_of(build_mesh(), moe, 2, recompute=recompute), random_batch(LENGTHS)
    logits: list[Any] = []  # [tokens, experts] of every MoE layer
    routers = [layer.mlp.router for layer in learner.model.layers.values() if isinstance(layer.mlp, MoE)]
    hooks = [router.register_forward_hook(lambda module, inputs, output: logits.append(output)) for router in routers]
    with torch.no_grad():
        stage_forward(learner.model, batch, None)
    for hook in hooks:
        hook.remove()
    assert len(logits) == 4 - len(moe.dense_layers)
    samples = [s for x in logits for s in x.split(LENGTHS)]
    every = torch.cat(logits).double()
    counts = [torch.bincount(x.topk(moe.top_k).indices.flatten(), minlength=moe.experts).double() for x in logits]
    p = every.softmax(1)
    expected = {
        "router_aux_loss": peer_loss(tuple(logits), moe).item(),
        "router_balance_loss": sum(len(s) * peer_loss((s,), moe).item() for s in samples) / len(every),
        "router_z_loss": every.exp().sum(1).log().square().mean().item(),
        "router_load": max((c.max() / c.mean()).item() for c in counts),
        "router_entropy": -(p * p.log()).sum(1).mean().item(),
        "router_dropped": 0,
    }
    metrics = step(learner, batch)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_rows_that_reach_no_expert_are_counted(monkeypatch):
    learner, batch = learner_of(build_mesh(), MIXTRAL, 2), random_batch(LENGTHS)
    losing = {  # three rows never reach their experts
        "Dispatch": lambda offsets, axis: Dispatch(offsets.clamp(max=offsets[-1] - 3), axis),
        "to_experts": lambda rows, dispatch: rows[:-3],
        "from_experts": lambda rows, dispatch: F.pad(rows, (0, 0, 0, 3)),
    }
    for name, function in losing.items():
        monkeypatch.setattr(f"trialign.models.moe.{name}", function)
    assert step(learner, batch)["router_dropped"] == pytest.approx(2 * 3 / sum(LENGTHS))  # in each micro-batch
