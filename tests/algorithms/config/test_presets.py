"""Overlays of launch/configs/presets: losses of PPO and GRPO under each are the pure functions with its numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from presets import ALGORITHMS, TRAINERS, grpo_options, preset
from samples import turn_masks
from tiny import VOCAB, tiny_llama
from trialign.algorithms.advantages import gae, group_advantages, token_rewards, whiten
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.algorithms.config.rejection import RejectionConfig
from trialign.algorithms.config.rlhf import RLHFConfig
from trialign.algorithms.config.scripts import SCRIPTS
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.grpo import actor_step as grpo_step
from trialign.algorithms.grpo import with_advantages
from trialign.algorithms.losses.aggregation import token_weights
from trialign.algorithms.losses.kl import kl_estimate
from trialign.algorithms.losses.policy import importance_weights, log_ratio, ppo_loss
from trialign.algorithms.losses.value import value_loss
from trialign.algorithms.ppo import actor_step, critic_step, with_rewards
from trialign.algorithms.ppo import with_gae as ppo_advantages
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.roles.learner import Learner
from trialign.engine.config import CONFIGS, load
from trialign.engine.mesh import build_mesh
from trialign.models.config import HeadKind
from trialign.models.families.registry import read_config

SCORES = torch.tensor([30.0, -1.0, 0.5, 0.0, 2.0, 2.5])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
WHOLE = range(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def learner(folder: Path, head: HeadKind = "lm") -> Learner:
    model = build_decoder(str(folder), read_config(folder), build_mesh(), "float32", head=head, trained=True)
    return build_learner(model, OptimizerConfig(lr=0.0), 1, sizes=UpdateConfig(micro_batch_size=3))


def batch_of(actor: Learner) -> Batch:
    """Six responses of 2 to 9 tokens; a token of a losing one has log-ratio 25, beyond dual clips and limits; one of
    the first is far from its reference."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 14, (6,), generator=generator).tolist()
    samples = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    batch = pack(samples, turn_masks(lengths, [max(1, n // 3) for n in lengths]))
    now = actor.logprobs(batch)

    def near(spread: float) -> torch.Tensor:
        return now + batch.scatter(spread * torch.randn(len(batch.response), generator=generator))

    old, ref = near(0.3), near(1.0)
    old[batch.last[3]] -= 25
    ref[batch.last[0]] += 12
    values = batch.scatter(torch.randn(len(batch.response), generator=generator))
    return batch.with_(logprobs=old, ref_logprobs=ref, rollout_logprobs=near(0.3), values=values)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_ppo_losses_are_the_pure_functions(folder, trainer):
    config = preset(PPOConfig, trainer)
    actor, critic, options = learner(folder), learner(folder, "score"), config.ppo
    batch = batch_of(actor)
    now, value = actor.logprobs(batch), critic.values(batch)
    scored, _ = with_rewards(batch, SCORES, config, 0.1)
    scored, _ = ppo_advantages(scored, config)
    policy = actor_step(actor, scored, WHOLE, config, first=False)["policy_loss"]
    critics = critic_step(critic, scored, WHOLE, config)[0]["value_loss"]

    segments, old, ref, before = batch.segments, batch.logprobs, batch.ref_logprobs, batch.values
    assert old is not None and ref is not None and before is not None
    kl = kl_estimate(old, ref, "k1", options.kl_input_limit, options.kl_output_limit)
    rewards = token_rewards(SCORES, kl, segments, 0.1, clip=10.0 if trainer == "openrlhf" else 0.0)
    lam = 0.95 if trainer in ("trialign", "trl", "nemo_rl") else 1.0
    gaps = "zero" if trainer == "openrlhf" else "carry"
    advantages, returns = gae(rewards, before, segments, batch.cu_seqlens, 1.0, lam, gaps)
    how: Any = {"trl": "unbiased", "verl": "unbiased_eps", "nemo_rl": "unbiased_eps", "slime": "unbiased"}
    white = whiten(advantages, segments, how.get(trainer, "population"))
    d = log_ratio(now, old, 20.0 if trainer in ("openrlhf", "verl") else 0.0)
    losses = ppo_loss(d, white, 0.2, 0.2, 3.0 if trainer == "verl" else 0.0)[0]
    weights = token_weights(segments, options.loss_aggregation)
    assert policy == pytest.approx((losses * weights).sum().item(), rel=1e-5)
    clip = 0.5 if trainer in ("trialign", "openrlhf", "verl") else 0.2
    squares = value_loss(value, before, returns, clip, 1.0 if trainer == "slime" else 0.5)[0]
    assert critics == pytest.approx((squares * weights).sum().item(), rel=1e-5)
    assert options.loss_aggregation == ("sample-mean" if trainer == "slime" else "token-mean")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_grpo_losses_are_the_pure_functions(folder, trainer):
    config: GRPOConfig = preset(GRPOConfig, trainer)
    actor = learner(folder)
    batch = batch_of(actor)
    now = actor.logprobs(batch)
    scored, _ = with_advantages(batch.with_(scores=SCORES, group=GROUP), config)
    metrics = grpo_step(actor, scored, WHOLE, config, first=False)

    segments, old, ref = batch.segments, batch.logprobs, batch.ref_logprobs
    assert old is not None and ref is not None
    how: Any = ("leave-one-out", "leave-one-out") if trainer == "nemo_rl" else ("mean", "unbiased")
    eps = {"openrlhf": 1e-9, "trl": 1e-4}.get(trainer, 1e-6)
    grouped = group_advantages(SCORES, GROUP, *how, eps, "reward" if trainer == "verl" else "zero")
    grouped = grouped.clamp(-10, 10) if trainer == "openrlhf" else grouped
    d, advantages = log_ratio(now, old, 20.0 if trainer in ("openrlhf", "verl") else 0.0), segments.broadcast(grouped)
    losses = ppo_loss(d, advantages, 0.2, 0.2, 3.0 if trainer == "verl" else 0.0)[0]
    weights = token_weights(segments, "sample-mean" if trainer == "slime" else "token-mean")
    limits = (20.0 if trainer in ("verl", "nemo_rl") else 0.0), (0.0 if trainer in ("trialign", "trl") else 10.0)
    kl = kl_estimate(now, ref, "k3", *limits, ratio=(now - old).exp() if trainer == "nemo_rl" else None)
    assert metrics["kl_loss"] == pytest.approx((kl * weights).sum().item(), rel=1e-4)
    if trainer == "trl":  # corrects for the sampler by default
        assert batch.rollout_logprobs is not None
        sampled = batch.rollout_logprobs
        losses = losses * importance_weights(old, sampled, segments, level="sequence", outside="zero", high=3.0)
    assert metrics["policy_loss"] == pytest.approx((losses * weights).sum().item(), rel=1e-4)


@pytest.mark.parametrize("path", sorted((CONFIGS / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_overlays_load_under_their_scripts(path):
    """Files of trainers load under every script; those of algorithms under theirs, after every trainer's."""
    own = {"ipo": ("dpo", "rejection")} | dict.fromkeys(ALGORITHMS, ("grpo",))
    for script in own.get(path.stem, ("ppo", "grpo", "dpo", "rejection", "rlhf")):
        for trainer in TRAINERS[1:]:
            load(SCRIPTS[script], f"presets/{trainer}.toml", path, scripts=SCRIPTS)


def test_later_overlays_override_earlier_ones():
    assert grpo_options("dapo", "slime").loss_aggregation == "token-mean"
    assert grpo_options(trainer="slime").loss_aggregation == "sample-mean"
    assert grpo_options(trainer="trl").rollout_correction == "sequence-icepop"
    assert grpo_options("rloo", "trl").rollout_correction == grpo_options().rollout_correction == "off"
    assert preset(RLHFConfig, "verl").ppo.ppo.lam == 1.0 and preset(RLHFConfig).ppo.ppo.lam == 0.95
    kl_in = [grpo_options("rloo", trainer).kl_in for trainer in TRAINERS]
    assert kl_in == ["score", "reward", "score", "score", "score", "score"]
    assert [preset(RejectionConfig, trainer).reward.clip for trainer in TRAINERS] == [10, 0, 0, 0, 0, 0]
