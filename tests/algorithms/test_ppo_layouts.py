"""One PPO step gives the same losses, gradients and weights in every layout and for every micro-batch size."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import VOCAB, assemble, tiny_llama
from tiny_moe import tiny_mixtral
from trialign.algorithms.batch import Batch, after_prompts, pack
from trialign.algorithms.config.ppo import ActorConfig, CriticConfig, PPOConfig, PPOOptions
from trialign.algorithms.policy_step import plan
from trialign.algorithms.ppo import Roles, score, update, with_rewards
from trialign.algorithms.roles.role import Learner, Role
from trialign.engine.mesh import build_mesh
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.hf.table import hf_name, load_hf

LAYOUTS = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]  # tp, pp, dp
CONFIG = PPOConfig(
    actor=ActorConfig(clip_high=0.3, dual_clip=3.0, entropy_coef=0.01, ema_decay=0.9, ptx_coef=0.5),
    critic=CriticConfig(value_clip=0.2),
    ppo=PPOOptions(kl="k3", kl_coef=0.1, micro_batch_size=4, tis_clip=2.0),
)


def random_batch() -> Batch:
    """Eight samples of 3 to 20 tokens with made-up sampler's logprobs."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(3, 20, (8,), generator=generator).tolist()
    samples = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    prompts = [max(1, n // 3) for n in lengths]
    batch = pack(samples, after_prompts(lengths, prompts))
    return batch.with_(rollout_logprobs=batch.spread(-4 + torch.randn(len(batch.response), generator=generator) / 10))


def one_step(
    rank: int,
    world: int,
    folder: Path,
    layout: tuple[int, int, int],
    config: PPOConfig,
    recompute: bool = False,
    values_first: bool = False,
    ep: int = 1,
    eps: float = 1e-5,
):
    """One whole batch of PPO; returns its metrics, and gradients and weights put together from all ranks."""
    tp, pp, dp = layout
    mesh = build_mesh(tp=tp, pp=pp, dp=dp, ep=ep)
    shape = ModelConfig.from_hf(folder)

    def decoder(head):
        model = Decoder(shape, mesh, dtype=torch.float32, head=head, recompute=recompute)
        load_hf(model, folder, new_head="normal")
        return model

    def learner(head, ema_decay):
        model = decoder(head)
        # Adam's first step is g / (|g| + eps): with the usual eps of 1e-8 it would turn the rounding of gradients that
        # are all but 0 into whole steps, and the comparison of weights would be one of rounding.
        optimizer = ShardedAdamW(
            model, mesh, tied=model.tied_parameter(), eps=eps, max_grad_norm=0.5, ema_decay=ema_decay
        )
        return Learner(model, optimizer, lambda step: 1e-3, temperature=0.8)

    roles = Roles(learner("lm", config.actor.ema_decay), learner("score", 0.0), Role(decoder("lm"), temperature=0.8))
    batch = random_batch()
    epochs = plan(batch, config.ppo, mesh, seed=3)
    batch = score(batch, roles, config, [share for minibatch in epochs[0] for share in minibatch.shares])
    scores = torch.linspace(-1, 1, len(batch))
    batch, metrics = with_rewards(batch, scores, config, kl_coef=0.1)
    if values_first:
        batch = batch.with_(values=roles.critic.values(batch, epochs[0][0].shares))
    documents = [list(range(5, 25)), list(range(40, 70))]
    metrics |= update(roles, batch, epochs, config, ptx=documents)
    entries = []
    for role, learner_ in (("actor", roles.actor), ("critic", roles.critic)):
        for bucket in learner_.optimizer.buckets:
            bucket.states["grad"] = bucket.grads[bucket.mine]
        entries += learner_.optimizer.entries(role, functools.partial(hf_name, config=shape, head=learner_.model.kind))
    return metrics, assemble(entries, mesh.world)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), tied=request.param)


@pytest.fixture(scope="module")
def alone(folder):
    return one_step(0, 1, folder, (1, 1, 1), CONFIG)


def compare(got, expected, tolerance=1e-5):
    """Within the relative tolerance: of each number for metrics, of the largest element for tensors."""
    for name, value in expected[0].items():
        assert got[0][name] == pytest.approx(value, rel=tolerance, abs=tolerance / 10), name
    assert got[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        largest = tensor.abs().max().item()
        torch.testing.assert_close(got[1][name], tensor, rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout))
def test_layouts_equal_one_process(folder, alone, layout):
    world = layout[0] * layout[1] * layout[2]
    for got in run_ranks(one_step, world, folder, layout, CONFIG, timeout=120):
        compare(got, alone)


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout))
def test_two_steps(folder, layout):
    """The second one off-policy, with the moments of the first. Each divides by its own gradients, so that a larger
    eps is what keeps their rounding from becoming a part of the weights' steps."""
    config, eps = _with_ppo(minibatches=2), 1e-2
    alone = one_step(0, 1, folder, (1, 1, 1), config, eps=eps)
    assert alone[0]["ratio_max"] > 1 > alone[0]["ratio_min"]
    for got in run_ranks(one_step, 2, folder, layout, config, False, False, 1, eps, timeout=120):
        compare(got, alone)


@pytest.mark.parametrize("layout", [(2, 2, 1), (1, 1, 2)], ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout))
def test_several_epochs_and_minibatches(folder, layout):
    """Four steps, later ones off-policy: the clip and the dual clip decide. Rounding grows with each step."""
    config = _with_ppo(minibatches=2, epochs=2)
    alone = one_step(0, 1, folder, (1, 1, 1), config)
    assert alone[0]["clip_fraction"] > 0 and alone[0]["ratio_max"] > 1 > alone[0]["ratio_min"]
    for got in run_ranks(one_step, layout[0] * layout[1] * layout[2], folder, layout, config, timeout=120):
        compare(got, alone, tolerance=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_do_not_matter(folder, alone, size):
    compare(one_step(0, 1, folder, (1, 1, 1), _with_ppo(micro_batch_size=size)), alone)


def test_token_budget_does_not_matter(folder, alone):
    compare(one_step(0, 1, folder, (1, 1, 1), _with_ppo(micro_batch_tokens=40)), alone)


def test_values_of_the_critics_own_step_are_those_of_a_pass_before_it(folder, alone):
    compare(one_step(0, 1, folder, (1, 1, 1), CONFIG, values_first=True), alone, tolerance=1e-6)


def test_recomputation_does_not_matter(folder, alone):
    compare(one_step(0, 1, folder, (1, 1, 1), CONFIG, recompute=True), alone)
    for got in run_ranks(one_step, 2, folder, (1, 2, 1), CONFIG, True, timeout=120):
        compare(got, alone)


ODD: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    "intermediate_size": 67,
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def odd(request, tmp_path_factory):
    """A model of which tp=2 and tp=4 divide nothing: with tp=4 three key/value heads are shared by four ranks."""
    return tiny_llama(tmp_path_factory.mktemp("odd"), tied=request.param, **ODD)


def test_sizes_that_tp_does_not_divide(odd):
    alone = one_step(0, 1, odd, (1, 1, 1), CONFIG)
    for layout in ((2, 1, 2), (4, 1, 1), (2, 2, 1)):
        for got in run_ranks(one_step, 4, odd, layout, CONFIG, timeout=120):
            compare(got, alone)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize(
    "layout", [(1, 1, 2), (2, 1, 2), (1, 2, 2)], ids=lambda layout: "tp{}-pp{}-dp{}".format(*layout)
)
def test_a_mixture_of_experts_spread_over_the_data_ranks(mixture, layout):
    """Two minibatches in micro-batches of at most 40 tokens; the first ratios are exactly 1, or update would raise."""
    config = _with_ppo(minibatches=2, micro_batch_tokens=40)
    alone = one_step(0, 1, mixture, (1, 1, 1), config)
    assert alone[0]["actor_router_dropped"] == alone[0]["critic_router_dropped"] == 0
    assert alone[0]["actor_router_load"] > 1 and alone[0]["actor_router_aux_loss"] > 1.9
    world = layout[0] * layout[1] * layout[2]
    for got in run_ranks(one_step, world, mixture, layout, config, False, False, 2, timeout=120):
        compare(got, alone, tolerance=1e-4)


def _with_ppo(**changes) -> PPOConfig:
    return dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, **changes))
