"""Mixture-of-experts layers, router losses and metrics: against transformers, and in every layout."""

import dataclasses
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
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role, stage_forward, target_logprobs
from trialign.engine.mesh import Axis, build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.expert import Dispatch
from trialign.engine.parallel.shard import shard_of
from trialign.models.config import MoEConfig, check_layout
from trialign.models.moe import MoE, Routing


def transformers_block(family: str) -> tuple[Any, MoEConfig]:
    """A random block of the library, and its config."""
    from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes: Any = {"hidden_size": 32, "num_experts_per_tok": 3}
    qwen: Any = sizes | {"num_experts": 6, "moe_intermediate_size": 20}
    moe = MoEConfig(experts=6, top_k=3, ffn_size=20)
    if family == "mixtral":
        block = MixtralSparseMoeBlock(MixtralConfig(num_local_experts=6, intermediate_size=20, **sizes))
    elif family == "qwen3_moe":
        block = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(norm_topk_prob=True, **qwen))
    else:
        block = Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(norm_topk_prob=False, shared_expert_intermediate_size=12, **qwen))
        moe = dataclasses.replace(moe, normalize=False, shared_ffn_size=12)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return block, moe


def block_tensor(tensors: dict[str, Tensor], name: str, part: str) -> Tensor:
    """The block's tensor of a part of a MoE layer's parameter."""
    if name.startswith("experts."):
        expert, _, half = part.partition(".")
        fused = tensors["experts.gate_up_proj" if half else "experts.down_proj"][int(expert)]
        return fused.chunk(2)[half == "up"] if half else fused
    names = {"router": "gate", "shared_gate": "shared_expert_gate", "shared.down": "shared_expert.down_proj"}
    return tensors[names.get(name.removesuffix(".weight"), f"shared_expert.{part}_proj") + ".weight"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_layer_equals_transformers(family):
    block, moe = transformers_block(family)
    layer = MoE(moe_config(moe), 0, build_mesh(), torch.float32)
    parts = {name: [piece.part for piece in shard_of(p).pieces] for name, p in layer.named_parameters()}

    def in_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.cat([block_tensor(tensors, n, part) for part in held]) for n, held in parts.items()}

    layer.load_state_dict(in_layer({name: p.data for name, p in block.named_parameters()}))
    x, upstream = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1)).unbind(0)
    leaf, peer_leaf = x.clone().requires_grad_(), x[None].clone().requires_grad_()
    out, expected = layer(leaf), block(peer_leaf)[0]
    out.backward(upstream)
    expected.backward(upstream)
    assert_close((out, leaf.grad), (expected, peer_leaf.grad[0]))  # pyright: ignore[reportOptionalSubscript]
    gradients = in_layer({name: p.grad for name, p in block.named_parameters()})
    assert_close({name: p.grad for name, p in layer.named_parameters()}, gradients)


def one_step(rank: int, world: int, layout: Layout, moe: MoEConfig, recompute: bool = False, samples: int = 1):
    """Metrics, whole states and logprobs after one step of language modeling."""
    mesh, generator = layout.mesh(), torch.Generator().manual_seed(7)
    lengths = [5, 19, 3, 14, 15, 2, 9]
    batch = pack([torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths])
    model = moe_decoder(moe_config(moe), mesh, recompute=recompute)
    optimizer, sizes = ShardedAdamW(model, mesh, eps=1e-5, max_grad_norm=0.5), UpdateConfig(micro_batch_size=samples)
    learner = Learner(model, optimizer, lambda step: 1e-3, sizes=sizes)

    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(model, part, hidden, 1.0)[0].sum() / len(batch.response)

    metrics = learner.step(batch, loss)
    for bucket in optimizer.buckets:
        bucket.states["grad"] = bucket.grads[bucket.local]
    states = assemble(optimizer.entries("net", lambda name, part: f"{name}:{part}"), mesh.world)
    return metrics, states, Role(model, sizes=sizes).logprobs(batch)


LAYOUTS = (Layout(dp=4, ep=4), Layout(dp=4, ep=2), Layout(tp=2, dp=2, ep=2), Layout(tp=2, pp=2, dp=2, ep=2))


@pytest.mark.parametrize("moe", [MIXTRAL, SHARED], ids=["mixtral", "shared"])
def test_layouts_micro_batches_and_recomputation_agree(moe):
    """Seven documents, each in its own micro-batch: ranks have unequally many."""
    alone = one_step(0, 1, ALONE, moe, False, 8)
    assert_layouts_agree(one_step, LAYOUTS, moe, expected=alone)
    assert_layouts_agree(one_step, [ALONE, Layout(pp=2, dp=2, ep=2)], moe, True, expected=alone)


def test_ep_that_does_not_divide_experts_is_refused():
    with pytest.raises(ValueError, match=r"moe\.experts=4.* ep=3; allowed ep: 1, 2, 4"):
        check_layout(moe_config(), tp=1, pp=1, ep=3)


# Router losses and metrics.

LENGTHS = [7, 1, 20, 12]


def peer_loss(logits: Any, moe: MoEConfig, mask: Tensor | None = None) -> Tensor:
    loss = load_balancing_loss_func(logits, moe.experts, moe.top_k, mask)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize("moe", [MIXTRAL, SHARED], ids=["mixtral", "shared"])
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


def router_logits(model, batch: Batch) -> tuple[Tensor, ...]:
    """[tokens, experts] of every MoE layer, for the whole batch."""
    seen: list[Any] = []
    routers = [layer.mlp.router for layer in model.layers.values() if isinstance(layer.mlp, MoE)]
    hooks = [router.register_forward_hook(lambda module, inputs, output: seen.append(output)) for router in routers]
    with torch.no_grad():
        stage_forward(model, batch, None)
    for hook in hooks:
        hook.remove()
    return tuple(seen)


def learner_of(moe: MoEConfig | None, **options: Any) -> Learner:
    model = moe_decoder(moe_config(moe), build_mesh(), **options)
    sizes = UpdateConfig(micro_batch_size=2)  # two micro-batches of the four samples
    return Learner(model, ShardedAdamW(model, model.mesh), lambda step: 1e-3, sizes=sizes)


def step(learner: Learner, batch: Batch) -> dict[str, float]:
    def loss(part: Batch, hidden: Tensor) -> Tensor:
        return -target_logprobs(learner.model, part, hidden, 1.0)[0].sum() / len(batch.response)

    return learner.step(batch, loss)


def random_batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    return pack([torch.randint(VOCAB, (n,), generator=generator).tolist() for n in LENGTHS])


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("moe", [MIXTRAL, SHARED], ids=["mixtral", "shared"])
def test_metrics_equal_those_of_the_whole_batch(moe, recompute):
    """In two micro-batches, each token counted once."""
    learner, batch = learner_of(moe, recompute=recompute), random_batch()
    logits = router_logits(learner.model, batch)
    assert len(logits) == 4 - len(moe.dense_layers)
    got = step(learner, batch)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]  # [samples, length]
    padded = tuple(torch.zeros(mask.numel(), moe.experts).masked_scatter(mask.view(-1, 1), x) for x in logits)
    aux = peer_loss(logits, moe).item()
    assert peer_loss(padded, moe, mask.long()).item() == pytest.approx(aux, rel=1e-5)
    samples = [s for x in logits for s in x.split(LENGTHS)]
    balance = sum(len(s) * peer_loss((s,), moe).item() for s in samples) / sum(len(x) for x in logits)
    every = torch.cat(logits).double()
    counts = [torch.bincount(x.topk(moe.top_k).indices.flatten(), minlength=moe.experts).double() for x in logits]
    p = every.softmax(1)
    expected = {
        "router_aux_loss": aux,
        "router_balance_loss": balance,
        "router_z_loss": every.exp().sum(1).log().square().mean().item(),
        "router_load": max((c.max() / c.mean()).item() for c in counts),
        "router_entropy": -(p * p.log()).sum(1).mean().item(),
        "router_dropped": 0,
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5)


class Losing(Dispatch):
    """Three rows never reach their experts."""

    def __init__(self, offsets: Tensor, axis: Axis):
        super().__init__(offsets.clamp(max=offsets[-1] - 3), axis)

    def send_back(self, rows: Tensor) -> Tensor:
        return F.pad(super().send_back(rows), (0, 0, 0, 3))


def test_rows_that_reach_no_expert_are_counted(monkeypatch):
    learner, batch = learner_of(MIXTRAL), random_batch()
    monkeypatch.setattr("trialign.models.moe.Dispatch", Losing)
    assert step(learner, batch)["router_dropped"] == pytest.approx(2 * 3 / sum(LENGTHS))  # in each micro-batch


def test_dense_model_has_no_router_metrics():
    assert not [name for name in step(learner_of(None), random_batch()) if "router" in name]
