"""The router's losses: values and gradients against transformers' function and plain autograd, and what is logged."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB
from tiny_moe import MIXTRAL, SHARED, fill, moe_config, moe_decoder
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import stage_forward, target_logprobs
from trialign.engine.mesh import Axis, build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.engine.parallel.expert import Dispatch
from trialign.models.config import MoEConfig
from trialign.models.moe import MoE, Routing

LENGTHS = [7, 1, 20, 12]


def theirs(logits: tuple[Tensor, ...], moe: MoEConfig, mask: Tensor | None = None) -> Tensor:
    told: Any = logits  # annotated as a tuple of one there
    loss = load_balancing_loss_func(told, moe.experts, moe.top_k, mask)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize("moe", [MIXTRAL, SHARED], ids=["mixtral", "shared"])
def test_gradients_are_those_of_the_losses_written_out(moe):
    """Per sample transformers' own loss, weighted by tokens; the square of log-sum-exp."""
    x, upstream = torch.randn(2, sum(LENGTHS), 32, generator=torch.Generator().manual_seed(0)).unbind(0)
    layer = MoE(moe_config(moe), 0, build_mesh(), torch.float32)
    fill(layer)
    grads = []
    for injected in (True, False):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        if injected:
            ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
            out = layer(leaf, Routing(ends, scale=1 / sum(LENGTHS)))
            (out * upstream).sum().backward()
        else:
            logits = leaf @ layer.router.weight.t()
            samples = logits.split(LENGTHS)
            balance = sum(len(s) * theirs((s,), moe) for s in samples) / sum(LENGTHS)
            z = logits.exp().sum(1).log().square().mean()
            ((layer(leaf) * upstream).sum() + moe.aux_coef * balance + moe.z_coef * z).backward()
        grads.append({"x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    for name, wanted in grads[1].items():
        torch.testing.assert_close(grads[0][name], wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item(), msg=name)
    layer.zero_grad()
    (layer(x) * upstream).sum().backward()
    assert (layer.router.weight.grad - grads[1]["router.weight"]).abs().max() > 1e-3  # pyright: ignore


def router_logits(model, batch: Batch) -> tuple[Tensor, ...]:
    """[tokens, experts] of every layer with experts, for the whole batch."""
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


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("moe", [MIXTRAL, SHARED], ids=["mixtral", "shared"])
def test_what_is_logged(moe, recompute):
    """Two micro-batches give the numbers of the whole batch, each token counted once."""
    learner, batch = learner_of(moe, recompute=recompute), random_batch()
    logits = router_logits(learner.model, batch)
    assert len(logits) == 4 - len(moe.dense_layers)
    got = step(learner, batch)

    padded = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    for row, n in enumerate(LENGTHS):
        padded[row, :n] = True
    spread = tuple(torch.zeros(padded.numel(), moe.experts).masked_scatter(padded.view(-1, 1), x) for x in logits)
    assert got["router_aux_loss"] == pytest.approx(theirs(logits, moe).item(), rel=1e-5)
    assert got["router_aux_loss"] == pytest.approx(theirs(spread, moe, padded.long()).item(), rel=1e-5)

    samples = [s for x in logits for s in x.split(LENGTHS)]
    weighted = sum(len(s) * theirs((s,), moe).item() for s in samples) / sum(len(x) for x in logits)
    every = torch.cat(logits).double()
    counts = [torch.bincount(x.topk(moe.top_k).indices.flatten(), minlength=moe.experts).double() for x in logits]
    assert got["router_balance_loss"] == pytest.approx(weighted, rel=1e-5)
    assert got["router_z_loss"] == pytest.approx(every.exp().sum(1).log().square().mean().item(), rel=1e-5)
    assert got["router_load"] == pytest.approx(max((c.max() / c.mean()).item() for c in counts), rel=1e-6)
    p = every.softmax(1)
    assert got["router_entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert got["router_dropped"] == 0


class Losing(Dispatch):
    """Three rows never come to their experts."""

    def __init__(self, offsets: Tensor, axis: Axis):
        super().__init__(offsets.clamp(max=offsets[-1] - 3), axis)

    def send_back(self, rows: Tensor) -> Tensor:
        return F.pad(super().send_back(rows), (0, 0, 0, 3))


def test_what_did_not_arrive_is_counted(monkeypatch):
    learner, batch = learner_of(MIXTRAL), random_batch()
    monkeypatch.setattr("trialign.models.moe.Dispatch", Losing)
    got = step(learner, batch)
    assert got["router_dropped"] == pytest.approx(2 * 3 / sum(LENGTHS))  # in each micro-batch


def test_steps_on_the_balance_loss_even_the_load():
    """A router that prefers two experts learns to use all four; without the loss it does not."""
    loads = {}
    for coef in (0.0, 20.0):
        learner, batch = learner_of(MoEConfig(experts=4, top_k=1, ffn_size=24, aux_coef=coef)), random_batch()
        losses = [step(learner, batch)["router_balance_loss"] for _ in range(25)]
        loads[coef] = losses[-1] / losses[0]
    assert loads[20.0] < 0.9 * loads[0.0]


def test_a_dense_model_logs_nothing_of_routers():
    metrics = step(learner_of(None), random_batch())
    assert set(metrics) == {"grad_norm", "lr"}
