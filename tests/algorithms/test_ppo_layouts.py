"""PPO's updates in layouts equal one process: metrics, gradients, moments and weights."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import ALONE, FOUR_RANKS, TWO_RANKS, Layout, assert_close, assert_layouts_agree, whole_states
from samples import random_batch
from tiny import tiny_llama
from tiny_moe import tiny_mixtral
from trialign.algorithms.config.ppo import ActorConfig, CriticConfig, PPOConfig, PPOOptions
from trialign.algorithms.micro_batch import draw_minibatches
from trialign.algorithms.ppo import update, with_forward_passes, with_rewards
from trialign.algorithms.roles.learner import Learner, Roles
from trialign.algorithms.roles.role import Role
from trialign.engine.optim.adamw import ShardedAdamW
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config
from trialign.models.hf.load import load_hf

CONFIG = PPOConfig(
    actor=ActorConfig(clip_high=0.3, dual_clip=3.0, entropy_coef=0.01, ema_decay=0.9, ptx_coef=0.5),
    critic=CriticConfig(value_clip=0.2),
    ppo=PPOOptions(kl_estimator="k3", kl_coef=0.1, micro_batch_size=4, tis_clip=2.0),
)


def one_step(
    rank: int,
    world: int,
    layout: Layout,
    folder: Path,
    config: PPOConfig = CONFIG,
    eps: float = 1e-5,
    recompute: bool = False,
    values_first: bool = False,
):
    """Metrics of PPO on one batch with two-turn samples; whole gradients, moments and weights of actor and critic."""
    mesh = layout.mesh()
    shape = read_config(folder)

    def decoder(head):
        model = Decoder(shape, mesh, dtype=torch.float32, head=head, recompute=recompute)
        load_hf(model, folder, new_head="normal")
        return model

    def learner(head, ema_decay):
        model = decoder(head)
        # A large eps: Adam's first step is g / (|g| + eps), the rounding of gradients near 0 would become whole steps.
        optimizer = ShardedAdamW(
            model, mesh, tied=model.tied_parameter(), eps=eps, max_grad_norm=0.5, ema_decay=ema_decay
        )
        return Learner(model, optimizer, lambda step: 1e-3, temperature=0.8, sizes=config.ppo)

    actor, critic = learner("lm", config.actor.ema_decay), learner("score", 0.0)
    roles = Roles(actor, critic, Role(decoder("lm"), 0.8, config.ppo))
    batch = with_forward_passes(
        random_batch(7).with_(minibatches=draw_minibatches(8, config.ppo, seed=3)), roles, config
    )
    scores = torch.linspace(-1, 1, len(batch))
    batch, metrics = with_rewards(batch, scores, config, kl_coef=0.1)
    if values_first:
        batch = batch.with_(values=critic.values(batch))
    documents = [list(range(5, 25)), list(range(40, 70))]
    metrics |= update(roles, batch, config, documents=documents)
    return metrics, whole_states(actor=actor, critic=critic)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), tied=request.param)


@pytest.fixture(scope="module")
def alone(folder):
    return one_step(0, 1, ALONE, folder)


@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS], ids=str)
def test_layouts_equal_one_process(folder, alone, layout):
    assert_layouts_agree(one_step, [layout], folder, expected=alone)


def test_off_policy_steps_equal_one_process(folder):
    """A second step with the moments of the first; then four steps in which the clips decide, within their rounding."""
    metrics, _ = assert_layouts_agree(one_step, TWO_RANKS, folder, with_ppo(minibatches=2), 1e-2)
    assert metrics["ratio_max"] > 1 > metrics["ratio_min"]
    layouts, config = (Layout(tp=2, pp=2), Layout(dp=2)), with_ppo(minibatches=2, epochs=2)
    metrics, _ = assert_layouts_agree(one_step, layouts, folder, config, tolerance=1e-3)
    assert metrics["clip_fraction"] > 0 and metrics["ratio_max"] > 1 > metrics["ratio_min"]


def test_recomputation_and_separate_value_passes_change_nothing(folder, alone):
    assert_close(one_step(0, 1, ALONE, folder, recompute=True), alone)
    assert_close(one_step(0, 1, ALONE, folder, values_first=True), alone, 1e-6)
    uneven = [Layout(pp=3)]  # stages of 1, 2 and 1 layers
    assert_layouts_agree(one_step, uneven, folder, CONFIG, 1e-5, True, expected=alone)


def test_sizes_that_tp_does_not_divide(odd):
    assert_layouts_agree(one_step, (Layout(tp=2, dp=2), Layout(tp=4), Layout(tp=2, pp=2)), odd)


def test_expert_parallelism_equals_one_process(tmp_path):
    """Two minibatches in micro-batches of at most 40 tokens; the first ratios are exactly 1, or update would raise."""
    layouts = (Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=2), Layout(pp=2, dp=2, ep=2))
    config = with_ppo(minibatches=2, micro_batch_tokens=40)
    metrics, _ = assert_layouts_agree(one_step, layouts, tiny_mixtral(tmp_path), config, tolerance=1e-4)
    assert metrics["actor_router_dropped"] == metrics["critic_router_dropped"] == 0
    assert metrics["actor_router_load"] > 1 and metrics["actor_router_aux_loss"] > 1.9


def with_ppo(**changes) -> PPOConfig:
    return dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, **changes))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def odd(request, tmp_path_factory):
    """A model with sizes that tp=2 and tp=4 do not divide; under tp=4 ranks share three key/value heads."""
    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
    sizes |= {"vocab_size": 97, "intermediate_size": 67}
    return tiny_llama(tmp_path_factory.mktemp("odd"), tied=request.param, **sizes)
